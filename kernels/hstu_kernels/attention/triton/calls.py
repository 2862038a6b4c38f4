"""What calls of one kind on one plan share, and their launches: of a warm call only the addresses are new."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hstu_kernels.attention.triton.arguments import (
    Facts,
    Tables,
    addressable,
    facts_of,
    in_pairs,
    launches_early,
    panels,
    same_bits,
    shape_of,
)
from hstu_kernels.attention.triton.backward_keys import hstu_bwd_dkdv_kernel
from hstu_kernels.attention.triton.backward_queries import hstu_bwd_dq_kernel
from hstu_kernels.attention.triton.bias_grad import hstu_bwd_bias_kernel
from hstu_kernels.attention.triton.forward import hstu_fwd_kernel
from hstu_kernels.attention.triton.hopper_biased_launch import HopperBiased, hopper_biased
from hstu_kernels.attention.triton.hopper_launch import HopperForward, hopper_forward
from hstu_kernels.attention.triton.join import hstu_join_kernel
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
from hstu_kernels.mask import AttentionMask
from hstu_kernels.triton.launcher import Argument, Ready, Variant, is_current

# Partial sums of the position table that programs share; more of them: fewer programs wait for one address.
POSITION_COPIES = 32
# Partial sums of a table that are added up in float32, before all groups in float64.
GROUP = 16
# Rows of a long tile that one program adds up.
_JOINED_ROWS = 16
# Beneath it a logit's product is nothing beside any bias.
LEAST_ALPHA = 2.0**-100
# Kinds of calls that a plan remembers; beyond, it forgets them all.
_MOST_KINDS = 16
_ALIGNMENT = 16

_KERNELS = {
    "forward": hstu_fwd_kernel,
    "dq": hstu_bwd_dq_kernel,
    "dkdv": hstu_bwd_dkdv_kernel,
    "bias": hstu_bwd_bias_kernel,
}
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
            kit = plan.kits[kind] = _Kit(q, k, v, pos_table, time_table, plan, alpha, scale, grad_stride)
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
        if kit.hopper_biased is not None:
            return kit.hopper_biased.launch(self.inputs, self.tables, out, direct=self._direct)
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


class _Kit:
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


class Job:
    """One kernel for the calls of a kind: its work list, the pieces of long tiles in it, and once compiled its launch.

    Attributes:
        tile, work: of the kernel.
        described: full blocks of what streams come through descriptors.
        fixed: addresses of what the plan owns. list_address: of ``work``.
    """

    def __init__(self, plan: TritonPlan, kit: _Kit, role: str, tile: Tile, entries: int, early: bool) -> None:
        self._heads, self._facts, self._grad_stride, self._mask = kit.heads, kit.facts, kit.grad_stride, plan.mask
        self._role, self._entries, self._early, self.tile = role, entries, early, tile
        of_keys = role == "dkdv"
        side, block = ("key", tile.block_n) if of_keys else ("query", tile.block_m)
        self.work = (plan.key_work if of_keys else plan.query_work)(tile.block_m, tile.block_n)
        self._long, self._pieces = plan.pieces(side, block)
        # The kernel of the bias leaves the factor ``scale`` to those who add up.
        self._numbers = kit.numbers[:-1] if role == "bias" else (*kit.numbers, self._pieces)
        self._programs = self.work.shape[0] * (1 if role == "bias" else kit.heads)
        self._own_rows, self._streamed_rows = (block, tile.block_m) if of_keys else (block, tile.block_n)
        spans = plan.block_spans("query" if of_keys else "key", self._streamed_rows)
        self._owned = (plan.boundaries, plan.row_times, plan.key_times, spans)
        self.fixed = [None if x is None else x.data_ptr() for x in self._owned]
        self.list_address = self.work.data_ptr()
        self.described = False
        self.ready: Ready | None = None

    def first(
        self,
        inputs: tuple[Tensor, ...],
        own: tuple[Tensor | None, ...],
        streamed: tuple[Tensor, ...],
        tables: Tables,
        sums: tuple[Tensor | None, ...],
        *,
        keep: bool,
    ) -> None:
        """Launch what has not been launched before; ``keep``: the next one may differ in its addresses alone."""
        described: Sequence[Argument] | None = panels(streamed, self._streamed_rows) if streamed else ()
        # The own side's operands: inputs, and the first of ``own`` where it is a gradient that comes in.
        tile = self.tile if in_pairs((*inputs, own[0])) else replace(self.tile, own_in_registers=0)
        options = (self._facts, self._mask, tile, bool(described), self._entries, self._grad_stride, self._early)
        kernel = _variant(self._role, *options)
        fetched = (None,) * len(streamed) if described is None else described
        arrays = (*inputs, *own, *fetched, *tables, *self._owned, *sums, self.work)
        kernel(self._programs, arrays, self._numbers)
        if keep:
            self.described = bool(described)
            self.ready = kernel.ready(self._programs, arrays, self._numbers)

    def sums(self, like: Tensor) -> Tensor | None:
        """``[pieces, H, rows, padded width of like]`` float32 for pieces of long tiles; ``None`` where none is cut."""
        if not self._pieces:
            return None
        shape = (self._pieces, self._heads, self._own_rows, padded_width(like.shape[2]))
        return torch.empty(shape, dtype=torch.float32, device=like.device)

    def join(self, out: Tensor, partial: Tensor, factor: float) -> None:
        """Add ``partial`` up and write ``out``, times ``factor``."""
        _, heads, rows, width = partial.shape
        part = min(rows, _JOINED_ROWS)
        early = launches_early(self._facts)
        kernel = _joiner(heads, self._long, rows, part, out.shape[2], width, out.stride(0), early)
        kernel(self._pieces * heads * (rows // part), (out, partial, self.work), (self._pieces, float(factor)))


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


@functools.lru_cache(maxsize=512)
def _variant(
    role: str,
    facts: Facts,
    mask: AttentionMask,
    tile: Tile,
    descriptors: bool,
    entries: int,
    grad_stride: int,
    early: bool,
) -> Variant:
    shape = shape_of(facts, tile, descriptors, grad_stride)
    constants: dict[str, Any] = {"SHAPE": shape, "MASK": mask}
    if role in ("dq", "bias"):
        constants["ENTRIES"] = entries
    if role == "dq":
        constants["COPIES"] = POSITION_COPIES
    if tile.registers and facts[-1]:
        constants["maxnreg"] = tile.registers
    if early and launches_early(facts):
        constants["launch_pdl"] = True
    return Variant(_KERNELS[role], **constants, num_warps=tile.num_warps, num_stages=tile.num_stages)


@functools.lru_cache(maxsize=64)
def _joiner(heads: int, long: int, tile: int, rows: int, width: int, block: int, stride: int, early: bool) -> Variant:
    shape = {"HEADS": heads, "LONG": long, "TILE": tile, "ROWS": rows, "EARLY": early}
    options = {"launch_pdl": True} if early else {}
    return Variant(hstu_join_kernel, **shape, WIDTH=width, BLOCK=block, STRIDE=stride, num_warps=4, **options)
