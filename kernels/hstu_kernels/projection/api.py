"""Validate, resolve, call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hstu_kernels.backend import Backend
from hstu_kernels.dispatch import choose_backend
from hstu_kernels.gated_norm.api import check_norm
from hstu_kernels.gated_norm.ops import run_backward, run_forward
from hstu_kernels.gradients import needs_gradient, without_autocast
from hstu_kernels.projection.ops import run_silu, run_silu_backward


def norm_linear_silu(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    activated: int | None = None,
    store_normed: bool = True,
    store_mixed: bool = True,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """``silu(norm(x) @ weight.T + bias)``: the projection of a layer to U, V, Q and K (HSTU, equation 1).

    Args:
        x: ``[L, D]``.
        norm_weight, norm_bias: ``[D]`` of the norm, or ``None``.
        weight: ``[C, D]``. bias: ``[C]`` or ``None``.
        activated: leading columns that get SiLU; the others pass. Default: all.
        store_normed: keep the normed rows for the gradient of ``weight``; otherwise the backward makes them again from
            ``x`` and two numbers for each row.
        store_mixed: keep the projection before SiLU; otherwise the backward runs the product again.
        backend: of the norm and SiLU; the product is PyTorch's.

    Returns:
        ``[L, C]`` in the dtype of ``weight``; under autocast in autocast's.

    Raises:
        TypeError, ValueError: inputs do not fit together; the message names the argument.
        UnsupportedBackend: an explicit backend cannot serve the call.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x: expected [L, D] of a floating-point dtype, got {tuple(x.shape)} {x.dtype}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: expected [C, {x.shape[1]}], got {tuple(weight.shape)}")
    if weight.device != x.device:
        raise TypeError(f"weight: expected a tensor on {x.device} as x, got one on {weight.device}")
    check_norm(x, norm_weight, norm_bias)
    columns = weight.shape[0]
    activated = columns if activated is None else activated
    if not 0 <= activated <= columns:
        raise ValueError(f"activated: expected a number in [0, {columns}], got {activated}")
    resolved = choose_backend(backend, x.device, x.dtype)
    if resolved is Backend.TRITON and not needs_gradient(x, norm_weight, norm_bias, weight, bias):
        normed = run_forward(resolved, x, None, norm_weight, norm_bias, None, eps=eps, dtype=weight.dtype)[0]
        with without_autocast(x.device.type):
            mixed = F.linear(normed, weight, bias)
        return run_silu(resolved, mixed, activated)
    options = (eps, activated, store_normed, store_mixed, resolved)
    out: Tensor = _NormLinearSilu.apply(x, norm_weight, norm_bias, weight, bias, *options)  # type: ignore[no-untyped-call]
    return out


class _NormLinearSilu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        activated: int,
        store_normed: bool,
        store_mixed: bool,
        backend: Backend,
    ) -> Tensor:
        ctx.eps, ctx.activated, ctx.backend = eps, activated, backend
        normed, mean, rstd = run_forward(backend, x, None, norm_weight, norm_bias, None, eps=eps, dtype=weight.dtype)
        with without_autocast(x.device.type):
            mixed = F.linear(normed, weight, bias)
        out = run_silu(backend, mixed, activated)
        kept = (normed if store_normed else None, mixed if store_mixed else None)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias, mean, rstd, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight, bias, mean, rstd, normed, mixed = ctx.saved_tensors
        norm = (norm_weight, norm_bias)
        with without_autocast(x.device.type):
            if normed is None:
                normed = run_forward(ctx.backend, x, None, *norm, None, eps=ctx.eps, dtype=weight.dtype)[0]
            if mixed is None:
                mixed = F.linear(normed, weight, bias)
            dmixed = run_silu_backward(ctx.backend, grad, mixed, ctx.activated)
            del mixed
            dweight = dmixed.t() @ normed if ctx.needs_input_grad[3] else None
            del normed
            dnormed = dmixed @ weight
        dbias = None
        if bias is not None:
            dbias = dmixed.sum(0, dtype=torch.promote_types(dmixed.dtype, torch.float32)).to(bias.dtype)
        dx, _, dnorm_weight, dnorm_bias = run_backward(ctx.backend, dnormed, x, None, *norm, mean, rstd, None)
        return dx, dnorm_weight, dnorm_bias, dweight, dbias, *([None] * 5)
