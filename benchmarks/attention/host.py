"""What the host pays for a backward of ours, and how much of that is autograd's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.attention.contenders import Bound
from benchmarks.timing import Call, host_medians, host_microseconds


class _Empty(torch.autograd.Function):
    """An operation that computes nothing: its backward allocates the gradients and returns them."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*leaves)
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(torch.empty_like(leaf) for leaf in ctx.saved_tensors)


def empty_microseconds(bound: Bound, device: torch.device, *, seconds: float) -> float:
    """Host time of a backward through `_Empty`, called as ours is."""
    return host_microseconds([_backward(bound, empty_output(bound))], device, seconds=seconds)


def added_microseconds(bound: Bound, device: torch.device, *, seconds: float) -> float:
    """What our backward takes more than that through `_Empty`: both take turns, medians.

    In the thread that calls: autograd's own thread has to wake up first, which differs by 50 us between two runs.
    """
    calls = [_backward(bound, bound.forward(*bound.inputs[0])), _backward(bound, empty_output(bound))]
    with torch.autograd.set_multithreading_enabled(False):
        ours, empty = host_medians(calls, device, seconds=seconds)
    return ours - empty


def empty_output(bound: Bound) -> Tensor:
    """What `_Empty` made of the inputs of ``bound``."""
    out: Tensor = _Empty.apply(bound.grads[0], *bound.inputs[0])  # type: ignore[no-untyped-call]
    return out


def _backward(bound: Bound, out: Tensor) -> Call:
    leaves, grad = bound.inputs[0], bound.grads[0]
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)
