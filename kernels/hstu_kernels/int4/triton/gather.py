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
def _ids_of(ids_ptr, num_rows, rows, in_batch):
    """``ids [U]`` of a dense table, whether they lie in it, and whether they mean a row or (-1) none."""
    ids = tl.load(ids_ptr + rows, mask=in_batch, other=-1).to(tl.int64)
    inside = (ids >= 0) & (ids < num_rows)
    return ids, inside, inside | (ids == -1)


@triton.jit
def _add_rows(values, table_ptr, ids, inside, columns, SHAPE: tl.constexpr):
    """``values [U, W, C]`` plus rows of a dense table; nothing where the id lies outside."""
    wanted = tl.broadcast_to(inside[:, None, None], columns.shape)
    if SHAPE.ragged:
        wanted &= columns < SHAPE.dim
    row_ptr = table_ptr + ids * SHAPE.dim
    return values + tl.load(row_ptr[:, None, None] + columns, mask=wanted, other=0.0).to(tl.float32)


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
    """``out [L, D]`` (contiguous) from ``data [rows, row_units]``; grid ``ceil(L * code_units / block_units)``.

    ``item_scale`` counts where ``SCALED``.
    """
    UNITS: tl.constexpr = SHAPE.code_units
    CODES: tl.constexpr = SHAPE.codes
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
    rows = place // PITCH
    units = place % PITCH
    in_batch = rows < total_rows - first_row
    ids, inside, _ = _ids_of(ids_ptr + first_row, num_rows, rows, in_batch)
    valid = inside
    if action_ptr is not None:
        action_ids, some_action, known = _ids_of(action_ids_ptr + first_row, num_actions, rows, in_batch)
        valid &= known
    if position_ptr is not None:
        position_ids, some_position, known = _ids_of(position_ids_ptr + first_row, num_positions, rows, in_batch)
        valid &= known
    # Addresses of a table beyond 2 GiB need 64 bits.
    row_ptr = data_ptr + ids * SHAPE.row_units
    # Units of the row, [U, W].
    columns = units[:, None] + (tl.arange(0, WORDS) * PITCH)[None, :]
    there = tl.broadcast_to(inside[:, None], columns.shape)
    if SHAPE.streaming:
        words = tl.load(row_ptr[:, None] + columns, mask=there, other=0, eviction_policy="evict_first").to(tl.int32)
    else:
        words = tl.load(row_ptr[:, None] + columns, mask=there, other=0).to(tl.int32)
    scale, bias = _scale_and_bias(row_ptr + UNITS, inside, SHAPE)
    # A wrong id, of whichever table, makes its row NaN: through the scale, once for all elements.
    scale = tl.where(valid, scale, float("nan"))
    code = tl.arange(0, CODES)
    # [U, W, C]
    codes = (words[:, :, None] >> (code * SHAPE.bits)[None, None, :]) & ((1 << SHAPE.bits) - 1)
    codes = codes.to(tl.float32)
    # The product of 11 and at most 8 bits is exact, so the fused operation rounds as product and sum do.
    values = tl.fma(
        codes, tl.broadcast_to(scale[:, None, None], codes.shape), tl.broadcast_to(bias[:, None, None], codes.shape)
    )
    if SCALED:
        values = values * item_scale
    columns = (columns * CODES)[:, :, None] + code[None, None, :]
    if action_ptr is not None:
        values = _add_rows(values, action_ptr, action_ids, some_action, columns, SHAPE)
    if position_ptr is not None:
        values = _add_rows(values, position_ptr, position_ids, some_position, columns, SHAPE)
    wanted = tl.broadcast_to(in_batch[:, None, None], columns.shape)
    if SHAPE.ragged:
        wanted &= columns < SHAPE.dim
    out = values.to(out_ptr.dtype.element_ty)
    out_ptr += first_row * SHAPE.dim
    places = (rows * SHAPE.dim)[:, None, None] + columns
    if SHAPE.streaming:
        tl.store(out_ptr + places, out, mask=wanted, cache_modifier=".cs")
    else:
        tl.store(out_ptr + places, out, mask=wanted)
