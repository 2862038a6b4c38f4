"""What a training step keeps in memory: every tensor stored for the backward, and the peak, for each choice.

``u`` is one matrix ``[rows, width]`` in bfloat16. Peaks are counted as in ``run``: beyond what is allocated before the
step, which is inputs, weights and the optimizer's moments; so gradients of the weights, their copies in bfloat16, the
output and what is stored are in it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.layer.models import Batch, Case, Ours
from benchmarks.timing import Spread, peak_mebibytes, time_calls
from hstu_plugin.config import Recompute


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend and what its layers rebuild."""

    backend: str
    recompute: tuple[Recompute, ...]

    @property
    def name(self) -> str:
        """``triton: uvqk, gated_output``."""
        return f"{self.backend}: {', '.join(self.recompute) or 'nothing'}"

    def model(self, case: Case) -> nn.Module:
        """The encoder of ``case``."""
        return Ours(replace(case, config=replace(case.config, recompute=self.recompute)), self.backend)


def choices(backend: str) -> Iterator[Choice]:
    """Every combination of flags, the fewest first."""
    for count in range(len(Recompute) + 1):
        for chosen in itertools.combinations(Recompute, count):
            yield Choice(backend, chosen)


@dataclass(frozen=True, slots=True)
class Stored:
    """Tensors that autograd keeps, by shape and dtype: how many storages, and their bytes together."""

    shape: tuple[int, ...]
    dtype: str
    count: int
    nbytes: int


def stored_tensors(model: nn.Module, batch: Batch) -> list[Stored]:
    """Of one forward under autocast; parameters left out, each storage once, in the shape of its first reader."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()} | {batch.x.untyped_storage().data_ptr()}
    found: dict[int, tuple[tuple[int, ...], str, int]] = {}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and storage.data_ptr() not in found:
            found[storage.data_ptr()] = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), storage.nbytes()
            held.append(tensor)
        return tensor

    saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with saved, torch.autocast(batch.x.device.type, torch.bfloat16):
        out = model(batch)
    assert out.requires_grad
    kinds, sizes = Counter[tuple[tuple[int, ...], str]](), Counter[tuple[tuple[int, ...], str]]()
    for shape, dtype, nbytes in found.values():
        kinds[shape, dtype] += 1
        sizes[shape, dtype] += nbytes
    return sorted((Stored(*kind, kinds[kind], size) for kind, size in sizes.items()), key=lambda s: -s.nbytes)


def training_step(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """Forward, backward and a fused AdamW step, the same optimizer at each call."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        backward(model, batch, autocast=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def step_of(model: nn.Module, batch: Batch, seconds: float) -> tuple[float | None, Spread]:
    """Peak of a step in MiB, where the device counts it, and its time; the step of ``run``."""
    device = batch.x.device
    step = training_step(model, batch)
    # Moments exist from the first step on.
    step()
    return peak_mebibytes(step, device), time_calls([step], device, seconds=seconds)


def backward(model: nn.Module, batch: Batch, *, autocast: bool) -> None:
    """Forward and backward."""
    with torch.autocast(batch.x.device.type, torch.bfloat16, enabled=autocast):
        out = model(batch)
    out.float().backward(batch.grad)
