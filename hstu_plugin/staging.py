"""Many small tensors on their way to a device in one copy, from pinned memory that is used again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Vector loads of kernels, and every dtype, want such addresses.
_ALIGNMENT = 16
Kind = tuple[Sequence[int], torch.dtype]


class Staging:
    """Host memory from which one copy at a time goes out; it grows, and is written again when that has arrived.

    Args:
        device: to copy to; for a GPU the memory is pinned.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._total = 0
        self._kinds: Sequence[Kind] = ()
        self._busy: torch.cuda.Event | None = None

    def take(self, kinds: Sequence[Kind]) -> list[Tensor]:
        """Tensors of these shapes and dtypes in this memory, to be filled; waits for the last copy from it."""
        if self._busy is not None:
            self._busy.synchronize()
            self._busy = None
        self._kinds = kinds
        self._total = sum(_room(kind) for kind in kinds)
        if self._memory.numel() < self._total:
            # Half as much again: requests grow in small steps.
            size = self._total + self._total // 2
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        return _views(self._memory, kinds)

    def send(self, stream: torch.cuda.Stream | None) -> list[Tensor]:
        """The tensors of the last `take` on the device, all by one copy; on a GPU by ``stream``, which is current."""
        there = torch.empty(self._total, dtype=torch.uint8, device=self._device)
        there.copy_(self._memory[: self._total], non_blocking=True)
        if stream is not None:
            self._busy = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._busy.record(stream)
        return _views(there, self._kinds)


def _room(kind: Kind) -> int:
    shape, dtype = kind
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _views(memory: Tensor, kinds: Sequence[Kind]) -> list[Tensor]:
    found, begin = [], 0
    for kind in kinds:
        shape, dtype = kind
        end = begin + math.prod(shape) * dtype.itemsize
        found.append(memory[begin:end].view(dtype).view(tuple(shape)))
        begin += _room(kind)
    return found
