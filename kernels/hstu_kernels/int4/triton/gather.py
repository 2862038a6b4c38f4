"""The dequantising gather: packed rows in, sequence rows out, one pass over memory. SHAPE is a `shape.GatherShape`."""

import triton
import triton.language as tl


@triton.jit
def _half(low_bits):
    """float32 of a float16 whose bits are the low 16 of an int32."""
    return (low_bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scale_and_bias(tail_ptr, inside, SHAPE: tl.constexpr):
    """float32 ``[R]`` each, from the four bytes at ``tail_ptr [R]``."""
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
def _add_rows(values, table_ptr, ids_ptr, num_rows, rows, in_batch, columns, wanted, SHAPE: tl.constexpr):
    """``values [R, U, C]`` plus rows of a dense table; an id of -1 adds nothing, any other outside gives NaN."""
    ids = tl.load(ids_ptr + rows, mask=in_batch, other=-1).to(tl.int64)
    inside = (ids >= 0) & (ids < num_rows)
    term = tl.load(
        table_ptr + ids[:, None, None] * SHAPE.dim + columns, mask=wanted & inside[:, None, None], other=0.0
    ).to(tl.float32)
    known = inside | (ids == -1)
    return values + tl.where(known[:, None, None], term, float("nan"))


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
):
    """``out [L, D]`` (contiguous) from ``data [rows, row_units]``; grid ``ceil(L / block_rows)``."""
    BLOCK_ROWS: tl.constexpr = SHAPE.block_rows
    BLOCK_UNITS: tl.constexpr = SHAPE.block_units
    CODES: tl.constexpr = SHAPE.codes
    BITS: tl.constexpr = SHAPE.bits
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_batch = rows < total_rows
    # [R]; addresses of a table beyond 2 GiB need 64 bits.
    ids = tl.load(ids_ptr + rows, mask=in_batch, other=-1).to(tl.int64)
    inside = (ids >= 0) & (ids < num_rows)
    row_ptr = data_ptr + ids * SHAPE.row_units
    scale, bias = _scale_and_bias(row_ptr + SHAPE.code_units, inside, SHAPE)
    # One more row of NaN for a wrong id: its scale.
    scale = tl.where(inside, scale, float("nan"))
    code = tl.arange(0, CODES)
    for begin in range(0, SHAPE.code_units, BLOCK_UNITS):
        units = begin + tl.arange(0, BLOCK_UNITS)
        # [R, U]
        words = tl.load(
            row_ptr[:, None] + units[None, :], mask=inside[:, None] & (units < SHAPE.code_units)[None, :], other=0
        ).to(tl.int32)
        # [R, U, C]
        codes = (words[:, :, None] >> (code * BITS)[None, None, :]) & ((1 << BITS) - 1)
        values = codes.to(tl.float32) * scale[:, None, None] + bias[:, None, None]
        values = values * item_scale
        columns = (units * CODES)[None, :, None] + code[None, None, :]
        wanted = in_batch[:, None, None] & (columns < SHAPE.dim)
        if action_ptr is not None:
            values = _add_rows(values, action_ptr, action_ids_ptr, num_actions, rows, in_batch, columns, wanted, SHAPE)
        if position_ptr is not None:
            values = _add_rows(
                values, position_ptr, position_ids_ptr, num_positions, rows, in_batch, columns, wanted, SHAPE
            )
        tl.store(out_ptr + rows[:, None, None] * SHAPE.dim + columns, values.to(out_ptr.dtype.element_ty), mask=wanted)
