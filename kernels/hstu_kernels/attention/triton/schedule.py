"""Which tiles meet which, worked out on the device once for a batch. Imports torch alone; `work` holds the kernel.

A work list has one line for each tile that exists: no program starts only to find that it has nothing to do. Lines go
sequence by sequence, the longest first, so that programs that run together read the same rows from the cache. The tiles
of the last sequences are mixed, the busiest first, so that none that starts late runs long. A line says where the tile
lies and which blocks of the other side it meets, in ascending order: full blocks, in which every pair is visible, and
edge blocks, which need the mask. Blocks in which no pair is visible are in neither.

Under a window a few tiles may meet all of a long sequence: rows of the tail, keys of the prefix. They would be the last
to end, so they go to several programs: lines of pieces stand at the front, and `join` adds their results up.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hstu_kernels.bias import RelativeBias, bucket_boundaries, next_event_timestamps
from hstu_kernels.layout import JaggedLayout
from hstu_kernels.mask import AttentionMask

if TYPE_CHECKING:
    from hstu_kernels.triton.launcher import Variant

# A line: sequence start, length, history end, tile begin; segments (origin, blocks up to its end) x 7.
# Block i of the segment it falls into begins at origin + i * block.
HEADER, SEGMENTS = 4, 7
LINE = HEADER + 2 * SEGMENTS
# Which segments are full, in the lists of query tiles and of key tiles.
FULL_SEGMENTS = {"query": (0, 3), "key": (2, 5)}
# A long tile is cut into pieces of at most that many rows of the other side. A power of two.
PIECE_ROWS = 4096
# Rows of the last sequences, whose tiles run busiest first all together. Their keys and values fit into the cache.
END_ROWS = 16384
# Rows of a pair of tiles, for programs that stay: a tile and its mirror image take as long as any other pair of a
# sequence, so that the list needs no other order than that of the sequences.
PAIR_ROWS = 256
# A line of theirs: sequence start, length, pair; one place is free, so that a line is one sector of memory.
PAIR_LINE = 4
# Lines that one program of the list's kernel writes.
_SLOTS = 32


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
    # [B] each, for lists that are still to be written: the sequences, the longest first; rows of all up to each.
    order: Tensor | None = None
    ends: Tensor | None = None
    # (side, block) -> [L, 2]
    spans: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    # What `calls` found out about calls on this plan, by their kind.
    kits: dict[Any, Any] = field(default_factory=dict)

    def query_work(self, block_m: int, block_n: int) -> Tensor:
        """``[lines, LINE]`` int64: query tiles and the key blocks they meet; some lines are empty."""
        return self._work("query", block_m, block_n)

    def pair_work(self) -> Tensor:
        """``[lines, PAIR_LINE]`` int64: pairs of query tiles, sequence by sequence, the longest first."""
        key = ("pair", PAIR_ROWS, PAIR_ROWS)
        if key not in self.work:
            layout = self.layout
            lines = list_length(self.total_rows, layout.batch_size, PAIR_ROWS)
            work = torch.empty(lines, PAIR_LINE, dtype=torch.int64, device=layout.device)
            if lines:
                arrays = (work, self.order, self.ends, layout.seq_offsets)
                _pair_writer()(layout.batch_size, arrays, (layout.batch_size, lines))
            self.work[key] = work
        return self.work[key]

    def key_work(self, block_m: int, block_n: int) -> Tensor:
        """``[lines, LINE]`` int64: key tiles and the blocks of query rows they meet; some lines are empty."""
        return self._work("key", block_m, block_n)

    def block_spans(self, side: str, block: int) -> Tensor | None:
        """`block_spans` of the times of queries or keys; ``None`` without a time table."""
        times = self.row_times if side == "query" else self.key_times
        if times is None:
            return None
        key = (side, block)
        if key not in self.spans:
            self.spans[key] = block_spans(times, self.layout, block)
        return self.spans[key]

    def pieces(self, side: str, block: int) -> tuple[int, int]:
        """Long tiles of a sequence, and lines of pieces at the front of the list of ``side`` for tiles of ``block``."""
        layout = self.layout
        if layout.max_seq_len <= PIECE_ROWS:
            return 0, 0
        long = long_tiles(side, self.mask, layout.contextual_seq_len, block)
        return long, long * piece_slots(self.total_rows)

    def _work(self, side: str, block_m: int, block_n: int) -> Tensor:
        key = (side, block_m, block_n)
        if key not in self.work:
            self.work[key] = self._write(side, block_m, block_n)
        return self.work[key]

    def _write(self, side: str, block_m: int, block_n: int) -> Tensor:
        layout = self.layout
        of_query = side != "key"
        own = block_m if of_query else block_n
        long, pieces = self.pieces("query" if of_query else "key", own)
        lines = pieces + list_length(self.total_rows, layout.batch_size, own)
        programs = (lines + _SLOTS - 1) // _SLOTS
        work = torch.empty(programs * _SLOTS, LINE, dtype=torch.int64, device=layout.device)
        if lines:
            room = (long if pieces else 0, PIECE_ROWS, END_ROWS)
            kernel = _list_writer(layout.contextual_seq_len, self.mask, block_m, block_n, of_query, *room)
            batch = layout.batch_size
            arrays = (work, self.order, self.ends, layout.seq_offsets, layout.num_targets)
            kernel(programs, arrays, (batch, batch.bit_length(), pieces))
        return work[:lines]


@functools.lru_cache(maxsize=256)
def _list_writer(
    contextual: int, mask: AttentionMask, block_m: int, block_n: int, of_query: bool, long: int, room: int, end: int
) -> Variant:
    # Here, so that this module imports without Triton.
    from hstu_kernels.attention.triton.work import hstu_work_kernel
    from hstu_kernels.triton.launcher import Variant

    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "LONG": long, "ROOM": room, "SLOTS": _SLOTS, "END_ROWS": end}
    return Variant(hstu_work_kernel, CONTEXTUAL=contextual, MASK=mask, OF_QUERY=of_query, **sizes, num_warps=1)


@functools.lru_cache(maxsize=1)
def _pair_writer() -> Variant:
    from hstu_kernels.attention.triton.pairs import hstu_pair_kernel
    from hstu_kernels.triton.launcher import Variant

    return Variant(hstu_pair_kernel, SLOTS=128, num_warps=1)


def plan_triton(layout: JaggedLayout, mask: AttentionMask, bias: RelativeBias | None, total_rows: int) -> TritonPlan:
    """Resolve the times of a batch of ``total_rows`` rows; work lists follow at the first call for a width."""
    if bias is None or bias.time_table is None:
        return TritonPlan(layout, mask, None, None, None, total_rows, {}, *_longest_first(layout))
    assert bias.timestamps is not None
    row_times = bias.row_timestamps
    if row_times is None:
        row_times = next_event_timestamps(bias.timestamps, layout)
    bounds = device_boundaries(bias.num_buckets, layout.device)
    times = (row_times.contiguous(), bias.timestamps.contiguous())
    return TritonPlan(layout, mask, *times, bounds, total_rows, {}, *_longest_first(layout))


def block_spans(times: Tensor, layout: JaggedLayout, block: int) -> Tensor:
    """``[L, 2]`` int64: the earliest and the latest of ``times [L]`` in each block of ``block`` rows of a sequence.

    They stand at the block's first row; the other rows say nothing. Nothing is rounded and no order is asked for.
    """
    rows = torch.arange(times.numel(), device=times.device)
    first = rows - layout.row_indices(times.numel()) % block
    limits = torch.iinfo(torch.int64)
    low = torch.full_like(times, limits.max).scatter_reduce(0, first, times, "amin")
    high = torch.full_like(times, limits.min).scatter_reduce(0, first, times, "amax")
    return torch.stack([low, high], 1)


@functools.lru_cache(maxsize=64)
def device_boundaries(num_buckets: int, device: torch.device) -> Tensor:
    """`bucket_boundaries`, copied once: no batch waits for a copy from the host, and graphs can capture a call."""
    with torch.inference_mode(False):
        return bucket_boundaries(num_buckets, device)


def list_length(total_rows: int, batch_size: int, block: int) -> int:
    """Lines of a list without pieces: a bound on the number of tiles that is known without asking the device."""
    return total_rows // block + batch_size


def piece_slots(total_rows: int) -> int:
    """Pieces of one tile of each sequence: a bound for all sequences together.

    Only sequences of more than PIECE_ROWS have some. They are the first, at most ``L / PIECE_ROWS``, and each owns as
    many slots as PIECE_ROWS fit into its rows, and one more.
    """
    return 2 * (total_rows // PIECE_ROWS)


def long_tiles(side: str, mask: AttentionMask, contextual_seq_len: int, block: int) -> int:
    """Tiles of ``block`` rows in a sequence that may meet all of it although most tiles meet a window; 0: do not cut.

    Where there are many of them they keep the machine busy as they are, and partial sums would take more than q does.
    """
    if mask.max_attn_len == 0:
        return 0
    if side == "query":
        context = contextual_seq_len if mask.contextual_sees_history else 0
        rows, tail = context + mask.full_attn_tail_len, mask.full_attn_tail_len
        tiles = -(-context // block) + (-(-tail // block) + 1 if tail else 0)
    else:
        rows = contextual_seq_len + mask.global_prefix_len
        tiles = -(-rows // block)
    return tiles if rows <= PIECE_ROWS // 4 else 0


def _longest_first(layout: JaggedLayout) -> tuple[Tensor, Tensor]:
    """``[B]`` each: the sequences by length, and the rows of all sequences up to each of them."""
    lengths, order = layout.seq_lengths.sort(descending=True, stable=True)
    return order, lengths.cumsum(0)
