"""When the forward with a relative bias takes the kernel that is for Hopper alone, and its launch."""

from __future__ import annotations

import functools

from torch import Tensor

from hstu_kernels.attention.triton.arguments import Tables
from hstu_kernels.attention.triton.hopper_launch import GROUP_ROWS, PairLaunch, serves
from hstu_kernels.attention.triton.schedule import TritonPlan
from hstu_kernels.triton.launcher import Variant

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
    least = LEAST if tables[1] is None else LEAST_WITH_TIMES
    if plan.layout.max_seq_len < least or q.shape[2] != WIDTH or not serves(q, k, v, plan):
        return None
    return HopperBiased(q, tables, plan, alpha, scale)


class HopperBiased(PairLaunch):
    """The forward of one kind of calls on one plan.

    Args:
        tables: of such a call, as `calls.divide` leaves them. stages: slots of the rings. Others: as of `PairLaunch`.
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
        pos, time = tables
        reach = -1 if pos is None else (pos.numel() - 1) // 2
        kernel = _variant(q.shape[1], reach, -1 if time is None else time.numel() - 1, stages)
        super().__init__(kernel, q, plan, BLOCK_N, alpha, scale, programs)
        # A table of times without thresholds has one entry: no time is read.
        spans = (plan.block_spans("query", GROUP_ROWS), plan.block_spans("key", BLOCK_N))
        self._owned = (plan.boundaries, plan.row_times, plan.key_times, *spans)
        self._fixed = [None if x is None else x.data_ptr() for x in self._owned]

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
        return self.first(inputs, (*tables, *self._owned), out, keep=direct)


@functools.lru_cache(maxsize=64)
def _variant(heads: int, reach: int, buckets: int, stages: int) -> Variant:
    from hstu_kernels.attention.triton.hopper_biased import hopper_biased_kernel

    sizes = {"HEADS": heads, "D": WIDTH, "STAGES": stages, "REACH": reach, "BUCKETS": buckets}
    return Variant(hopper_biased_kernel, **sizes, num_warps=4)
