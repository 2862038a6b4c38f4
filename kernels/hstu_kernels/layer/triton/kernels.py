"""A gradient in the precision of the products, and its column sums, in one pass."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["total_rows"])
def narrow_kernel(
    x_ptr,
    out_ptr,
    sums_ptr,
    total_rows,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """``out [L, W]`` is ``x`` rounded, ``sums [programs, W]`` a line of its column sums for each program."""
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_W)
    sums = tl.zeros([BLOCK_W], tl.float32)
    for block in range(program, tl.cdiv(total_rows, BLOCK_R), tl.num_programs(0)):
        rows = tl.full([], block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        at = rows[:, None] * WIDTH + cols[None, :]
        inside = (rows[:, None] < total_rows) & (cols[None, :] < WIDTH)
        # [R, W]
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)
        sums += tl.sum(x.to(tl.float32), 0)
    tl.store(sums_ptr + program.to(tl.int64) * WIDTH + cols, sums, mask=cols < WIDTH)
