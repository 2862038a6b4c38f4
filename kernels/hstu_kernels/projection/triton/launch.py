"""From tensors to launches; the signatures are those of `hstu_kernels.projection.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu_kernels.projection.triton.kernels import silu_bwd_kernel, silu_fwd_kernel

BLOCK = 2048


def silu_forward(mixed: Tensor, activated: int) -> Tensor:
    """As the reference."""
    mixed = mixed.contiguous()
    out = torch.empty_like(mixed)
    if total := mixed.numel():
        columns = mixed.shape[1]
        silu_fwd_kernel[(-(-total // BLOCK),)](mixed, out, total, COLUMNS=columns, ACTIVATED=activated, BLOCK=BLOCK)
    return out


def silu_backward(grad: Tensor, mixed: Tensor, activated: int) -> Tensor:
    """As the reference."""
    grad, mixed = grad.contiguous(), mixed.contiguous()
    out = torch.empty_like(mixed)
    if total := mixed.numel():
        columns = mixed.shape[1]
        grid = (-(-total // BLOCK),)
        silu_bwd_kernel[grid](grad, mixed, out, total, COLUMNS=columns, ACTIVATED=activated, BLOCK=BLOCK)
    return out
