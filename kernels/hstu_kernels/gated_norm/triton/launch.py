"""From tensors to launches; the signatures are those of `hstu_kernels.gated_norm.reference`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hstu_kernels.dropout import drop_threshold
from hstu_kernels.gated_norm.triton.kernels import gate_bwd_kernel, gate_fwd_kernel
from hstu_kernels.triton.launcher import Variant

# Elements of a tile: a row of 512 columns shares a program with three others.
_TILE = 2048
# Programs of a backward: lines of partial sums, a few for each multiprocessor of a large chip.
_MOST_PROGRAMS = 512


def gate_forward(
    a: Tensor,
    u: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    *,
    eps: float,
    dropout: float,
    concat: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    rows, width = a.shape
    a, u = _dense_columns(a), None if u is None else _dense_columns(u)
    out = torch.empty(rows, width * (3 if concat else 1), dtype=dtype, device=a.device)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=a.device) for _ in range(2))
    block_r, _, _ = tile(width)
    if rows:
        numbers = (rows, a.stride(0), 0 if u is None else u.stride(0), eps, drop_threshold(dropout), 1 / (1 - dropout))
        kernel = _variant(True, width, concat, dropout > 0)
        kernel(-(-rows // block_r), (a, u, weight, bias, seed, out, mean, rstd), numbers)
    return out, mean, rstd


def gate_backward(
    grad: Tensor,
    a: Tensor,
    u: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    *,
    dropout: float,
    concat: bool,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    du: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As the reference; partial sums of the parameters in float32."""
    rows, width = a.shape
    a, u, grad = _dense_columns(a), None if u is None else _dense_columns(u), grad.contiguous()
    block_r, _, _ = tile(width)
    programs = max(1, min(_MOST_PROGRAMS, -(-rows // block_r)))
    da = torch.empty(rows, width, dtype=dtype or a.dtype, device=a.device)
    if u is not None and du is None:
        du = torch.empty(rows, width, dtype=u.dtype, device=u.device)
    if residual is not None:
        residual = residual.contiguous()
    sums = [
        None if parameter is None else torch.empty(programs, width, dtype=torch.float32, device=a.device)
        for parameter in (weight, bias)
    ]
    strides = (a.stride(0), 0 if u is None else u.stride(0), 0 if du is None else du.stride(0))
    kernel = _variant(False, width, concat, dropout > 0)
    inputs = (grad, a, u, weight, bias, mean, rstd, seed, residual)
    kernel(programs, (*inputs, da, du, *sums), (rows, *strides, drop_threshold(dropout), 1 / (1 - dropout)))
    dweight, dbias = (
        None if total is None or parameter is None else total.sum(0).to(parameter.dtype)
        for total, parameter in zip(sums, (weight, bias), strict=True)
    )
    return da, du, dweight, dbias


@functools.lru_cache(maxsize=256)
def _variant(forward: bool, width: int, concat: bool, dropout: bool) -> Variant:
    block_r, block_w, warps = tile(width)
    return Variant(
        gate_fwd_kernel if forward else gate_bwd_kernel,
        WIDTH=width,
        BLOCK_R=block_r,
        BLOCK_W=block_w,
        CONCAT=concat,
        DROPOUT=dropout,
        num_warps=warps,
    )


@functools.lru_cache(maxsize=256)
def tile(width: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps."""
    block_w = max(16, 1 << (width - 1).bit_length())
    return max(1, _TILE // block_w), block_w, 4 if block_w <= 2048 else 8


def _dense_columns(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
