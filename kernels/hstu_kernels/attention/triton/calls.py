"""What calls of one kind on one plan share, and their launches: of a warm call only the addresses are new."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hstu_kernels.attention.triton.arguments import (
    Tables,
    addressable,
    facts_of,
    same_bits,
    shape_of,
)
from hstu_kernels.attention.triton.hopper_biased_launch import HopperBiased, hopper_biased
from hstu_kernels.attention.triton.hopper_launch import HopperForward, hopper_forward
from hstu_kernels.attention.triton.jobs import Job
from hstu_kernels.attention.triton.schedule import TritonPlan
from hstu_kernels.attention.triton.tiles import (
    LONG_BATCH,
    Tile,
    TileSet,
    float32_precision,
    length_class,
    padded_width,
    tile_set,
)
from hstu_kernels.triton.launcher import is_current

# Partial sums of a table that are added up in float32, before all groups in float64.
GROUP = 16
# Beneath it a logit's product is nothing beside any bias.
LEAST_ALPHA = 2.0**-100
# Kinds of calls that a plan remembers; beyond, it forgets them all.
_MOST_KINDS = 16
_ALIGNMENT = 16

_tile_set = functools.lru_cache(maxsize=64)(tile_set)
# q, k and v as a kernel can address them, and the strides of their rows and heads.
_Fitted = tuple[tuple[Tensor, Tensor, Tensor], tuple[int, ...]]


class Call:
    """Inputs of one call as the kernels take them.

    Args:
        divided: the tables from `divide`.
        tiles: other than those of the kind.
        grad: of the result, contiguous, in a backward. into: where the gradients of q, k and v go, as for
            `launch.triton_backward`.
    """

    __slots__ = ("_direct", "_kit", "_plan", "alpha", "heads", "inputs", "rows", "tables", "tiles", "vanishes")

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pos_table: Tensor | None,
        time_table: Tensor | None,
        plan: TritonPlan,
        alpha: float,
        scale: float,
        divided: Tables,
        tiles: TileSet | None = None,
        grad: Tensor | None = None,
        into: Sequence[Tensor] | None = None,
    ) -> None:
        grad_stride = 0 if into is None else into[0].stride(0)
        kind = (
            q.shape,
            q.stride(),
            k.stride(),
            v.shape,
            v.stride(),
            q.dtype,
            alpha,
            scale,
            grad_stride,
            None if pos_table is None else pos_table.numel(),
            None if time_table is None else time_table.numel(),
            float32_precision(q.shape[2], v.shape[2]) if q.dtype is torch.float32 else "",
        )
        kit = plan.kits.get(kind)
        if kit is None:
            if len(plan.kits) >= _MOST_KINDS:
                plan.kits.clear()
            kit = plan.kits[kind] = Kit(q, k, v, pos_table, time_table, plan, alpha, scale, grad_stride)
        self._plan, self._kit, self.tables = plan, kit, divided
        self.tiles = tiles or kit.tiles
        self.rows, self.heads, self.alpha, self.vanishes = kit.rows, kit.heads, kit.alpha, kit.vanishes
        self.inputs = (q, k, v) if kit.fits else _fit(q, k, v, kit.vanishes)[0]
        bits = 0 if grad is None else grad.data_ptr()
        for x in self.inputs if into is None else (*self.inputs, *into):
            bits |= x.data_ptr()
        self._direct = bits % _ALIGNMENT == 0 and is_current(kit.device)

    def time_sums(self, tile: Tile, heads: int) -> Tensor:
        """Zeros ``[lines, entries, warps]`` float32 for the programs of ``tile``: a line for each, a column a warp.

        ``lines`` is a multiple of GROUP. Where warps have no sums of their own there is one column, and ``entries`` is
        a power of two.
        """
        shape = shape_of(self._kit.facts, tile, False)
        entries, warps = (
            (shape.buckets + 1, shape.warps) if shape.sums_by_warp else (padded_width(shape.buckets + 1), 1)
        )
        lines = self._plan.query_work(tile.block_m, tile.block_n).shape[0] * heads if self.rows else 0
        lines = -(-lines // GROUP) * GROUP
        return torch.zeros(lines, entries, warps, dtype=torch.float32, device=self.inputs[0].device)

    def adds_by_warp(self, tile: Tile) -> bool:
        """Whether the warps of dq add to sums of their own, and so take every block."""
        return shape_of(self._kit.facts, tile, False).sums_by_warp

    def job(
        self, role: str, tile: Tile, entries: int = 0, positions: torch.dtype | None = None, early: bool = False
    ) -> Job:
        """The kernel of ``role`` for this kind of call.

        Args:
            entries: columns of the partial sums of the time table, 0 without. positions: dtype of those of the other.
            early: it may begin before the kernel ahead of it has ended, where the chip can do that.
        """
        key = (role, entries, positions, early)
        job: Job | None = self._kit.jobs.get(key)
        if job is None or job.tile is not tile:
            job = self._kit.jobs[key] = Job(self._plan, self._kit, role, tile, entries, early)
        return job

    def hopper(self, out: Tensor) -> bool:
        """Write the forward's result by the kernel that is for Hopper alone; ``False``: not a call for it."""
        kit = self._kit
        if not kit.may_be_hopper or self.tiles is not kit.tiles:
            return False
        if kit.hopper is None and kit.hopper_biased is None:
            # Not before a forward asks: it may have a list written, which calls of the backward alone do not read.
            if self.tables == (None, None):
                kit.hopper = hopper_forward(*self.inputs, self._plan, kit.alpha, kit.scale)
            else:
                kit.hopper_biased = hopper_biased(*self.inputs, self.tables, self._plan, kit.alpha, kit.scale)
            kit.may_be_hopper = kit.hopper is not None or kit.hopper_biased is not None
        pos = self.tables[0]
        if kit.hopper_biased is not None and pos is not None:
            return kit.hopper_biased.launch(self.inputs, pos, out, direct=self._direct)
        return kit.hopper is not None and kit.hopper.launch(self.inputs, out, direct=self._direct)

    def launch(
        self,
        job: Job,
        own: tuple[Tensor | None, ...],
        streamed: tuple[Tensor, ...] = (),
        sums: tuple[Tensor | None, ...] = (),
    ) -> None:
        """Launch one kernel.

        Args:
            own: the arrays between q, k, v and what streams: gradients that come in, results, sums of pieces.
            streamed: the arrays whose blocks the main loop fetches; none where the kernel has no descriptors.
            sums: partial sums of the tables.
        """
        ready = job.ready
        if ready is None or not self._direct or ready.watched():
            job.first(self.inputs, own, streamed, self.tables, sums, keep=self._direct)
            return
        fetched = streamed if job.described else (None,) * len(streamed)
        arrays = (*self.inputs, *own, *fetched, *self.tables)
        addresses = [None if x is None else x.data_ptr() for x in arrays]
        addresses += job.fixed
        addresses += [None if x is None else x.data_ptr() for x in sums]
        addresses.append(job.list_address)
        ready(addresses)


class Kit:
    """What the calls of one kind share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pos_table: Tensor | None,
        time_table: Tensor | None,
        plan: TritonPlan,
        alpha: float,
        scale: float,
        grad_stride: int,
    ) -> None:
        # Not the plan itself: it holds this, and a circle would keep its lists until somebody collects garbage.
        self.device, self.grad_stride = q.get_device(), grad_stride
        self.rows, self.heads, _ = q.shape
        self.vanishes = abs(alpha) < LEAST_ALPHA
        self.alpha = 1.0 if self.vanishes else float(alpha)
        fitted, strides = _fit(q, k, v, self.vanishes)
        self.fits = all(x is y for x, y in zip(fitted, (q, k, v), strict=True))
        self.scale = float(scale)
        self.numbers = (*strides, self.alpha, self.scale)
        self.tiles = _tiles_of(q, v, plan, biased=pos_table is not None or time_table is not None)
        self.facts = facts_of(q, v, plan.layout.contextual_seq_len, pos_table, time_table)
        self.jobs: dict[tuple[str, int, torch.dtype | None, bool], Job] = {}
        # Whether the forward may have a kernel of its own, and that kernel, once a forward asked.
        self.may_be_hopper = self.rows > 0
        self.hopper: HopperForward | None = None
        self.hopper_biased: HopperBiased | None = None


def divide(pos_table: Tensor | None, time_table: Tensor | None, alpha: float) -> Tables:
    """In float32, divided by alpha: the kernels multiply the whole logit by it.

    Where it is too small to divide by, `Call` takes rows of 0 and 1.0 for it, which give the same logits.
    """
    if pos_table is None and time_table is None:
        return None, None
    divisor = 1.0 if abs(alpha) < LEAST_ALPHA else alpha
    pos, time = (
        None if table is None else (table.detach().to(torch.float32) / divisor).contiguous()
        for table in (pos_table, time_table)
    )
    return pos, time


def _tiles_of(q: Tensor, v: Tensor, plan: TritonPlan, *, biased: bool) -> TileSet:
    longest = plan.layout.max_seq_len
    longest = length_class(longest) if longest >= LONG_BATCH and same_bits(q.get_device()) else 0
    windowed = plan.mask.max_attn_len > 0
    return _tile_set(q.shape[2], v.shape[2], q.dtype, biased=biased, windowed=windowed, longest=longest)


def _fit(q: Tensor, k: Tensor, v: Tensor, vanishes: bool) -> _Fitted:
    q, q_row, q_head = addressable(torch.zeros_like(q) if vanishes else q)
    k, k_row, k_head = addressable(k)
    v, v_row, v_head = addressable(v)
    return (q, k, v), (q_row, q_head, k_row, k_head, v_row, v_head)
