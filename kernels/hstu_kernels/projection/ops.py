"""SiLU of some columns as operators of the dispatcher, for compilers, and who runs it. Imports no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu_kernels.backend import Backend
from hstu_kernels.projection import reference


def run_silu(backend: Backend, mixed: Tensor, activated: int) -> Tensor:
    """As `reference.silu_forward`."""
    if backend is not Backend.TRITON:
        return reference.silu_forward(mixed, activated)
    call = column_silu if torch.compiler.is_compiling() else _forward
    out: Tensor = call(mixed, activated)
    return out


def run_silu_backward(backend: Backend, grad: Tensor, mixed: Tensor, activated: int) -> Tensor:
    """As `reference.silu_backward`."""
    if backend is not Backend.TRITON:
        return reference.silu_backward(grad, mixed, activated)
    call = column_silu_backward if torch.compiler.is_compiling() else _backward
    out: Tensor = call(grad, mixed, activated)
    return out


def _forward(mixed: Tensor, activated: int) -> Tensor:
    from hstu_kernels.projection.triton import launch

    return launch.silu_forward(mixed, activated)


def _backward(grad: Tensor, mixed: Tensor, activated: int) -> Tensor:
    from hstu_kernels.projection.triton import launch

    return launch.silu_backward(grad, mixed, activated)


column_silu = torch.library.custom_op(
    "hstu_kernels::column_silu", _forward, mutates_args=(), schema="(Tensor mixed, int activated) -> Tensor"
)
column_silu_backward = torch.library.custom_op(
    "hstu_kernels::column_silu_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor mixed, int activated) -> Tensor",
)


@column_silu.register_fake
def _(mixed: Tensor, activated: int) -> Tensor:
    return mixed.new_empty(mixed.shape)


@column_silu_backward.register_fake
def _(grad: Tensor, mixed: Tensor, activated: int) -> Tensor:
    return mixed.new_empty(mixed.shape)
