"""From tensors to launches: strides, tiles, work lists, and the autograd function."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu_kernels.attention.triton.arguments import Facts, Tables, addressable, facts_of, panels, same_bits, shape_of
from hstu_kernels.attention.triton.backward import hstu_bwd_dkdv_kernel, hstu_bwd_dq_kernel
from hstu_kernels.attention.triton.bias_grad import hstu_bwd_bias_kernel
from hstu_kernels.attention.triton.forward import hstu_fwd_kernel
from hstu_kernels.attention.triton.join import hstu_join_kernel
from hstu_kernels.attention.triton.schedule import TritonPlan
from hstu_kernels.attention.triton.tiles import (
    LONG_BATCH,
    Tile,
    TileSet,
    length_class,
    padded_width,
    tile_set,
)
from hstu_kernels.bias import RelativeBias
from hstu_kernels.gradients import needs_gradient
from hstu_kernels.mask import AttentionMask
from hstu_kernels.triton.launcher import Argument, Variant

# Partial sums of the position table that programs share; more of them: fewer programs wait for one address.
POSITION_COPIES = 32
# Partial sums that are added up in float32, before the rest in float64.
_GROUP = 16
# Rows of a long tile that one program adds up.
_JOINED_ROWS = 16
# Beneath it a logit's product is nothing beside any bias.
_LEAST_ALPHA = 2.0**-100

_KERNELS = {
    "forward": hstu_fwd_kernel,
    "dq": hstu_bwd_dq_kernel,
    "dkdv": hstu_bwd_dkdv_kernel,
    "bias": hstu_bwd_bias_kernel,
}
_tile_set = functools.lru_cache(maxsize=64)(tile_set)


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TritonPlan,
    *,
    alpha: float,
    scale: float,
    bias: RelativeBias | None,
    tiles: TileSet | None = None,
) -> Tensor:
    """Arguments and result as `hstu_kernels.hstu_attention`, with the batch already planned; ``tiles`` for tests."""
    pos_table = None if bias is None else bias.pos_table
    time_table = None if bias is None else bias.time_table
    if tiles is None:
        tiles = tiles_of(q, v, plan, biased=pos_table is not None or time_table is not None)
    if not needs_gradient(q, k, v, pos_table, time_table):
        return triton_forward(q, k, v, pos_table, time_table, plan, alpha, scale, tiles)
    out: Tensor = _TritonAttention.apply(q, k, v, pos_table, time_table, plan, alpha, scale, tiles)  # type: ignore[no-untyped-call]
    return out


def tiles_of(q: Tensor, v: Tensor, plan: TritonPlan, *, biased: bool) -> TileSet:
    """The tiles of a call; both of its passes have to take the same ones."""
    longest = plan.layout.max_seq_len
    longest = length_class(longest) if longest >= LONG_BATCH and same_bits(q.get_device()) else 0
    windowed = plan.mask.max_attn_len > 0
    return _tile_set(q.shape[2], v.shape[2], q.dtype, biased=biased, windowed=windowed, longest=longest)


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pos_table: Tensor | None,
        time_table: Tensor | None,
        plan: TritonPlan,
        alpha: float,
        scale: float,
        tiles: TileSet,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, pos_table, time_table)
        ctx.options = (plan, alpha, scale, tiles)
        ctx.divided = divided = _divided(pos_table, time_table, alpha)
        return triton_forward(q, k, v, pos_table, time_table, plan, alpha, scale, tiles, divided)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, pos_table, time_table = ctx.saved_tensors
        options = (*ctx.options, ctx.needs_input_grad[:5], ctx.divided)
        found = triton_backward(grad, q, k, v, pos_table, time_table, *options)
        return *found, None, None, None, None


def triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_table: Tensor | None,
    time_table: Tensor | None,
    plan: TritonPlan,
    alpha: float,
    scale: float,
    tiles: TileSet,
    divided: Tables | None = None,
) -> Tensor:
    """The forward alone, outside autograd; ``divided``: the tables from `_divided`, where they are there already."""
    call = _Call(q, k, v, pos_table, time_table, plan, alpha, scale, divided)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    tile = tiles.forward
    if call.rows:
        work = plan.query_work(tile.block_m, tile.block_n)
        pieces = _Pieces(plan, "query", tile.block_m, q)
        partial = pieces.sums(tile.block_m, v.shape[2])
        call.launch("forward", tile, work, (out, partial), (call.k, call.v), pieces=pieces.count)
        if partial is not None:
            pieces.join(out, partial, work, scale)
    return out


def triton_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_table: Tensor | None,
    time_table: Tensor | None,
    plan: TritonPlan,
    alpha: float,
    scale: float,
    tiles: TileSet,
    needed: Sequence[bool],
    divided: Tables | None = None,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and the two tables, outside autograd; ``None`` where ``needed`` says no.

    ``into``: where those of q, k and v go, if all of them are needed: ``[L, H, D]``, with rows of one stride (that of
    columns of one matrix) and contiguous heads.
    """
    need_q, need_k, need_v, need_pos, need_time = needed
    call = _Call(q, k, v, pos_table, time_table, plan, alpha, scale, divided, 0 if into is None else into[0].stride(0))
    grad = grad.contiguous()
    dq = dk = dv = None
    pos_sums = time_sums = late_sums = None
    if need_pos and pos_table is not None:
        pos_sums = torch.zeros(POSITION_COPIES, pos_table.numel(), dtype=torch.float32, device=q.device)
    if need_time and time_table is not None:
        time_sums = call.time_sums(tiles.dq, call.heads)
        # Warps add to what is there, so that one kernel goes on where the other ended.
        late_sums = time_sums if call.adds_by_warp(tiles) else call.time_sums(tiles.bias, 1)
    if need_q or need_pos or need_time:
        dq = torch.empty_like(q, memory_format=torch.contiguous_format) if into is None else into[0]
        tile = tiles.dq
        if call.rows:
            work = plan.query_work(tile.block_m, tile.block_n)
            pieces = _Pieces(plan, "query", tile.block_m, q)
            partial = pieces.sums(tile.block_m, q.shape[2])
            sums = (pos_sums, time_sums)
            call.launch("dq", tile, work, (grad, dq, partial), (call.k, call.v), sums, pieces.count)
            if partial is not None:
                pieces.join(dq, partial, work, call.alpha * scale)
    if need_k or need_v:
        dk = torch.empty_like(k, memory_format=torch.contiguous_format) if into is None else into[1]
        dv = torch.empty_like(v, memory_format=torch.contiguous_format) if into is None else into[2]
        tile = tiles.dkdv
        if call.rows:
            work = plan.key_work(tile.block_m, tile.block_n)
            pieces = _Pieces(plan, "key", tile.block_n, q)
            partial = pieces.sums(tile.block_n, k.shape[2])
            partial_v = pieces.sums(tile.block_n, v.shape[2])
            own = (grad, dk, dv, partial, partial_v)
            call.launch("dkdv", tile, work, own, (call.q, grad), pieces=pieces.count)
            if partial is not None and partial_v is not None:
                pieces.join(dk, partial, work, call.alpha * scale)
                pieces.join(dv, partial_v, work, scale)
    if late_sums is not None and call.rows:
        tile = tiles.bias
        call.launch("bias", tile, plan.query_work(tile.block_m, tile.block_n), (grad, late_sums))
    if call.vanishes and dq is not None:
        dq.zero_()
    dpos = dtime = None
    if pos_sums is not None and pos_table is not None:
        dpos = (added_up(pos_sums) * scale).to(pos_table.dtype)
    if time_sums is not None and late_sums is not None and time_table is not None:
        total = added_up(time_sums)
        if late_sums is not time_sums:
            total = total + added_up(late_sums)
        total = total.sum(1)[: time_table.numel()]
        dtime = (total * scale).to(time_table.dtype)
    return dq if need_q else None, dk, dv, dpos, dtime


class _Pieces:
    """The pieces of long tiles at the front of a work list: their partial sums, and what adds them up."""

    def __init__(self, plan: TritonPlan, side: str, block: int, like: Tensor) -> None:
        self.long, self.count = plan.pieces(side, block)
        self.heads, self.device = like.shape[1], like.device

    def sums(self, rows: int, width: int) -> Tensor | None:
        """``[pieces, H, rows, padded width]`` float32; ``None`` where no tile is cut."""
        if not self.count:
            return None
        shape = (self.count, self.heads, rows, padded_width(width))
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def join(self, out: Tensor, partial: Tensor, work: Tensor, factor: float) -> None:
        """Add ``partial`` up and write ``out``, times ``factor``."""
        _, _, rows, width = partial.shape
        part = min(rows, _JOINED_ROWS)
        kernel = _joiner(self.heads, self.long, rows, part, out.shape[2], width, out.stride(0))
        kernel(self.count * self.heads * (rows // part), (out, partial, work), (self.count, float(factor)))


class _Call:
    """What the kernels of one call share: inputs that they can address, the bias, and the numbers."""

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
        divided: Tables | None,
        grad_stride: int = 0,
    ) -> None:
        self.grad_stride = grad_stride
        self.rows, self.heads, _ = q.shape
        self.tables = _divided(pos_table, time_table, alpha) if divided is None else divided
        self.vanishes = abs(alpha) < _LEAST_ALPHA
        if self.vanishes:
            q, alpha = torch.zeros_like(q), 1.0
        self.q, q_row, q_head = addressable(q)
        self.k, k_row, k_head = addressable(k)
        self.v, v_row, v_head = addressable(v)
        self.plan, self.alpha = plan, alpha
        self.numbers = (q_row, q_head, k_row, k_head, v_row, v_head, float(alpha), float(scale))
        self.facts = facts_of(q, v, plan.layout.contextual_seq_len, pos_table, time_table)

    def time_sums(self, tile: Tile, heads: int) -> Tensor:
        """Zeros ``[lines, entries, warps]`` float32 for the programs of ``tile``: a line for each, a column a warp.

        Where warps have no sums of their own there is one column, and ``entries`` is a power of two.
        """
        shape = shape_of(self.facts, tile, False)
        entries, warps = (
            (shape.buckets + 1, shape.warps) if shape.sums_by_warp else (padded_width(shape.buckets + 1), 1)
        )
        lines = self.plan.query_work(tile.block_m, tile.block_n).shape[0] * heads if self.rows else 0
        return torch.zeros(lines, entries, warps, dtype=torch.float32, device=self.q.device)

    def adds_by_warp(self, tiles: TileSet) -> bool:
        """Whether both kernels of the time table's gradient add to sums of one shape."""
        first, second = (shape_of(self.facts, tile, False) for tile in (tiles.dq, tiles.bias))
        return first.sums_by_warp and second.sums_by_warp and first.warps == second.warps

    def launch(
        self,
        role: str,
        tile: Tile,
        work: Tensor,
        own: tuple[Tensor | None, ...],
        streamed: tuple[Tensor, ...] = (),
        sums: tuple[Tensor | None, ...] = (),
        pieces: int = 0,
    ) -> None:
        """Launch one kernel.

        Args:
            work: its work list.
            own: the arrays between q, k, v and what streams: gradients that come in, results, sums of pieces.
            streamed: the arrays whose blocks the main loop fetches; none where the kernel has no descriptors.
            sums: partial sums of the position and the time table; the kernel of the bias has the latter in ``own``.
            pieces: lines at the front of ``work`` that are pieces of long tiles.
        """
        plan = self.plan
        of_keys = role == "dkdv"
        side, block = ("query", tile.block_m) if of_keys else ("key", tile.block_n)
        described: Sequence[Argument] | None = panels(streamed, block) if streamed else ()
        time_sums = own[-1] if role == "bias" else sums[-1] if sums else None
        entries = 0 if time_sums is None else time_sums.shape[1]
        kernel = _variant(role, self.facts, plan.mask, tile, bool(described), entries, self.grad_stride)
        if described is None:
            described = (None,) * len(streamed)
        kernel(
            work.shape[0] * (1 if role == "bias" else self.heads),
            (
                self.q,
                self.k,
                self.v,
                *own,
                *described,
                *self.tables,
                plan.boundaries,
                plan.row_times,
                plan.key_times,
                plan.block_spans(side, block),
                *sums,
                work,
            ),
            # The kernel of the bias leaves the factor ``scale`` to those who add up.
            self.numbers[:-1] if role == "bias" else (*self.numbers, pieces),
        )


@functools.lru_cache(maxsize=512)
def _variant(
    role: str, facts: Facts, mask: AttentionMask, tile: Tile, descriptors: bool, entries: int, grad_stride: int
) -> Variant:
    shape = shape_of(facts, tile, descriptors, grad_stride)
    constants: dict[str, Any] = {"SHAPE": shape, "MASK": mask}
    if role in ("dq", "bias"):
        constants["ENTRIES"] = entries
    if role == "dq":
        constants["COPIES"] = POSITION_COPIES
    return Variant(_KERNELS[role], **constants, num_warps=tile.num_warps, num_stages=tile.num_stages)


@functools.lru_cache(maxsize=64)
def _joiner(heads: int, long: int, tile: int, rows: int, width: int, block: int, stride: int) -> Variant:
    shape = {"HEADS": heads, "LONG": long, "TILE": tile, "ROWS": rows}
    return Variant(hstu_join_kernel, **shape, WIDTH=width, BLOCK=block, STRIDE=stride, num_warps=4)


def _divided(pos_table: Tensor | None, time_table: Tensor | None, alpha: float) -> Tables:
    """In float32, divided by alpha: the kernels multiply the whole logit by it.

    Where it is too small to divide by, `_Call` takes rows of 0 and 1.0 for it, which give the same logits.
    """
    if pos_table is None and time_table is None:
        return None, None
    divisor = 1.0 if abs(alpha) < _LEAST_ALPHA else alpha
    pos, time = (
        None if table is None else (table.detach().to(torch.float32) / divisor).contiguous()
        for table in (pos_table, time_table)
    )
    return pos, time


def added_up(sums: Tensor) -> Tensor:
    """``sums [n, ...]`` over their first axis, in float64: groups first, which need no copy in float64."""
    count = sums.shape[0] // _GROUP * _GROUP
    groups = sums[:count].view(-1, _GROUP, *sums.shape[1:]).sum(1)
    return torch.sum(groups, 0, dtype=torch.float64) + torch.sum(sums[count:], 0, dtype=torch.float64)
