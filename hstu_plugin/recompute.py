"""Selective rematerialisation: tensors that autograd would store are rebuilt in the backward instead.

`Rebuilder` works through `torch.autograd.graph.saved_tensors_hooks`: a saved tensor that lies in a registered storage
is replaced by the recipe that makes it again. So an operation between two such tensors, the attention, keeps its own
backward and never runs its forward twice. `rerun` stores the inputs of a short stretch and runs all of it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Recipe = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Autocast:
    """The autocast state of the forward, for work that is done again in the backward, outside of it."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def current(cls, device_type: str) -> Autocast:
        return cls(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))

    def again(self) -> torch.autocast:
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)

    def cast(self, x: Tensor) -> Tensor:
        """``x`` as a product under autocast would take it. Cast openly, or autograd stores a copy that nobody knows."""
        return x.to(self.dtype) if self.enabled and x.is_floating_point() else x


@dataclass(frozen=True, slots=True)
class _Handle:
    """Where a dropped tensor lies in what a recipe makes."""

    key: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Rebuilder:
    """Recipes of one forward pass of one layer. Each recipe runs once in a backward, whoever needs its tensor."""

    def __init__(self) -> None:
        self._recipes: list[Recipe] = []
        # The tensors themselves, too: once freed, their address may be that of another tensor.
        self._open: dict[int, tuple[int, Tensor]] = {}
        self._made: dict[int, Tensor] = {}
        self._packed = self._unpacked = 0

    def drop(self, tensor: Tensor, recipe: Recipe) -> Recipe:
        """Register the storage of ``tensor``; ``recipe`` makes an equal tensor of the same geometry.

        Returns:
            the recipe, run at most once in a backward, as an ingredient of further recipes.
        """
        key = len(self._recipes)
        self._recipes.append(recipe)
        self._open[tensor.untyped_storage().data_ptr()] = (key, tensor)
        return lambda: self._make(key)

    def close(self, tensor: Tensor) -> None:
        """No operation reads ``tensor`` any more; its memory may go."""
        self._open.pop(tensor.untyped_storage().data_ptr(), None)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While active, autograd stores no registered tensor."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield
        self._open.clear()

    def _pack(self, tensor: Tensor) -> Tensor | _Handle:
        found = self._open.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        if found is None:
            return tensor
        self._packed += 1
        return _Handle(found[0], tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, packed: Tensor | _Handle) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        tensor = self._make(packed.key).as_strided(packed.size, packed.stride, packed.offset)
        self._unpacked += 1
        if self._unpacked == self._packed:
            # All readers of this backward have theirs; a second backward starts anew.
            self._made.clear()
            self._unpacked = 0
        return tensor

    def _make(self, key: int) -> Tensor:
        if key not in self._made:
            with torch.no_grad():
                self._made[key] = self._recipes[key]()
        return self._made[key]


def unchanged(tensor: Tensor) -> Recipe:
    """The tensor itself, cut off from its graph; refuses one that was written to in the meantime.

    Raises:
        RuntimeError: when used after an in-place change, as autograd does for what it stores itself.
    """
    kept, version = tensor.detach(), tensor._version

    def get() -> Tensor:
        if kept._version != version:
            raise RuntimeError(
                "recompute: a tensor that the backward needs was changed in place after the forward "
                f"(version {kept._version}, expected {version}); clone it before changing it"
            )
        return kept

    return get


class _Rerun(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], random: bool, *tensors: Tensor | None) -> Tensor:
        first = next(t for t in tensors if t is not None)
        ctx.function, ctx.device = function, first.device
        ctx.autocast = Autocast.current(first.device.type)
        ctx.random_state = _random_state(first.device) if random else None
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        ]
        replayed = _replayed(ctx.random_state, ctx.device) if ctx.random_state is not None else nullcontext()
        with torch.enable_grad(), ctx.autocast.again(), replayed:
            out = ctx.function(*inputs)
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        grads = iter(torch.autograd.grad(out, wanted, grad))
        found = (next(grads) if t is not None and t.requires_grad else None for t in inputs)
        return (None, None, *found)


def rerun(function: Callable[..., Tensor], *tensors: Tensor | None, random: bool) -> Tensor:
    """``function(*tensors)``, of which only ``tensors`` are stored; the backward runs it again.

    Args:
        function: reads no tensor that needs a gradient but its arguments.
        random: whether it draws random numbers; the second run then draws the same ones.
    """
    out: Tensor = _Rerun.apply(function, random, *tensors)  # type: ignore[no-untyped-call]
    return out


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _replayed(state: Tensor, device: torch.device) -> Iterator[None]:
    """Random numbers from ``state`` on inside, and as if nothing had been drawn outside."""
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        if on_cuda:
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield
