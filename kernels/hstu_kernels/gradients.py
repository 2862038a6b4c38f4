"""Whether a call has to be recorded for a backward, and how one computes in its own precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_NOTHING = nullcontext()


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors; if not, going around it is cheaper."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """A context without autocast; where there is none, one that costs nothing."""
    if torch.is_autocast_enabled(device_type) or torch.compiler.is_compiling():
        return torch.autocast(device_type, enabled=False)
    return _NOTHING
