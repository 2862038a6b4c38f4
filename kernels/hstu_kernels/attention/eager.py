"""Fast path in plain PyTorch: padded products over groups of sequences of similar length, block of rows by block.

Sequences are sorted by length and cut into groups whose padding stays small; inside a group, each block of rows meets
only the keys of `AttentionMask.key_range`. Logits are rebuilt in the backward, so memory is that of one block.
The plan (grouping, indices, time buckets) depends on the batch alone and is shared by all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hstu_kernels.bias import RelativeBias, bucket_boundaries, next_event_timestamps, position_index, time_buckets
from hstu_kernels.layout import JaggedLayout, LayerKV
from hstu_kernels.mask import AttentionMask


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows ``[row_begin, row_end)`` of every sequence of a group against the keys ``cols``."""

    row_begin: int
    row_end: int
    cols: slice | Tensor  # a run of keys, or the indices of prefix and window
    hidden: Tensor | None  # [G or 1, r, c] bool, True where not visible; None where all is visible
    places: Tensor | None  # [G or 1, r, c] int64 into the position table
    buckets: Tensor | None  # [G, r, c] int64
    buckets_by_key: Tensor | None  # [G, c, r] int64, the same for the backward on a GPU


@dataclass(frozen=True, slots=True)
class _Group:
    index: Tensor  # [G, n] rows of the flat tensors; padding repeats the sequence's first row
    valid: Tensor | None  # [G, n] bool, None when nothing is padded
    rows: Tensor  # [rows of the group] rows of the flat tensors
    slots: Tensor | None  # [rows of the group] where they stand in the flattened [G * n]; None when nothing is padded
    blocks: tuple[_Block, ...]


@dataclass(frozen=True, slots=True)
class EagerPlan:
    """Everything about a batch that does not depend on a layer's weights."""

    groups: tuple[_Group, ...]


@dataclass(frozen=True, slots=True)
class _Tuning:
    row_block: int
    padding_share: float  # padded logits a group may hold, relative to the useful ones
    free_padding: int  # padded logits that cost less than another group's fixed work
    group_rows: int  # padded rows a group may hold: keeps a block's logits in the cache


# Measured on two CPU cores and on one H100: see docs/performance-notes.md, "Eager attention".
_CPU = _Tuning(row_block=128, padding_share=0.15, free_padding=1 << 16, group_rows=2048)
_SHARED_BINS = 4096
_GPU = _Tuning(row_block=1024, padding_share=1.0, free_padding=1 << 22, group_rows=1 << 17)


def plan_eager(layout: JaggedLayout, mask: AttentionMask, bias: RelativeBias | None) -> EagerPlan:
    """Group the sequences and compute masks and time buckets. Reads the lengths once from the device."""
    tuning = _CPU if layout.device.type == "cpu" else _GPU
    facts = torch.stack([layout.seq_offsets[:-1], layout.seq_lengths, layout.history_lengths]).tolist()
    sequences = sorted((s for s in zip(*facts, strict=True) if s[1] > 0), key=lambda s: (-s[1], s[0]))
    times = None
    if bias is not None and bias.time_table is not None:
        assert bias.timestamps is not None
        row_times = bias.row_timestamps
        times = (
            row_times if row_times is not None else next_event_timestamps(bias.timestamps, layout),
            bias.timestamps,
        )
    groups = []
    for members in _cut(sequences, tuning):
        groups.append(_plan_group(members, layout, mask, times, bias, tuning.row_block))
    return EagerPlan(tuple(groups))


def _cut(sequences: list[tuple[int, int, int]], tuning: _Tuning) -> list[list[tuple[int, int, int]]]:
    groups: list[list[tuple[int, int, int]]] = []
    useful = 0
    for sequence in sequences:
        if groups:
            group = groups[-1]
            longest, area = group[0][1], sequence[1] ** 2
            fits = (len(group) + 1) * longest <= tuning.group_rows
            padding = (len(group) + 1) * longest**2 - useful - area
            if fits and padding <= max(tuning.padding_share * (useful + area), tuning.free_padding):
                group.append(sequence)
                useful += area
                continue
        groups.append([sequence])
        useful = sequence[1] ** 2
    return groups


def _plan_group(
    members: list[tuple[int, int, int]],
    layout: JaggedLayout,
    mask: AttentionMask,
    times: tuple[Tensor, Tensor] | None,
    bias: RelativeBias | None,
    row_block: int,
) -> _Group:
    device = layout.device
    starts, lengths, histories = (torch.tensor(column, device=device) for column in zip(*members, strict=True))
    longest = members[0][1]
    rows = torch.arange(longest, device=device)
    padded = any(m[1] != longest for m in members)
    valid = rows < lengths[:, None] if padded else None
    index = starts[:, None] + (torch.where(valid, rows, 0) if valid is not None else rows)

    # Without targets and tail the mask is the same for all sequences; padding rows are cut off later.
    uniform = layout.num_targets is None and mask.full_attn_tail_len == 0 and not mask.contextual_sees_history
    ends = torch.tensor(longest, device=device) if uniform else histories[:, None, None]
    # Shorter sequences' ends would pass their padding rows for targets, which see everything.
    history_ends = {longest} if uniform else {m[2] for m in members}
    positions = rows[None, :] if layout.num_targets is None else torch.minimum(rows, histories[:, None])
    pos_table = None if bias is None else bias.pos_table
    bounds = bucket_boundaries(bias.num_buckets, device) if bias is not None and times is not None else None

    blocks = []
    for begin in range(0, longest, row_block):
        end = min(begin + row_block, longest)
        ranges = [mask.key_range(begin, end, longest, h, layout.contextual_seq_len) for h in history_ends]
        prefix_end = max(r.prefix_end for r in ranges)
        key_begin, key_end = min(r.begin for r in ranges), max(r.end for r in ranges)
        if prefix_end == 0 or prefix_end >= key_begin:
            first = 0 if prefix_end else key_begin
            cols: slice | Tensor = slice(first, key_end)
            col_index = rows[first:key_end]
        else:
            cols = col_index = torch.cat([rows[:prefix_end], rows[key_begin:key_end]])
        hidden: Tensor | None = ~mask.visible(
            rows[None, begin:end, None], col_index[None, None, :], ends, layout.contextual_seq_len
        )
        if device.type == "cpu" and hidden is not None and not bool(hidden.any()):
            hidden = None
        buckets = None
        if times is not None and bounds is not None:
            row_times, key_times = times[0][index[:, begin:end]], times[1][index[:, cols]]
            buckets = time_buckets(row_times[:, :, None], key_times[:, None, :], bounds).long()
        places = None
        if pos_table is not None:
            places = position_index(positions[:, begin:end, None], positions[:, None, cols], pos_table)
        by_key = None if buckets is None or device.type == "cpu" else buckets.transpose(1, 2).contiguous()
        blocks.append(_Block(begin, end, cols, hidden, places, buckets, by_key))
    # Flat indices here once: a boolean index in a layer would make the host wait for the device.
    slots = None if valid is None else valid.view(-1).nonzero().squeeze(1)
    group_rows = index.view(-1) if slots is None else index.view(-1)[slots]
    return _Group(index, valid, group_rows, slots, tuple(blocks))


def _block_bias(block: _Block, pos_table: Tensor | None, time_table: Tensor | None, like: Tensor) -> Tensor | None:
    """``[G or 1, r, c]``: rab, with a hugely negative number where hidden, so that SiLU and its slope are exactly 0."""
    added: Tensor | None = None
    if time_table is not None and block.buckets is not None:
        added = time_table.to(like.dtype).index_select(0, block.buckets.view(-1)).view(block.buckets.shape)
    if pos_table is not None:
        assert block.places is not None
        by_position = pos_table.to(like.dtype)[block.places]
        added = by_position if added is None else added.add_(by_position)
    if block.hidden is not None:
        floor = torch.finfo(like.dtype).min / 4
        if added is None:
            added = torch.zeros(block.hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(
                block.hidden, floor
            )
        elif added.shape[0] >= block.hidden.shape[0]:
            added = added.masked_fill_(block.hidden, floor)
        else:
            added = added.masked_fill(block.hidden, floor)
    return added


def _scaled_bmm(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """``factor * (left @ right)``; the factor meets the unrounded sums, not a rounded operand."""
    if factor == 1.0:
        return torch.bmm(left, right)
    return torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=factor)


def _logits(q: Tensor, k: Tensor, added: Tensor | None, heads: int, alpha: float) -> Tensor:
    """``[G * H, r, c]`` from ``q [G * H, r, D]``, ``k [G * H, c, D]`` and ``added [G or 1, r, c]``."""
    if added is not None and heads == 1:
        return torch.baddbmm(added, q, k.transpose(1, 2), alpha=alpha)
    logits = _scaled_bmm(q, k.transpose(1, 2), alpha)
    if added is not None:
        logits.view(-1, heads, *logits.shape[1:]).add_(added[:, None])
    return logits


def _padded(x: Tensor, group: _Group) -> Tensor:
    """``[L, H, D] -> [G * H, n, D]``."""
    heads, width = x.shape[1:]
    # index_select moves whole rows; an index of several dimensions goes element by element on the CPU.
    gathered = x.reshape(x.shape[0], -1).index_select(0, group.index.view(-1))
    if heads == 1:
        return gathered.view(*group.index.shape, width)
    return gathered.view(*group.index.shape, heads, width).transpose(1, 2).reshape(-1, group.index.shape[1], width)


def _scatter(out: Tensor, padded: Tensor, group: _Group) -> None:
    """Write ``[G * H, n, D]`` back to the rows of ``out [L, H, D]``, without the padding."""
    heads = out.shape[1]
    rows = padded.view(group.index.shape[0], heads, *padded.shape[1:]).transpose(1, 2).reshape(-1, *out.shape[1:])
    out.index_copy_(0, group.rows, rows if group.slots is None else rows.index_select(0, group.slots))


class _EagerAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pos_table: Tensor | None,
        time_table: Tensor | None,
        plan: EagerPlan,
        alpha: float,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, pos_table, time_table)
        ctx.plan, ctx.alpha, ctx.scale = plan, alpha, scale
        return eager_forward(q, k, v, pos_table, time_table, plan, alpha, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, pos_table, time_table = ctx.saved_tensors
        gradients = eager_backward(grad, q, k, v, pos_table, time_table, ctx.plan, ctx.alpha, ctx.scale)
        return *gradients, None, None, None


def eager_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_table: Tensor | None,
    time_table: Tensor | None,
    plan: EagerPlan,
    alpha: float,
    scale: float,
) -> Tensor:
    """The forward alone, outside autograd."""
    heads = q.shape[1]
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    for group in plan.groups:
        gq, gk, gv = _padded(q, group), _padded(k, group), _padded(v, group)
        parts = []
        for block in group.blocks:
            added = _block_bias(block, pos_table, time_table, q)
            weights = _logits(gq[:, block.row_begin : block.row_end], gk[:, block.cols], added, heads, alpha)
            parts.append(_scaled_bmm(F.silu(weights, inplace=True), gv[:, block.cols], scale))
        _scatter(out, torch.cat(parts, 1) if len(parts) > 1 else parts[0], group)
    return out


def eager_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_table: Tensor | None,
    time_table: Tensor | None,
    plan: EagerPlan,
    alpha: float,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and the tables that there are, outside autograd."""
    heads = q.shape[1]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dpos = torch.zeros_like(pos_table, dtype=torch.float64) if pos_table is not None else None
    dtime = torch.zeros_like(time_table, dtype=torch.float64) if time_table is not None else None
    for group in plan.groups:
        gq, gk, gv, gout = (_padded(x, group) for x in (q, k, v, grad))
        if group.valid is not None:
            # Padding rows repeat a real row; without a gradient they reach no key.
            gout.view(-1, heads, *gout.shape[1:]).mul_(group.valid[:, None, :, None])
        gdq, gdk, gdv = torch.empty_like(gq), torch.zeros_like(gk), torch.zeros_like(gv)
        for block in group.blocks:
            rows = slice(block.row_begin, block.row_end)
            added = _block_bias(block, pos_table, time_table, q)
            block_q, block_k, block_out = gq[:, rows], gk[:, block.cols], gout[:, rows]
            logits = _logits(block_q, block_k, added, heads, alpha)
            slope = torch.bmm(block_out, gv[:, block.cols].transpose(1, 2))
            slope = torch.ops.aten.silu_backward(slope, logits)
            weights = F.silu(logits, inplace=True)
            _accumulate(gdv, block.cols, weights.transpose(1, 2), block_out, scale)
            _accumulate(gdk, block.cols, slope.transpose(1, 2), block_q, alpha * scale)
            gdq[:, rows] = _scaled_bmm(slope, block_k, alpha * scale)
            if dpos is not None or dtime is not None:
                shared = slope if heads == 1 else slope.view(-1, heads, *slope.shape[1:]).sum(1)
                _bias_gradients(shared, block, pos_table, dpos, dtime)
        _scatter(dq, gdq, group)
        _scatter(dk, gdk, group)
        _scatter(dv, gdv, group)
    return (
        dq,
        dk,
        dv,
        None if dpos is None or pos_table is None else dpos.mul_(scale).to(pos_table.dtype),
        None if dtime is None or time_table is None else dtime.mul_(scale).to(time_table.dtype),
    )


def _accumulate(out: Tensor, cols: slice | Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    if isinstance(cols, slice):
        out[:, cols].baddbmm_(left, right, alpha=factor)
    else:
        out.index_add_(1, cols, torch.bmm(left, right), alpha=factor)


def _bias_gradients(
    slope: Tensor, block: _Block, pos_table: Tensor | None, dpos: Tensor | None, dtime: Tensor | None
) -> None:
    """Add the table gradients of one block; ``slope [G, r, c]`` is already summed over heads."""
    if dpos is not None and pos_table is not None:
        assert block.places is not None
        by_place = slope.sum(0, keepdim=True) if block.places.shape[0] == 1 else slope
        dpos.index_add_(0, block.places.reshape(-1), by_place.reshape(-1).double())
    if dtime is not None and block.buckets is not None:
        # Bins of their own for each row of logits: threads seldom meet in a bin, and the sums stay short.
        # Half precision is too coarse even for these.
        slope = slope.to(torch.promote_types(slope.dtype, torch.float32))
        if block.buckets_by_key is not None:
            # Neighbouring threads take neighbouring rows; along the keys they would hit the same bin.
            bins = slope.new_zeros(slope.shape[0], dtime.numel(), slope.shape[1])
            bins.scatter_add_(1, block.buckets_by_key, slope.transpose(1, 2).contiguous())
            dtime += bins.sum((0, 2), dtype=torch.float64)
        else:
            # Short rows share the bins of their sequence, in double; bins of their own would outnumber the logits.
            shared = slope[0].numel() <= _SHARED_BINS
            slope = slope.double() if shared else slope
            lines = slope.shape[0] if shared else slope.shape[0] * slope.shape[1]
            bins = slope.new_zeros(lines, dtime.numel())
            bins.scatter_add_(1, block.buckets.view(lines, -1), slope.reshape(lines, -1))
            dtime += bins.sum(0, dtype=torch.float64)


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: EagerPlan,
    *,
    alpha: float,
    scale: float,
    bias: RelativeBias | None,
) -> Tensor:
    """Arguments and result as `hstu_kernels.hstu_attention`, with the batch already planned."""
    pos_table = None if bias is None else bias.pos_table
    time_table = None if bias is None else bias.time_table
    out: Tensor = _EagerAttention.apply(q, k, v, pos_table, time_table, plan, alpha, scale)  # type: ignore[no-untyped-call]
    return out


def eager_target_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: LayerKV,
    layout: JaggedLayout,
    mask: AttentionMask,
    *,
    alpha: float,
    scale: float,
    bias: RelativeBias | None,
) -> Tensor:
    """Arguments and result as `hstu_kernels.hstu_target_attention`.

    SiLU attention has no normaliser over the keys, so a target is its history term plus its own term; the cache is
    read in place, never copied or concatenated.
    """
    offsets = layout.seq_offsets.tolist()
    cache_offsets = cache.layout.seq_offsets.tolist()
    pos_table = None if bias is None else bias.pos_table
    time_table = None if bias is None else bias.time_table
    bounds = None if time_table is None else bucket_boundaries(time_table.numel() - 1, q.device)

    own_bias = q.new_zeros(())
    if pos_table is not None:
        own_bias = own_bias + pos_table[(pos_table.numel() - 1) // 2].to(q.dtype)
    if time_table is not None:
        own_bias = own_bias + time_table[0].to(q.dtype)
    own = F.silu(alpha * (q * k).sum(-1, keepdim=True) + own_bias) * scale * v

    parts = []
    for b in range(layout.batch_size):
        begin, end, first, last = offsets[b], offsets[b + 1], cache_offsets[b], cache_offsets[b + 1]
        length = last - first
        position = torch.full((1, 1), length, device=q.device)
        cols = torch.arange(length, device=q.device)[None, :]
        added: Tensor | None = None
        if pos_table is not None:
            added = pos_table.to(q.dtype)[position_index(position, cols, pos_table)]
        if time_table is not None and bounds is not None:
            assert bias is not None and bias.row_timestamps is not None and bias.timestamps is not None
            buckets = time_buckets(bias.row_timestamps[begin:end, None], bias.timestamps[None, first:last], bounds)
            by_time = time_table.to(q.dtype)[buckets.long()]
            added = by_time if added is None else added + by_time
        logits = alpha * torch.matmul(q[begin:end].transpose(0, 1), cache.k[first:last].permute(1, 2, 0))
        if added is not None:
            logits = logits + added
        weights = F.silu(logits)
        if mask.window_targets and mask.max_attn_len:
            weights = weights * mask.visible(position, cols, length, cache.layout.contextual_seq_len)
        parts.append(torch.matmul(weights, cache.v[first:last].transpose(0, 1)).transpose(0, 1) * scale)
    history = torch.cat(parts) if parts else torch.zeros_like(own)
    return history + own
