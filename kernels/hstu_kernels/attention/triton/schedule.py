"""Which tiles meet which, worked out on the device once for a batch. Imports torch alone.

A work list has one line for each tile that exists: no program starts only to find that it has nothing to do. Lines go
sequence by sequence, the longest first, so that programs that run together read the same rows from the cache and none
that starts late runs long. A line says where the tile lies and which blocks of the other side it meets: full blocks, in
which every pair is visible, and edge blocks, which need the mask. Blocks in which no pair is visible are in neither.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hstu_kernels.bias import RelativeBias, bucket_boundaries, next_event_timestamps
from hstu_kernels.layout import JaggedLayout
from hstu_kernels.mask import AttentionMask

# A line: sequence start, length, history end, tile begin; full segments (origin, blocks up to its end) x 2;
# edge segments (origin, blocks up to its end) x 5. Block i of the segment it falls into begins at origin + i * block.
HEADER, FULL_SEGMENTS, EDGE_SEGMENTS = 4, 2, 5
LINE = HEADER + 2 * (FULL_SEGMENTS + EDGE_SEGMENTS)

Segment = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """Geometry and times of a batch, and the work lists built for it so far."""

    layout: JaggedLayout
    mask: AttentionMask
    row_times: Tensor | None  # [L] int64
    key_times: Tensor | None  # [L] int64
    boundaries: Tensor | None  # [num_buckets] int64
    total_rows: int  # L: bounds the length of the lists, so that no device is asked
    # (side, block_m, block_n) -> [tiles, LINE]; tile sizes are known only when the first layer brings its widths.
    work: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    def query_work(self, block_m: int, block_n: int) -> Tensor:
        """``[tiles, LINE]`` int64: query tiles and the key blocks they meet; at the end up to B lines without work."""
        return self._work("query", block_m, block_n)

    def key_work(self, block_m: int, block_n: int) -> Tensor:
        """``[tiles, LINE]`` int64: key tiles and the blocks of query rows they meet; the end as `query_work`."""
        return self._work("key", block_m, block_n)

    def _work(self, side: str, block_m: int, block_n: int) -> Tensor:
        key = (side, block_m, block_n)
        if key not in self.work:
            of_query = side == "query"
            own = block_m if of_query else block_n
            tiles = _tiles(self.layout, own, self.total_rows, last_first=of_query)
            segments = key_segments if of_query else row_segments
            full, edge = segments(self.mask, self.layout.contextual_seq_len, tiles, block_m, block_n)
            self.work[key] = _lines(tiles, full, edge, block_n if of_query else block_m)
        return self.work[key]


def plan_triton(layout: JaggedLayout, mask: AttentionMask, bias: RelativeBias | None, total_rows: int) -> TritonPlan:
    """Resolve the times of a batch of ``total_rows`` rows; work lists follow at the first call for a width."""
    if bias is None or bias.time_table is None:
        return TritonPlan(layout, mask, None, None, None, total_rows)
    assert bias.timestamps is not None
    row_times = bias.row_timestamps
    if row_times is None:
        row_times = next_event_timestamps(bias.timestamps, layout)
    bounds = bucket_boundaries(bias.num_buckets, layout.device)
    return TritonPlan(layout, mask, row_times.contiguous(), bias.timestamps.contiguous(), bounds, total_rows)


@dataclass(frozen=True, slots=True)
class Tiles:
    """``[tiles]`` int64 each: where the sequence starts, its length and history end, and the tile's first row in it."""

    start: Tensor
    length: Tensor
    history_end: Tensor
    begin: Tensor


def list_length(total_rows: int, batch_size: int, block: int) -> int:
    """Lines of a list: a bound on the number of tiles that is known without asking the device."""
    return total_rows // block + batch_size


def _tiles(layout: JaggedLayout, block: int, total_rows: int, *, last_first: bool) -> Tiles:
    """The longest sequence first; inside a sequence the busiest first: of queries the last, of keys the first.

    Behind all tiles stand empty ones: rows and history of 0 length at the start of the batch.
    """
    order = layout.seq_lengths.argsort(descending=True, stable=True)
    counts = ((layout.seq_lengths + block - 1) // block)[order]
    ends = counts.cumsum(0)
    index = torch.arange(list_length(total_rows, layout.batch_size, block), device=layout.device)
    place = torch.searchsorted(ends, index, right=True)
    exists = place < layout.batch_size
    place = place.clamp(max=layout.batch_size - 1)
    tile = ends[place] - 1 - index if last_first else index - (ends - counts)[place]
    sequence = order[place]
    columns = (layout.seq_offsets[:-1][sequence], layout.seq_lengths[sequence], layout.history_lengths[sequence], tile)
    start, length, history, tile = (torch.where(exists, column, 0) for column in columns)
    return Tiles(start, length, history, tile * block)


def key_segments(
    mask: AttentionMask, contextual: int, tiles: Tiles, block_m: int, block_n: int
) -> tuple[list[Segment], list[Segment]]:
    """Full and edge segments ``(begin, end)`` of keys for each query tile, as `AttentionMask.key_range`."""
    first, history, width = tiles.begin, tiles.history_end, mask.max_attn_len
    last = torch.minimum(first + block_m, tiles.length)
    zero = torch.zeros_like(first)
    from_context = first < contextual
    end = last
    if contextual:
        reached = history if mask.contextual_sees_history else history.clamp(max=contextual)
        end = torch.where(from_context, torch.maximum(end, reached), end)
    in_tail = (last > history - mask.full_attn_tail_len) & (first < history) & (mask.full_attn_tail_len > 0)
    sees_all = from_context | in_tail | (width == 0)
    if not mask.window_targets:
        sees_all = sees_all | (last > history)
    begin = torch.where(sees_all, zero, (torch.minimum(first, history) - width).clamp(min=0))
    begin = _floor(begin, block_n)
    prefix = torch.minimum(history.clamp(max=contextual + mask.global_prefix_len), end)
    prefix_end = torch.minimum(torch.where(sees_all, zero, _ceil(prefix, block_n)), begin)

    # Keys that every row of the tile sees.
    causal = torch.minimum(first + 1, history)
    prefix_full = torch.where(
        from_context, zero, _floor(causal.clamp(max=contextual + mask.global_prefix_len), block_n)
    )
    prefix_full = torch.minimum(prefix_full, prefix_end)
    nearest = (torch.minimum(last - 1, history) - width).clamp(min=0)
    unlimited = (
        (first >= history - mask.full_attn_tail_len) & (first < history) if mask.full_attn_tail_len else first < 0
    )
    unlimited = unlimited & (last <= history) if mask.window_targets else unlimited | (first >= history)
    full_begin = torch.maximum(_ceil(torch.where(unlimited | (width == 0), zero, nearest), block_n), begin)
    full_end = _floor(causal, block_n)
    full_begin, full_end = _or_empty(full_begin, full_end, begin, ~from_context)

    # A tile of targets meets the history and itself; the targets in between see none of it.
    only_targets = first >= history
    middle_end = torch.where(only_targets, torch.minimum(_ceil(history, block_n), end), end)
    middle_end = torch.maximum(middle_end, begin)
    own = torch.where(only_targets, torch.maximum(_floor(first, block_n), _ceil(history, block_n)), end)
    full = [(zero, prefix_full), (full_begin, full_end)]
    edge = [(prefix_full, prefix_end), (begin, full_begin), (full_end, middle_end), (torch.maximum(own, begin), end)]
    return full, [*edge, (zero, zero)]


def row_segments(
    mask: AttentionMask, contextual: int, tiles: Tiles, block_m: int, block_n: int
) -> tuple[list[Segment], list[Segment]]:
    """Full and edge segments ``(begin, end)`` of query rows for each key tile: the other way round."""
    first, history, length, width = tiles.begin, tiles.history_end, tiles.length, mask.max_attn_len
    last = torch.minimum(first + block_n, length)
    zero = torch.zeros_like(first)
    is_history = first < history
    begin = _floor(first, block_m)
    context_end = zero
    if contextual:
        needed = is_history if mask.contextual_sees_history else first < contextual
        context_end = torch.where(needed, torch.minimum(_ceil(zero + contextual, block_m), begin), zero)

    prefix = contextual + mask.global_prefix_len
    unlimited = (first < prefix) | (last + width > history) | (width == 0)
    end = torch.where(is_history, torch.where(unlimited, length, last + width), last)
    tail = (history - mask.full_attn_tail_len).clamp(min=0)
    tail_begin = torch.maximum(_floor(tail, block_m), _ceil(end, block_m))
    tail_end = torch.where(is_history, history if mask.window_targets else length, zero)
    tail_end = torch.maximum(tail_end, tail_begin)

    # Rows that see every key of the tile.
    all_history = last <= history
    causal = (last - 1).clamp(min=contextual)
    full_begin = torch.maximum(_ceil(causal, block_m), begin)
    near = (last <= prefix) | (history - first <= width) | (width == 0)
    full_end = _floor(torch.minimum(torch.where(near, length, first + width + 1), end), block_m)
    full_begin, full_end = _or_empty(full_begin, full_end, begin, all_history)
    tail_full_begin = torch.maximum(_ceil(torch.maximum(tail, causal), block_m), tail_begin)
    tail_full_end = _floor(tail_end, block_m)
    tail_full_begin, tail_full_end = _or_empty(tail_full_begin, tail_full_end, tail_begin, all_history)
    full = [(full_begin, full_end), (tail_full_begin, tail_full_end)]
    edge = [
        (zero, context_end),
        (begin, full_begin),
        (full_end, end),
        (tail_begin, tail_full_begin),
        (tail_full_end, tail_end),
    ]
    return full, edge


def _or_empty(begin: Tensor, end: Tensor, at: Tensor, wanted: Tensor) -> Segment:
    """``(begin, end)`` where it is wanted and holds something, else the empty segment ``(at, at)``."""
    wanted = wanted & (end > begin)
    return torch.where(wanted, begin, at), torch.where(wanted, end, at)


def _lines(tiles: Tiles, full: list[Segment], edge: list[Segment], block: int) -> Tensor:
    columns = [tiles.start, tiles.length, tiles.history_end, tiles.begin]
    for segments in (full, edge):
        before = torch.zeros_like(tiles.begin)
        for begin, end in segments:
            blocks = before + ((end - begin).clamp(min=0) + block - 1) // block
            columns += [begin - before * block, blocks]
            before = blocks
    return torch.stack(columns, 1)


def _floor(x: Tensor, block: int) -> Tensor:
    return x // block * block


def _ceil(x: Tensor, block: int) -> Tensor:
    return (x + block - 1) // block * block
