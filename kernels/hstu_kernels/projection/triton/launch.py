"""From tensors to launches; the signatures are those of `hstu_kernels.projection.reference`."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hstu_kernels.projection.triton.kernels import silu_bwd_kernel, silu_fwd_kernel
from hstu_kernels.triton.launcher import Variant

BLOCK = 2048


def silu_forward(mixed: Tensor, activated: int) -> Tensor:
    """As the reference."""
    mixed = mixed.contiguous()
    out = torch.empty_like(mixed)
    rows, columns = mixed.shape
    if total := rows * columns:
        _variant(True, columns, activated)(-(-total // BLOCK), (mixed, out), (rows,))
    return out


def silu_backward(grad: Tensor, mixed: Tensor, activated: int, *, in_place: bool = False) -> Tensor:
    """As the reference."""
    grad, mixed = grad.contiguous(), mixed.contiguous()
    out = grad if in_place else torch.empty_like(mixed)
    rows, columns = mixed.shape
    if total := rows * columns:
        _variant(False, columns, activated)(-(-total // BLOCK), (grad, mixed, out), (rows,))
    return out


@functools.lru_cache(maxsize=256)
def _variant(forward: bool, columns: int, activated: int) -> Variant:
    kernel = silu_fwd_kernel if forward else silu_bwd_kernel
    return Variant(kernel, COLUMNS=columns, ACTIVATED=activated, BLOCK=BLOCK)
