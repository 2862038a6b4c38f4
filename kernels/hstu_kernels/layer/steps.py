"""The steps of a layer around its attention, each on the backend of the call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hstu_kernels.backend import Backend
from hstu_kernels.gated_norm import reference as gate_reference
from hstu_kernels.gated_norm.ops import run_forward
from hstu_kernels.projection import reference as silu_reference
from hstu_kernels.projection.ops import run_silu

if TYPE_CHECKING:
    from hstu_kernels.layer.api import LayerOptions
    from hstu_kernels.layer.passes import Spec

Statistics = tuple[Tensor, Tensor, Tensor]


def parts(wide: Tensor, options: LayerOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``[L, C]`` as ``u [L, H * Dv]`` and ``q, k [L, H, Dqk]``, ``v [L, H, Dv]``, all views."""
    heads, qk, uv = options.heads, options.attention_dim, options.linear_dim
    u, v, q, k = torch.split(wide, [heads * uv, heads * uv, heads * qk, heads * qk], dim=1)
    rows = wide.shape[0]
    return u, q.view(rows, heads, qk), k.view(rows, heads, qk), v.view(rows, heads, uv)


def norm(spec: Spec, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Statistics:
    """Normed rows, mean, rstd."""
    return run_forward(spec.backend, x, None, weight, bias, None, eps=spec.options.eps, dtype=spec.dtype)


def norm_backward(
    spec: Spec,
    grad: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    residual: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the input, plus ``residual``, and of the parameters; without ``mean`` ``rows`` are normed."""
    call: Any = gate_reference.gate_backward
    if spec.backend is Backend.TRITON:
        from hstu_kernels.gated_norm.triton import launch

        call = launch.gate_backward
    options = {"dropout": 0.0, "concat": False, "residual": residual, "dtype": dtype}
    dx, _, dweight, dbias = call(grad, rows, None, weight, bias, mean, rstd, None, **options)
    return dx, dweight, dbias


def gate(
    spec: Spec, attended: Tensor, u: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None
) -> Statistics:
    """``dropout(norm(attended) * u)`` or its form with three parts, mean, rstd."""
    options = spec.options
    of_gate: dict[str, Any] = {"eps": options.eps, "dropout": options.dropout, "concat": options.concat}
    return run_forward(spec.backend, attended.flatten(1), u, weight, bias, seed, **of_gate, dtype=spec.dtype)


def gate_backward(
    spec: Spec,
    grad: Tensor,
    attended: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    du: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of ``attended``, in its shape, and of the norm's parameters; that of ``u`` goes to ``du``."""
    call: Any = gate_reference.gate_backward
    if spec.backend is Backend.TRITON:
        from hstu_kernels.gated_norm.triton import launch

        call = launch.gate_backward
    options = {"dropout": spec.options.dropout, "concat": spec.options.concat, "du": du}
    found = call(grad, attended.flatten(1), u, weight, bias, mean, rstd, seed, **options)
    return found[0].view(attended.shape), found[2], found[3]


def project(
    spec: Spec, normed: Tensor, weight: Tensor, bias: Tensor | None, *, keep_mixed: bool
) -> tuple[Tensor | None, Tensor]:
    """``normed @ weight.T + bias``, given back where it is kept, and SiLU of its activated columns."""
    activated = spec.options.activated
    if spec.backend is Backend.TRITON:
        from hstu_kernels.projection.triton import product_launch

        if product_launch.serves(normed, weight):
            return product_launch.linear_silu(normed, weight, bias, activated, keep_mixed=keep_mixed)
    mixed = F.linear(normed, weight, bias)
    return mixed if keep_mixed else None, run_silu(spec.backend, mixed, activated)


def output(spec: Spec, x: Tensor, gated: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x + gated @ weight.T + bias``."""
    if spec.backend is Backend.TRITON:
        from hstu_kernels.projection.triton import product_launch

        if product_launch.serves(gated, weight):
            return product_launch.linear_sum(x, gated, weight, bias)
    return x + F.linear(gated, weight, bias)


def narrow(spec: Spec, grad: Tensor, *, summed: bool) -> tuple[Tensor, Tensor | None]:
    """``grad`` in the precision of the products, and its column sums where they are asked for."""
    if spec.backend is Backend.TRITON and summed and grad.dtype != torch.float64:
        from hstu_kernels.layer.triton import launch

        return launch.narrow(grad, spec.dtype)
    rounded = grad.to(spec.dtype)
    return rounded, column_sums(rounded) if summed else None


def silu_backward(spec: Spec, grad: Tensor, mixed: Tensor) -> Tensor:
    """Gradient of ``mixed``; takes the memory of ``grad``."""
    call: Any = silu_reference.silu_backward
    if spec.backend is Backend.TRITON:
        from hstu_kernels.projection.triton import launch

        call = launch.silu_backward
    out: Tensor = call(grad, mixed, spec.options.activated, in_place=True)
    return out


def column_sums(x: Tensor) -> Tensor:
    """``[C]``, summed in float32 at least."""
    return x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
