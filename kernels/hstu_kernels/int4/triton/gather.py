"""The dequantising gather: packed rows in, sequence rows out, one pass over memory. SHAPE is a `shape.GatherShape`.

The codes of all rows of a call are one series of units (row 0's, row 1's, ...), and a program takes the next
`block_units` of it, whatever the width of a row. A thread has `words` units of a row, the row's ids, scale and bias,
and the elements that come from its units. Threads pass nothing to each other: what neighbours read alike comes from
the cache.
"""

import triton
import triton.language as tl


@triton.jit
def _half(low_bits):
    """float32 of a float16 whose bits are the low 16 of an int32."""
    return (low_bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scale_and_bias(tail_ptr, inside, SHAPE: tl.constexpr):
    """float32 ``[U]`` each, from the four bytes at ``tail_ptr [U]``."""
    if SHAPE.unit_bytes == 4:
        both = tl.load(tail_ptr, mask=inside, other=0)
        scale, bias = _half(both), _half(both >> 16)
    elif SHAPE.unit_bytes == 2:
        scale = _half(tl.load(tail_ptr, mask=inside, other=0).to(tl.int32))
        bias = _half(tl.load(tail_ptr + 1, mask=inside, other=0).to(tl.int32))
    else:
        b0 = tl.load(tail_ptr, mask=inside, other=0).to(tl.int32)
        b1 = tl.load(tail_ptr + 1, mask=inside, other=0).to(tl.int32)
        b2 = tl.load(tail_ptr + 2, mask=inside, other=0).to(tl.int32)
        b3 = tl.load(tail_ptr + 3, mask=inside, other=0).to(tl.int32)
        scale, bias = _half(b0 | (b1 << 8)), _half(b2 | (b3 << 8))
    return scale, bias


@triton.jit
def _ids_of(ids_ptr, action_ids_ptr, position_ids_ptr, rows, in_batch):
    """The ids ``[U]`` of rows in the item, action and position table; of an absent table any."""
    ids = tl.load(ids_ptr + rows, mask=in_batch, other=-1)
    action_ids = ids
    position_ids = ids
    if action_ids_ptr is not None:
        action_ids = tl.load(action_ids_ptr + rows, mask=in_batch, other=-1)
    if position_ids_ptr is not None:
        position_ids = tl.load(position_ids_ptr + rows, mask=in_batch, other=-1)
    return ids, action_ids, position_ids


@triton.jit
def _term(table_ptr, ids, num_rows, columns, SHAPE: tl.constexpr):
    """Elements ``columns [U, W, C]`` of rows of a dense table, zero where the id lies outside.

    Also which ids ``[U]`` mean a row or (-1) none.
    """
    # Addresses of a table beyond 2 GiB need 64 bits.
    ids = ids.to(tl.int64)
    inside = (ids >= 0) & (ids < num_rows)
    wanted = tl.broadcast_to(inside[:, None, None], columns.shape)
    if SHAPE.ragged:
        wanted &= columns < SHAPE.dim
    row_ptr = table_ptr + ids * SHAPE.dim
    return tl.load(row_ptr[:, None, None] + columns, mask=wanted, other=0.0), inside | (ids == -1)


@triton.jit(do_not_specialize=["total_rows", "num_rows", "num_actions", "num_positions", "item_scale"])
def int4_gather_kernel(
    data_ptr,
    ids_ptr,
    action_ptr,
    action_ids_ptr,
    position_ptr,
    position_ids_ptr,
    out_ptr,
    total_rows,
    num_rows,
    num_actions,
    num_positions,
    item_scale,
    SHAPE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """``out [L, D]`` (contiguous) from ``data [rows, row_units]``.

    Grid ``ceil(L * code_units / block_units)``. ``item_scale`` counts where ``SCALED``.
    """
    UNITS: tl.constexpr = SHAPE.code_units
    BITS: tl.constexpr = SHAPE.bits
    WORDS: tl.constexpr = SHAPE.words
    # A thread's units of a row lie this far apart, so that its neighbours' lie between them.
    PITCH: tl.constexpr = UNITS // WORDS
    BLOCK: tl.constexpr = SHAPE.block_units // WORDS
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    # Row, from the program's first, and unit inside it, [U]: one division of 64 bits for the program, small ones for
    # its threads.
    first_row = begin // PITCH
    place = tl.arange(0, BLOCK)
    if BLOCK % PITCH != 0:
        place += (begin - first_row * PITCH).to(tl.int32)
    left = total_rows - first_row
    ids_ptr += first_row
    out_ptr += first_row * SHAPE.dim
    if action_ptr is not None:
        action_ids_ptr += first_row
    if position_ptr is not None:
        position_ids_ptr += first_row
    # A code stays where it is in its unit, as a number some power of two too large, which the scale makes up for:
    # both exact, and no shift for each element.
    code = tl.arange(0, SHAPE.codes)
    masks = tl.full([SHAPE.codes], (1 << BITS) - 1, tl.uint32) << (code * BITS).to(tl.uint32)
    powers = ((127 - code * BITS) << 23).to(tl.float32, bitcast=True)
    rows = place // PITCH
    ids, action_ids, position_ids = _ids_of(ids_ptr, action_ids_ptr, position_ids_ptr, rows, rows < left)
    # All that is read of a row is under way before the first of it is used.
    item_ids = ids.to(tl.int64)
    valid = (item_ids >= 0) & (item_ids < num_rows)
    row_ptr = data_ptr + item_ids * SHAPE.row_units
    # Units of the row, [U, W].
    columns = (place % PITCH)[:, None] + (tl.arange(0, WORDS) * PITCH)[None, :]
    there = tl.broadcast_to(valid[:, None], columns.shape)
    words = tl.load(row_ptr[:, None] + columns, mask=there, other=0).to(tl.int32).to(tl.uint32, bitcast=True)
    scale, bias = _scale_and_bias(row_ptr + UNITS, valid, SHAPE)
    # Elements, [U, W, C].
    columns = (columns * SHAPE.codes)[:, :, None] + code[None, None, :]
    if action_ptr is not None:
        action_rows, known = _term(action_ptr, action_ids, num_actions, columns, SHAPE)
        valid &= known
    if position_ptr is not None:
        position_rows, known = _term(position_ptr, position_ids, num_positions, columns, SHAPE)
        valid &= known
    wanted = tl.broadcast_to((rows < left)[:, None, None], columns.shape)
    if SHAPE.ragged:
        wanted &= columns < SHAPE.dim
    places = (rows * SHAPE.dim)[:, None, None] + columns
    # A wrong id, of whichever table, makes its row NaN: through the scale, once for all elements.
    scale = tl.where(valid, scale, float("nan"))
    codes = (words[:, :, None] & masks[None, None, :]).to(tl.float32)
    # The product of 11 and at most 8 bits is exact, so the fused operation rounds as product and sum do.
    values = tl.fma(
        codes,
        tl.broadcast_to(scale[:, None, None] * powers[None, None, :], codes.shape),
        tl.broadcast_to(bias[:, None, None], codes.shape),
    )
    if SCALED:
        values = values * item_scale
    if action_ptr is not None:
        values += action_rows.to(tl.float32)
    if position_ptr is not None:
        values += position_rows.to(tl.float32)
    tl.store(out_ptr + places, values.to(out_ptr.dtype.element_ty), mask=wanted)
