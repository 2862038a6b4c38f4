"""When the forward takes the kernel that is for Hopper alone, and its launch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from hstu_kernels.attention.triton.arguments import panels, same_bits
from hstu_kernels.attention.triton.schedule import PAIR_ROWS, TritonPlan, list_length
from hstu_kernels.mask import AttentionMask
from hstu_kernels.triton.launcher import Argument, Panel, Ready, Variant

# The Gluon interface may change with each Triton: only those for which the kernel was written and tested.
_TRITONS = ("3.6.",)
BLOCK_M = PAIR_ROWS // 2
GROUP_ROWS = 64
# Coordinates of the copy engine have 32 bits.
MOST_COLUMNS = 1 << 31


@dataclass(frozen=True, slots=True)
class HopperTile:
    """Keys of a block, slots of the rings, and the rows of a longest sequence from which on it wins."""

    block_n: int
    stages: int
    least: int


# By head width, the longest first; measured on an H100 (docs/performance-notes.md), nothing shorter was. They and the
# other kernel give the same bits (tested on CUDA).
TILES = {128: (HopperTile(128, 2, 8192), HopperTile(64, 3, 4096), HopperTile(64, 4, 512))}
# Pairs of tiles for each program, from which on it wins: the other kernel cuts a small batch finer.
LEAST_TURNS = 2


def hopper_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: TritonPlan, alpha: float, scale: float
) -> HopperForward | None:
    """The launch for calls like this one, which have no bias; ``None`` where the other kernel is to run.

    Depends on what the host knows. Which kernel runs changes no bit (tested on CUDA).
    """
    tile = next((t for t in TILES.get(q.shape[2], ()) if plan.layout.max_seq_len >= t.least), None)
    if tile is None or not serves(q, k, v, plan):
        return None
    return HopperForward(q, plan, tile, alpha, scale)


def serves(q: Tensor, k: Tensor, v: Tensor, plan: TritonPlan) -> bool:
    """Whether kernels over pairs of tiles take calls like this one, of a width and a length that are for them."""
    layout = plan.layout
    if v.shape[2] != q.shape[2]:
        return False
    if plan.ends is None:
        # A plan put together from an operator's work lists has no list for them, and no bound on the lengths.
        return False
    if plan.mask != AttentionMask() or layout.num_targets is not None or layout.contextual_seq_len:
        return False
    if q.dtype.itemsize != 2 or not q.is_cuda or not same_bits(q.get_device()) or not available():
        return False
    if any(x.shape[1] * x.stride(1) >= MOST_COLUMNS for x in (q, k, v)):
        return False
    # Programs that stay have enough pairs of tiles to share.
    pairs = list_length(plan.total_rows, layout.batch_size, PAIR_ROWS) * q.shape[1]
    return pairs >= LEAST_TURNS * multiprocessors(q.get_device())


@functools.lru_cache(maxsize=1)
def available() -> bool:
    """Whether this Triton has the interface that the kernel is written in."""
    if not triton.__version__.startswith(_TRITONS):
        return False
    try:
        import hstu_kernels.attention.triton.hopper_forward  # noqa: F401
    except ImportError:
        return False
    return True


class PairLaunch:
    """A kernel over a plan's pairs of tiles for one kind of calls: its first launch, and what later ones need.

    Args:
        kernel: takes ``out``, the list, what `first` is given besides, and descriptors of q, k, v and ``out``.
        q: of such a call. block_n: keys of a block. alpha, scale: numbers of the call.
        programs: that stay and share the tiles; ``None``: one for each multiprocessor.
    """

    def __init__(
        self,
        kernel: Variant,
        q: Tensor,
        plan: TritonPlan,
        block_n: int,
        alpha: float,
        scale: float,
        programs: int | None,
    ) -> None:
        self._kernel, self._block_n, self._alpha, self._scale = kernel, block_n, alpha, scale
        self._work = plan.pair_work()
        self._items = self._work.shape[0] * q.shape[1]
        self._programs = programs or min(self._items, multiprocessors(q.get_device()))
        self._ready: Ready | None = None

    def first(self, inputs: tuple[Tensor, ...], others: tuple[Tensor | None, ...], out: Tensor, *, keep: bool) -> bool:
        """Write ``out`` whatever its address and theirs; ``False`` where the copy engine cannot fetch the inputs.

        ``keep``: the launch, for calls of other addresses.
        """
        fetched = descriptors((*inputs, out), (GROUP_ROWS, self._block_n, self._block_n, GROUP_ROWS))
        if fetched is None:
            return False
        arrays: tuple[Argument, ...] = (out, self._work, *others, *fetched)
        numbers = (self._items, *(x.stride(1) for x in inputs), self._alpha, self._scale)
        self._kernel(self._programs, arrays, numbers)
        if keep:
            self._ready = self._kernel.ready(self._programs, arrays, numbers)
        return True


class HopperForward(PairLaunch):
    """The forward of one kind of calls on one plan; arguments as of `PairLaunch`."""

    def __init__(
        self, q: Tensor, plan: TritonPlan, tile: HopperTile, alpha: float, scale: float, programs: int | None = None
    ) -> None:
        kernel = _variant(q.shape[1], q.shape[2], tile.block_n, tile.stages)
        super().__init__(kernel, q, plan, tile.block_n, alpha, scale, programs)

    def launch(self, inputs: tuple[Tensor, ...], out: Tensor, *, direct: bool) -> bool:
        """Write ``out``; ``False`` where the copy engine cannot fetch the inputs.

        ``direct``: the inputs lie at multiples of 16 bytes on the current device.
        """
        ready = self._ready
        if ready is not None and direct and not ready.watched():
            q, k, v = inputs
            place = out.data_ptr()
            ready([place, self._work.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), place])
            return True
        return self.first(inputs, (), out, keep=direct)


def descriptors(arrays: Sequence[Tensor | None], heights: Sequence[int]) -> list[Panel | None] | None:
    """Panels of ``[L, H, D]`` arrays for blocks of so many rows each, with the layout of a block in shared memory.

    What is ``None`` stays it. ``None`` for all where the copy engine cannot fetch one of them.
    """
    found: list[Panel | None] = []
    for x, rows in zip(arrays, heights, strict=True):
        if x is None:
            found.append(None)
            continue
        plain = panels((x,), rows)
        if plain is None:
            return None
        (panel,) = plain
        layout = shared_layout(rows, x.shape[2], x.dtype)
        found.append(Panel(panel.base, panel.shape, panel.strides, panel.block_shape, layout))
    return found


@functools.lru_cache(maxsize=64)
def multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.lru_cache(maxsize=64)
def shared_layout(rows: int, width: int, dtype: torch.dtype) -> object:
    from triton.experimental.gluon import language as gl

    kind = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([rows, width], kind)


@functools.lru_cache(maxsize=64)
def _variant(heads: int, width: int, block_n: int, stages: int) -> Variant:
    from hstu_kernels.attention.triton.hopper_forward import hopper_fwd_kernel

    return Variant(hopper_fwd_kernel, HEADS=heads, D=width, BLOCK_N=block_n, STAGES=stages, num_warps=4)
