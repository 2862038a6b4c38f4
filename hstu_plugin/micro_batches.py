"""Cutting candidates of many users into micro-batches, and caches to the users of one."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hstu_kernels import JaggedLayout, LayerKV
from hstu_plugin.encoder import KVCache
from hstu_plugin.sequence import JaggedSequence


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One micro-batch: candidates ``[first, last)`` of the users ``[user, user_end)``."""

    first: int
    last: int
    user: int
    user_end: int
    counts: tuple[int, ...]


def micro_batches(offsets: Sequence[int], size: int) -> Iterator[MicroBatch]:
    """Cut the candidates in their order; ``offsets [B + 1]`` are those of the users."""
    for first in range(0, offsets[-1], size):
        last = min(first + size, offsets[-1])
        user, user_end = bisect_right(offsets, first) - 1, bisect_left(offsets, last)
        counts = (min(offsets[u + 1], last) - max(offsets[u], first) for u in range(user, user_end))
        yield MicroBatch(first, last, user, user_end, tuple(counts))


def users_of(cache: KVCache, first: int, last: int) -> KVCache:
    """The users ``[first, last)`` of a cache, as views."""
    if first == 0 and last == cache[0].layout.batch_size:
        return cache
    cut: dict[int, tuple[slice, JaggedLayout]] = {}
    out = []
    for kv in cache:
        # Layers share their layouts, and reading one waits for the device.
        if id(kv.layout) not in cut:
            begin, end = (int(kv.layout.seq_offsets[i]) for i in (first, last))
            offsets = kv.layout.seq_offsets[first : last + 1]
            cut[id(kv.layout)] = slice(begin, end), replace(kv.layout, seq_offsets=offsets - begin)
        rows, layout = cut[id(kv.layout)]
        times = None if kv.timestamps is None else kv.timestamps[rows]
        out.append(LayerKV(kv.k[rows], kv.v[rows], layout, times))
    return tuple(out)


def continued_places(seq: JaggedSequence, before: Sequence[int]) -> Tensor:
    """``[R]`` positions of rows that continue histories of ``before`` rows."""
    total = seq.values.shape[0]
    ends = torch.tensor(before, dtype=torch.int64, device=seq.values.device)
    starts = torch.repeat_interleave(ends, seq.layout.seq_lengths, output_size=total)
    return starts + seq.layout.row_indices(total)
