"""The two passes as operators of the dispatcher, for compilers; and the choice of who runs them. Imports no Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hstu_kernels.backend import Backend
from hstu_kernels.gated_norm import reference
from hstu_kernels.gated_norm.reference import Gradients

_INPUTS = "Tensor a, Tensor? u, Tensor? weight, Tensor? bias"


def run_forward(
    backend: Backend,
    a: Tensor,
    u: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    *,
    eps: float,
    dropout: float = 0.0,
    concat: bool = False,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and rstd; arguments as `reference.gate_forward`."""
    if backend is not Backend.TRITON:
        options: dict[str, Any] = {"eps": eps, "dropout": dropout, "concat": concat, "dtype": dtype}
        return reference.gate_forward(a, u, weight, bias, seed, **options)
    # A compiler sees an operator; a plain call saves the way through the dispatcher.
    call = gate_forward if torch.compiler.is_compiling() else _forward
    out, mean, rstd = call(a, u, weight, bias, seed, eps, dropout, concat, dtype)
    return out, mean, rstd


def run_backward(
    backend: Backend,
    grad: Tensor,
    a: Tensor,
    u: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    *,
    dropout: float = 0.0,
    concat: bool = False,
) -> Gradients:
    """Gradients of ``a``, ``u``, ``weight`` and ``bias``; arguments as `reference.gate_backward`."""
    if backend is not Backend.TRITON:
        options: dict[str, Any] = {"dropout": dropout, "concat": concat}
        return reference.gate_backward(grad, a, u, weight, bias, mean, rstd, seed, **options)
    call = gate_backward if torch.compiler.is_compiling() else _backward
    found = call(grad, a, u, weight, bias, mean, rstd, seed, dropout, concat)
    da, *others = found
    du, dweight, dbias = (g if x is not None else None for g, x in zip(others, (u, weight, bias), strict=True))
    return da, du, dweight, dbias


def _forward(
    a: Tensor,
    u: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout: float,
    concat: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    from hstu_kernels.gated_norm.triton import launch

    return launch.gate_forward(a, u, weight, bias, seed, eps=eps, dropout=dropout, concat=concat, dtype=dtype)


def _backward(
    grad: Tensor,
    a: Tensor,
    u: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout: float,
    concat: bool,
) -> tuple[Tensor, ...]:
    from hstu_kernels.gated_norm.triton import launch

    found = launch.gate_backward(grad, a, u, weight, bias, mean, rstd, seed, dropout=dropout, concat=concat)
    # An operator has to return tensors.
    return tuple(a.new_empty(0) if gradient is None else gradient for gradient in found)


gate_forward = torch.library.custom_op(
    "hstu_kernels::gate_forward",
    _forward,
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? seed, float eps, float dropout, bool concat, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
)
gate_backward = torch.library.custom_op(
    "hstu_kernels::gate_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}, Tensor mean, Tensor rstd, Tensor? seed, float dropout, bool concat)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


@gate_forward.register_fake
def _(
    a: Tensor, u: Any, weight: Any, bias: Any, seed: Any, eps: float, dropout: float, concat: bool, dtype: Any
) -> Any:
    rows, width = a.shape
    statistic = a.new_empty(rows, dtype=torch.float32)
    return a.new_empty(rows, width * (3 if concat else 1), dtype=dtype), statistic, torch.empty_like(statistic)


@gate_backward.register_fake
def _(grad: Tensor, a: Tensor, *others: Any) -> Any:
    return tuple(a.new_empty(0) if x is None else x.new_empty(x.shape) for x in (a, *others[:3]))
