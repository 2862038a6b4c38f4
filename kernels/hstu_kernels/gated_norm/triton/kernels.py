"""Norm, gate and dropout of whole rows in one pass, forward and backward; without a gate a layer norm.

The formulas are those of `hstu_kernels.gated_norm.reference`, the elements that stay those of `hstu_kernels.dropout`.
"""

import triton
import triton.language as tl


@triton.jit
def _kept(seed, rows, part, threshold, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """``[R, W]``: the elements that stay. One counter serves four neighbouring columns."""
    group = tl.arange(0, BLOCK_W // 4)
    zero = tl.zeros([BLOCK_R, BLOCK_W // 4], tl.uint32)
    c0 = zero + group[None, :].to(tl.uint32)
    c1 = zero + (rows[:, None] & 0xFFFFFFFF).to(tl.uint32)
    c2 = zero + (rows[:, None] >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, zero + part)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return words.to(tl.int64) >= threshold


@triton.jit
def _drop(x, seed, rows, part, threshold, inverse, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """``x`` with dropout and its factor ``inverse``."""
    return tl.where(_kept(seed, rows, part, threshold, BLOCK_R, BLOCK_W), x * inverse, 0.0)


@triton.jit(do_not_specialize=["total_rows", "eps", "inverse"])
def gate_fwd_kernel(
    a_ptr,
    u_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    total_rows,
    a_stride,
    u_stride,
    eps,
    threshold,
    inverse,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    CONCAT: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """``out [L, W or 3 W]`` (contiguous), ``mean``, ``rstd [L]``; one program for BLOCK_R rows. No ``u``: a norm."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_W)
    inside = (rows[:, None] < total_rows) & (cols[None, :] < WIDTH)
    # [R, W]
    a = tl.load(a_ptr + rows[:, None] * a_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(a, 1) / WIDTH
    centered = tl.where(inside, a - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, 1) / WIDTH + eps)
    tl.store(mean_ptr + rows, mean, mask=rows < total_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < total_rows)
    y = centered * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)[None, :]
    PARTS: tl.constexpr = 3 if CONCAT else 1
    out_ptrs = out_ptr + rows[:, None] * (PARTS * WIDTH) + cols[None, :]
    if u_ptr is not None:
        u = tl.load(u_ptr + rows[:, None] * u_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        y *= u
        if DROPOUT:
            seed = tl.load(seed_ptr)
            y = _drop(y, seed, rows, PARTS - 1, threshold, inverse, BLOCK_R, BLOCK_W)
        if CONCAT:
            if DROPOUT:
                u = _drop(u, seed, rows, 0, threshold, inverse, BLOCK_R, BLOCK_W)
                a = _drop(a, seed, rows, 1, threshold, inverse, BLOCK_R, BLOCK_W)
            tl.store(out_ptrs, u.to(out_ptr.dtype.element_ty), mask=inside)
            tl.store(out_ptrs + WIDTH, a.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptrs + (PARTS - 1) * WIDTH, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["total_rows", "inverse"])
def gate_bwd_kernel(
    grad_ptr,
    a_ptr,
    u_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    seed_ptr,
    residual_ptr,
    da_ptr,
    du_ptr,
    dweight_ptr,
    dbias_ptr,
    total_rows,
    a_stride,
    u_stride,
    du_stride,
    threshold,
    inverse,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    CONCAT: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """``da``, ``du [L, W]``, and a line of ``dweight``, ``dbias [programs, W]`` each; all but ``a, u, du`` contiguous.

    Without ``mean`` the rows of ``a`` are normed already. ``residual [L, W]`` is added to ``da``.
    """
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_W)
    in_width = cols < WIDTH
    PARTS: tl.constexpr = 3 if CONCAT else 1
    weight_sums = tl.zeros([BLOCK_W], tl.float32)
    bias_sums = tl.zeros([BLOCK_W], tl.float32)
    for block in range(program, tl.cdiv(total_rows, BLOCK_R), tl.num_programs(0)):
        rows = tl.full([], block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (rows[:, None] < total_rows) & in_width[None, :]
        # [R, W]
        a = tl.load(a_ptr + rows[:, None] * a_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < total_rows, other=0.0)
        normed = a
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + rows, mask=rows < total_rows, other=0.0)
            normed = tl.where(inside, (a - mean[:, None]) * rstd[:, None], 0.0)
        grad_ptrs = grad_ptr + rows[:, None] * (PARTS * WIDTH) + cols[None, :]
        dh = tl.load(grad_ptrs + (PARTS - 1) * WIDTH, mask=inside, other=0.0).to(tl.float32)
        at = rows[:, None] * WIDTH + cols[None, :]
        da = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
        if u_ptr is not None:
            h = normed
            if weight_ptr is not None:
                h *= tl.load(weight_ptr + cols, mask=in_width, other=0.0).to(tl.float32)[None, :]
            if bias_ptr is not None:
                h += tl.load(bias_ptr + cols, mask=in_width, other=0.0).to(tl.float32)[None, :]
            u = tl.load(u_ptr + rows[:, None] * u_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            if DROPOUT:
                seed = tl.load(seed_ptr)
                dh = _drop(dh, seed, rows, PARTS - 1, threshold, inverse, BLOCK_R, BLOCK_W)
            du = dh * h
            dh *= u
            if CONCAT:
                of_u = tl.load(grad_ptrs, mask=inside, other=0.0).to(tl.float32)
                da = tl.load(grad_ptrs + WIDTH, mask=inside, other=0.0).to(tl.float32)
                if DROPOUT:
                    of_u = _drop(of_u, seed, rows, 0, threshold, inverse, BLOCK_R, BLOCK_W)
                    da = _drop(da, seed, rows, 1, threshold, inverse, BLOCK_R, BLOCK_W)
                du += of_u
            du_ptrs = du_ptr + rows[:, None] * du_stride + cols[None, :]
            tl.store(du_ptrs, du.to(du_ptr.dtype.element_ty), mask=inside)
        dn = dh
        if weight_ptr is not None:
            dn *= tl.load(weight_ptr + cols, mask=in_width, other=0.0).to(tl.float32)[None, :]
            weight_sums += tl.sum(dh * normed, 0)
        if bias_ptr is not None:
            bias_sums += tl.sum(dh, 0)
        level = tl.sum(dn, 1) / WIDTH
        slope = tl.sum(dn * normed, 1) / WIDTH
        da += rstd[:, None] * (dn - level[:, None] - normed * slope[:, None])
        if residual_ptr is not None:
            da += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(da_ptr + at, da.to(da_ptr.dtype.element_ty), mask=inside)
    line = program.to(tl.int64) * WIDTH + cols
    if weight_ptr is not None:
        tl.store(dweight_ptr + line, weight_sums, mask=in_width)
    if bias_ptr is not None:
        tl.store(dbias_ptr + line, bias_sums, mask=in_width)
