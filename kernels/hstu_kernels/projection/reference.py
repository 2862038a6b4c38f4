"""SiLU of the first columns, and its gradient, in plain PyTorch. The norm's pieces are those of the gated norm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def silu_forward(mixed: Tensor, activated: int) -> Tensor:
    """``[L, C]``: SiLU of the first ``activated`` columns, the others as they are."""
    if activated == mixed.shape[1]:
        return F.silu(mixed)
    return torch.cat([F.silu(mixed[:, :activated]), mixed[:, activated:]], 1)


def silu_backward(grad: Tensor, mixed: Tensor, activated: int, *, in_place: bool = False) -> Tensor:
    """Gradient of ``mixed``; ``in_place``: it may take the memory of ``grad``."""
    inner = torch.ops.aten.silu_backward(grad[:, :activated], mixed[:, :activated])
    return inner if activated == mixed.shape[1] else torch.cat([inner, grad[:, activated:]], 1)
