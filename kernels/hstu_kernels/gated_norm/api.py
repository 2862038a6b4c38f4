"""Validate, resolve, call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hstu_kernels.backend import Backend
from hstu_kernels.dispatch import choose_backend
from hstu_kernels.dropout import new_seed
from hstu_kernels.gated_norm.ops import run_backward, run_forward
from hstu_kernels.gradients import needs_gradient, without_autocast


def gated_norm(
    attended: Tensor,
    u: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    concat: bool = False,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """``dropout(norm(attended) * u)`` in one pass, or ``dropout(concat[u, attended, norm(attended) * u])``.

    Args:
        attended, u: ``[L, W]`` of one dtype. The norm is over ``W``.
        weight, bias: ``[W]`` of the norm, or ``None``.
        eps: of the norm.
        dropout: probability; 0 for none.
        seed: ``[1]`` int64 that decides which elements stay, the same ones on every backend; drawn if ``None``.
        concat: the production form with three parts.
        backend: as in `hstu_kernels.hstu_attention`.

    Returns:
        ``[L, W]``, or ``[L, 3 W]`` with ``concat``. Stored for the backward: the inputs and two numbers for each row.

    Raises:
        TypeError, ValueError: inputs do not fit together; the message names the argument.
        UnsupportedBackend: an explicit backend cannot serve the call.
    """
    seed, resolved = _prepare(attended, u, weight, bias, dropout, seed, backend)
    if resolved is Backend.TRITON and not needs_gradient(attended, u, weight, bias):
        options: dict[str, Any] = {"eps": eps, "dropout": dropout, "concat": concat, "dtype": attended.dtype}
        return run_forward(resolved, attended, u, weight, bias, seed, **options)[0]
    out: Tensor = _GatedNorm.apply(attended, u, weight, bias, seed, eps, dropout, concat, resolved)  # type: ignore[no-untyped-call]
    return out


def gated_linear(
    attended: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    eps: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    concat: bool = False,
    store_gated: bool = True,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """`gated_norm` and the output projection: ``gated @ out_weight.T + out_bias``.

    Args:
        out_weight: ``[D, W]``, or ``[D, 3 W]`` with ``concat``. out_bias: ``[D]`` or ``None``.
        store_gated: keep the gated rows for the gradient of ``out_weight``; otherwise the backward makes them again
            (``GATED_OUTPUT`` of ULTRA-HSTU's selective rematerialisation).

    Returns:
        ``[L, D]``. The other arguments and errors are those of `gated_norm`.
    """
    attended, u, out_weight, out_bias = _autocast(attended, u, out_weight, out_bias)
    seed, resolved = _prepare(attended, u, weight, bias, dropout, seed, backend)
    width = attended.shape[1] * (3 if concat else 1)
    if out_weight.dim() != 2 or out_weight.shape[1] != width:
        raise ValueError(f"out_weight: expected [D, {width}], got {tuple(out_weight.shape)}")
    if out_weight.dtype != attended.dtype:
        raise TypeError(f"out_weight: expected {attended.dtype} as attended, got {out_weight.dtype}")
    if resolved is Backend.TRITON and not needs_gradient(attended, u, weight, bias, out_weight, out_bias):
        of_gate: dict[str, Any] = {"eps": eps, "dropout": dropout, "concat": concat, "dtype": attended.dtype}
        gated = run_forward(resolved, attended, u, weight, bias, seed, **of_gate)[0]
        with without_autocast(attended.device.type):
            return F.linear(gated, out_weight, out_bias)
    options = (eps, dropout, concat, store_gated, resolved)
    out: Tensor = _GatedLinear.apply(attended, u, weight, bias, out_weight, out_bias, seed, *options)  # type: ignore[no-untyped-call]
    return out


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        u: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        eps: float,
        dropout: float,
        concat: bool,
        backend: Backend,
    ) -> Tensor:
        ctx.options = {"dropout": dropout, "concat": concat}
        ctx.backend = backend
        out, mean, rstd = run_forward(backend, a, u, weight, bias, seed, eps=eps, dtype=a.dtype, **ctx.options)
        ctx.save_for_backward(a, u, weight, bias, mean, rstd, seed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = run_backward(ctx.backend, grad, *ctx.saved_tensors, **ctx.options)
        return *gradients, None, None, None, None, None


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        u: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        out_weight: Tensor,
        out_bias: Tensor | None,
        seed: Tensor | None,
        eps: float,
        dropout: float,
        concat: bool,
        store_gated: bool,
        backend: Backend,
    ) -> Tensor:
        ctx.options = {"dropout": dropout, "concat": concat}
        ctx.eps, ctx.backend = eps, backend
        gated, mean, rstd = run_forward(backend, a, u, weight, bias, seed, eps=eps, dtype=a.dtype, **ctx.options)
        kept = gated if store_gated else None
        ctx.save_for_backward(a, u, weight, bias, mean, rstd, seed, out_weight, kept)
        ctx.bias_dtype = None if out_bias is None else out_bias.dtype
        with without_autocast(a.device.type):
            return F.linear(gated, out_weight, out_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, u, weight, bias, mean, rstd, seed, out_weight, gated = ctx.saved_tensors
        if gated is None:
            options = {"eps": ctx.eps, "dtype": a.dtype, **ctx.options}
            gated = run_forward(ctx.backend, a, u, weight, bias, seed, **options)[0]
        with without_autocast(a.device.type):
            dout_weight = grad.t() @ gated if ctx.needs_input_grad[4] else None
            del gated
            dgated = grad @ out_weight
        dout_bias = None
        if ctx.bias_dtype is not None:
            dout_bias = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.bias_dtype)
        gradients = run_backward(ctx.backend, dgated, a, u, weight, bias, mean, rstd, seed, **ctx.options)
        return *gradients, dout_weight, dout_bias, *([None] * 6)


def _prepare(
    a: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    backend: Backend | str,
) -> tuple[Tensor | None, Backend]:
    if a.dim() != 2 or not a.is_floating_point():
        raise ValueError(f"attended: expected [L, W] of a floating-point dtype, got {tuple(a.shape)} {a.dtype}")
    if u.shape != a.shape:
        raise ValueError(f"u: expected the shape of attended {tuple(a.shape)}, got {tuple(u.shape)}")
    if u.dtype != a.dtype or u.device != a.device:
        raise TypeError(f"u: expected {a.dtype} on {a.device} as attended, got {u.dtype} on {u.device}")
    check_norm(a, weight, bias)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
    if seed is not None and (seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != a.device):
        raise ValueError(f"seed: expected [1] int64 on {a.device}, got {tuple(seed.shape)} {seed.dtype} {seed.device}")
    if dropout == 0:
        seed = None
    elif seed is None:
        seed = new_seed(a.device)
    return seed, choose_backend(backend, a.device, a.dtype)


def check_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise unless the parameters of a norm over the columns of ``x`` fit."""
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and (parameter.shape != x.shape[1:] or parameter.device != x.device):
            raise ValueError(
                f"{name}: expected [{x.shape[1]}] on {x.device}, got {tuple(parameter.shape)} on {parameter.device}"
            )


def _autocast(
    a: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    if not torch.is_autocast_enabled(a.device.type) or a.dtype == torch.float64:
        return a, u, weight, bias
    dtype = torch.get_autocast_dtype(a.device.type)
    return a.to(dtype), u.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
