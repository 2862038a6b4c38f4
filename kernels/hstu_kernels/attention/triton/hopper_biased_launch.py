"""When the forward with a relative bias takes the kernel that is for Hopper alone, and its launch."""

from __future__ import annotations

import functools

from torch import Tensor

from hstu_kernels.attention.triton.arguments import Tables, panels, same_bits
from hstu_kernels.attention.triton.hopper_launch import (
    GROUP_ROWS,
    MOST_COLUMNS,
    available,
    described,
    fills,
    multiprocessors,
)
from hstu_kernels.attention.triton.schedule import TritonPlan
from hstu_kernels.mask import AttentionMask
from hstu_kernels.triton.launcher import Argument, Ready, Variant

WIDTH = 128
BLOCK_N = 64
STAGES = 3
# Rows of a longest sequence from which on it wins: with positions alone, and with times. Measured on an H100
# (docs/performance-notes.md), and nothing shorter.
LEAST = 4096
LEAST_WITH_TIMES = 16384


def hopper_biased(
    q: Tensor, k: Tensor, v: Tensor, tables: Tables, plan: TritonPlan, alpha: float, scale: float
) -> HopperBiased | None:
    """The launch for calls like this one, which have a bias; ``None`` where the other kernel is to run.

    Depends on what the host knows. Which kernel runs changes no bit (tested on CUDA).
    """
    layout = plan.layout
    least = LEAST if tables[1] is None else LEAST_WITH_TIMES
    if layout.max_seq_len < least or q.shape[2] != WIDTH or v.shape[2] != WIDTH:
        return None
    if plan.ends is None:
        # A plan put together from an operator's work lists has no list for this kernel, and no bound on the lengths.
        return None
    if plan.mask != AttentionMask() or layout.num_targets is not None or layout.contextual_seq_len:
        return None
    if q.dtype.itemsize != 2 or not q.is_cuda or not same_bits(q.get_device()) or not available():
        return None
    if any(x.shape[1] * x.stride(1) >= MOST_COLUMNS for x in (q, k, v)):
        return None
    if not fills(plan, q):
        return None
    return HopperBiased(q, tables, plan, alpha, scale)


class HopperBiased:
    """The forward of one kind of calls on one plan.

    Args:
        q: of such a call. tables: of such a call, as `calls.divide` leaves them. alpha, scale: numbers of it.
        programs: that stay and share the tiles; ``None``: one for each multiprocessor. stages: slots of the rings.
    """

    def __init__(
        self,
        q: Tensor,
        tables: Tables,
        plan: TritonPlan,
        alpha: float,
        scale: float,
        programs: int | None = None,
        stages: int = STAGES,
    ) -> None:
        self._alpha, self._scale = alpha, scale
        self._work = plan.pair_work()
        self._items = self._work.shape[0] * q.shape[1]
        self._programs = programs or min(self._items, multiprocessors(q.get_device()))
        pos, time = tables
        # A table of times without thresholds has one entry: no time is read.
        spans = (plan.block_spans("query", GROUP_ROWS), plan.block_spans("key", BLOCK_N))
        self._owned = (plan.boundaries, plan.row_times, plan.key_times, *spans)
        self._fixed = [None if x is None else x.data_ptr() for x in self._owned]
        reach = -1 if pos is None else (pos.numel() - 1) // 2
        self._kernel = _variant(q.shape[1], reach, -1 if time is None else time.numel() - 1, stages)
        self._ready: Ready | None = None

    def launch(self, inputs: tuple[Tensor, ...], tables: Tables, out: Tensor, *, direct: bool) -> bool:
        """Write ``out``; ``False`` where the copy engine cannot fetch the inputs.

        ``direct``: the inputs lie at multiples of 16 bytes on the current device.
        """
        ready = self._ready
        if ready is not None and direct and not ready.watched():
            place = out.data_ptr()
            addresses: list[int | None] = [place, self._work.data_ptr()]
            addresses += [None if x is None else x.data_ptr() for x in tables]
            addresses += self._fixed
            ready([*addresses, *(x.data_ptr() for x in inputs), place])
            return True
        fetched = []
        for x in (*inputs, out):
            plain = panels((x,), GROUP_ROWS)
            if plain is None:
                return False
            fetched.append(described(plain[0], GROUP_ROWS, x))
        arrays: tuple[Argument, ...] = (out, self._work, *tables, *self._owned, *fetched)
        numbers = (self._items, *(x.stride(1) for x in inputs), self._alpha, self._scale)
        self._kernel(self._programs, arrays, numbers)
        if direct:
            self._ready = self._kernel.ready(self._programs, arrays, numbers)
        return True


@functools.lru_cache(maxsize=64)
def _variant(heads: int, reach: int, buckets: int, stages: int) -> Variant:
    from hstu_kernels.attention.triton.hopper_biased import hopper_biased_kernel

    sizes = {"HEADS": heads, "D": WIDTH, "STAGES": stages, "REACH": reach, "BUCKETS": buckets}
    return Variant(hopper_biased_kernel, **sizes, num_warps=4)
