"""Cutting candidates of many users into micro-batches, and caches to the users of one."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hstu_kernels import Backend, JaggedLayout, LayerKV
from hstu_kernels.dispatch import choose_backend
from hstu_plugin.config import HSTUConfig
from hstu_plugin.encoder import KVCache
from hstu_plugin.sequence import JaggedSequence

_FEWEST, _MOST = 256, 65536
_CPU_BYTES = 512 << 20


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


def auto_size(configs: Iterable[HSTUConfig], weight: Tensor) -> int:
    """Candidates of a micro-batch that take a tenth of the memory that is free now, in layers of ``weight``'s kind.

    A power of two from 256 to 65536: large ones cost fewer launches, and beyond some thousands nothing is gained.
    """
    free = _CPU_BYTES
    if weight.is_cuda:
        free = torch.cuda.mem_get_info(weight.device)[0] // 10
    row = max(_row_nbytes(config, weight) for config in configs)
    return 1 << min(max(free // row, _FEWEST), _MOST).bit_length() - 1


def _row_nbytes(config: HSTUConfig, weight: Tensor) -> int:
    """What a candidate holds at most at once: rows of a layer, and sums or logits of its attention."""
    heads, qk, uv = config.num_heads, config.attention_dim, config.linear_dim
    rows = 4 * config.embedding_dim + 4 * heads * (qk + uv) + 5 * heads * uv
    itemsize = weight.element_size()
    backend = config.backend
    if backend is Backend.AUTO:
        backend = choose_backend(backend, weight.device, weight.dtype, (qk, uv))
    # float32 sums of each stretch of 2048 keys, or all logits three times.
    attention = (
        heads * uv * 4 * -(-config.max_seq_len // 2048)
        if backend is Backend.TRITON
        else 3 * heads * config.max_seq_len * itemsize
    )
    return rows * itemsize + attention


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
