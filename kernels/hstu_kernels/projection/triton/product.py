"""A product of rows with a weight, and what comes behind it before the sums leave the chip: bias, sum with x, SiLU."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    out_ptr,
    before_ptr,
    bias_ptr,
    residual_ptr,
    a_desc,
    weight_desc,
    rows,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ACTIVATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``out [L, C] = silu(residual + a @ weight.T + bias)``, SiLU in the first ACTIVATED columns; one tile a program.

    ``a [L, DEPTH]`` and ``weight [C, DEPTH]`` come by the copy engine; ``before [L, C]`` takes the sums ahead of SiLU.
    ``bias [C]`` and ``residual [L, C]`` where they are given. All contiguous.
    """
    TILES_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    # Neighbours share the rows of a; the weight stays in the cache.
    row_begin = (program // TILES_N) * BLOCK_M
    column_begin = (program % TILES_N) * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for depth in range(0, DEPTH, BLOCK_K):
        # [M, K], [N, K]: 0 behind the ends.
        a = a_desc.load([row_begin, depth])
        weight = weight_desc.load([column_begin, depth])
        acc = tl.dot(a, tl.trans(weight), acc)
    row = row_begin + tl.arange(0, BLOCK_M)
    column = column_begin + tl.arange(0, BLOCK_N)
    at = row[:, None].to(tl.int64) * COLUMNS + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < COLUMNS)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if before_ptr is not None:
        tl.store(before_ptr + at, acc.to(before_ptr.dtype.element_ty), mask=inside)
    if ACTIVATED > 0:
        y = acc / (1.0 + tl.exp(-acc))
        acc = y if ACTIVATED >= COLUMNS else tl.where(column[None, :] < ACTIVATED, y, acc)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)
