"""SiLU of the first columns of a row, forward and backward; the other columns pass."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def silu_fwd_kernel(x_ptr, out_ptr, rows, COLUMNS: tl.constexpr, ACTIVATED: tl.constexpr, BLOCK: tl.constexpr):
    """``out [L, C]``, both contiguous, as one row of elements."""
    # In this form the compiler sees that the bound is a multiple of COLUMNS, and moves whole vectors.
    total = tl.cast(rows, tl.int64) * COLUMNS
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < total, other=0.0).to(tl.float32)
    y = x / (1.0 + tl.exp(-x))
    if ACTIVATED < COLUMNS:
        y = tl.where(at % COLUMNS < ACTIVATED, y, x)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=at < total)


@triton.jit(do_not_specialize=["rows"])
def silu_bwd_kernel(
    grad_ptr, x_ptr, out_ptr, rows, COLUMNS: tl.constexpr, ACTIVATED: tl.constexpr, BLOCK: tl.constexpr
):
    """``out = grad * silu'(x)`` in the activated columns, ``grad`` in the others; all contiguous."""
    total = tl.cast(rows, tl.int64) * COLUMNS
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < total, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=at < total, other=0.0).to(tl.float32)
    gate = 1.0 / (1.0 + tl.exp(-x))
    y = grad * gate * (1.0 + x * (1.0 - gate))
    if ACTIVATED < COLUMNS:
        y = tl.where(at % COLUMNS < ACTIVATED, y, grad)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=at < total)
