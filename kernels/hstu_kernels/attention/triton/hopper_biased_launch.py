"""When the forward with a relative bias takes the kernel that is for Hopper alone, and its launch."""

from __future__ import annotations

import functools

from torch import Tensor

from hstu_kernels.attention.triton.arguments import Tables
from hstu_kernels.attention.triton.hopper_launch import PairLaunch, serves
from hstu_kernels.attention.triton.schedule import TritonPlan
from hstu_kernels.triton.launcher import Variant

WIDTH = 128
BLOCK_N = 64
STAGES = 3
# Rows of a longest sequence from which on it wins; measured on an H100 (docs/performance-notes.md).
LEAST = 2048


def hopper_biased(
    q: Tensor, k: Tensor, v: Tensor, tables: Tables, plan: TritonPlan, alpha: float, scale: float
) -> HopperBiased | None:
    """The launch for calls like this one, which have a bias; ``None`` where the other kernel runs: with times, too.

    Depends on what the host knows. Which kernel runs changes no bit (tested on CUDA).
    """
    pos, time = tables
    if pos is None or time is not None or plan.layout.max_seq_len < LEAST or q.shape[2] != WIDTH:
        return None
    return HopperBiased(q, pos, plan, alpha, scale) if serves(q, k, v, plan) else None


class HopperBiased(PairLaunch):
    """The forward of one kind of calls on one plan.

    Args:
        pos: the table of positions of such a call, as `calls.divide` leaves it. stages: slots of the rings.
        Others: as of `PairLaunch`.
    """

    def __init__(
        self,
        q: Tensor,
        pos: Tensor,
        plan: TritonPlan,
        alpha: float,
        scale: float,
        programs: int | None = None,
        stages: int = STAGES,
    ) -> None:
        kernel = _variant(q.shape[1], (pos.numel() - 1) // 2, stages)
        super().__init__(kernel, q, plan, BLOCK_N, alpha, scale, programs)

    def launch(self, inputs: tuple[Tensor, ...], pos: Tensor, out: Tensor, *, direct: bool) -> bool:
        """Write ``out``; ``False`` where the copy engine cannot fetch the inputs.

        ``direct``: the inputs lie at multiples of 16 bytes on the current device.
        """
        ready = self._ready
        if ready is not None and direct and not ready.watched():
            place = out.data_ptr()
            ready([place, self._work.data_ptr(), pos.data_ptr(), *(x.data_ptr() for x in inputs), place])
            return True
        return self.first(inputs, (pos,), out, keep=direct)


@functools.lru_cache(maxsize=64)
def _variant(heads: int, reach: int, stages: int) -> Variant:
    from hstu_kernels.attention.triton.hopper_biased import hopper_biased_kernel

    return Variant(hopper_biased_kernel, HEADS=heads, D=WIDTH, STAGES=stages, REACH=reach, num_warps=4)
