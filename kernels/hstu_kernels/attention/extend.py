"""Attention of history rows that continue cached histories: what appending events to a cache needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hstu_kernels.backend import Backend, UnsupportedBackend, resolve_backend
from hstu_kernels.bias import RelativeBias, bucket_boundaries, position_index, time_buckets
from hstu_kernels.layout import JaggedLayout, LayerKV
from hstu_kernels.mask import AttentionMask

# Rows whose logits are held at once.
_ROW_BLOCK = 512


def hstu_extend_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: LayerKV,
    layout: JaggedLayout,
    mask: AttentionMask,
    *,
    alpha: float,
    scale: float,
    bias: RelativeBias | None = None,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Attention of new history rows to cached rows and, causally, to each other.

    Equals the last rows of `hstu_attention` over ``[cached | new]`` without targets; a history ends with its new rows.

    Args:
        q, k: ``[R, H, Dqk]``. v: ``[R, H, Dv]``: the new rows.
        cache: keys and values of the rows before them, one sequence for each of ``layout``, contextual rows first.
        layout: where each user's new rows lie in ``R``; without targets and contextual rows of its own.
        bias: ``timestamps [R]`` and ``row_timestamps [R]`` of the new rows when it has a time table; the times of the
            cached keys are ``cache.timestamps``.
        mask, alpha, scale: as in `hstu_attention`.
        backend: plain PyTorch serves all devices; an explicit request for a kernel is refused.

    Returns:
        ``[R, H, Dv]``.

    Raises:
        TypeError, ValueError: inputs do not fit together; the message names the argument.
        UnsupportedBackend: a kernel was asked for.
    """
    if resolve_backend(backend) is Backend.TRITON:
        raise UnsupportedBackend("backend: triton has no attention of appended rows; use backend='auto' or 'eager'")
    _check(q, k, v, cache, layout, bias)
    offsets, cached = layout.seq_offsets.tolist(), cache.layout.seq_offsets.tolist()
    tables = _Tables.of(bias, q)
    contextual = cache.layout.contextual_seq_len
    parts = []
    for b in range(layout.batch_size):
        own, old = slice(offsets[b], offsets[b + 1]), slice(cached[b], cached[b + 1])
        before = cached[b + 1] - cached[b]
        end = before + offsets[b + 1] - offsets[b]
        for first in range(before, end, _ROW_BLOCK):
            last = min(first + _ROW_BLOCK, end)
            rows = slice(own.start + first - before, own.start + last - before)
            seen = mask.key_range(first, last, end, end, contextual)
            total = None
            for begin, stop in ((0, seen.prefix_end), (seen.begin, seen.end)):
                # A run of keys lies partly in the cache and partly among the new rows.
                for low, high, base, keys, values, times in (
                    (begin, min(stop, before), old.start, cache.k, cache.v, cache.timestamps),
                    (max(begin, before), stop, own.start - before, k, v, tables.times),
                ):
                    if low >= high:
                        continue
                    there = slice(base + low, base + high)
                    index = torch.arange(first, last, device=q.device)[:, None]
                    cols = torch.arange(low, high, device=q.device)[None, :]
                    logits = alpha * torch.einsum("ihd,jhd->hij", q[rows], keys[there])
                    added = tables.bias(index, cols, rows, None if times is None else times[there])
                    weights = F.silu(logits if added is None else logits + added) * scale
                    weights = weights * mask.visible(index, cols, end, contextual)
                    product = torch.einsum("hij,jhd->ihd", weights, values[there])
                    total = product if total is None else total + product
            assert total is not None  # a row sees itself
            parts.append(total)
    return torch.cat(parts) if parts else torch.zeros_like(v)


@dataclass(frozen=True, slots=True)
class _Tables:
    """The bias of single blocks."""

    pos_table: Tensor | None
    time_table: Tensor | None
    times: Tensor | None
    row_times: Tensor | None
    bounds: Tensor | None

    @classmethod
    def of(cls, bias: RelativeBias | None, like: Tensor) -> _Tables:
        if bias is None:
            return cls(None, None, None, None, None)
        pos = None if bias.pos_table is None else bias.pos_table.to(like.dtype)
        time = None if bias.time_table is None else bias.time_table.to(like.dtype)
        bounds = None if time is None else bucket_boundaries(bias.num_buckets, like.device)
        return cls(pos, time, bias.timestamps, bias.row_timestamps, bounds)

    def bias(self, rows: Tensor, cols: Tensor, which: slice, key_times: Tensor | None) -> Tensor | None:
        added: Tensor | None = None
        if self.pos_table is not None:
            added = self.pos_table[position_index(rows, cols, self.pos_table)]
        if self.time_table is not None:
            assert self.row_times is not None and key_times is not None and self.bounds is not None
            buckets = time_buckets(self.row_times[which, None], key_times[None, :], self.bounds)
            by_time = self.time_table[buckets.long()]
            added = by_time if added is None else added + by_time
        return added


def _check(q: Tensor, k: Tensor, v: Tensor, cache: LayerKV, layout: JaggedLayout, bias: RelativeBias | None) -> None:
    if q.dim() != 3 or v.dim() != 3 or q.shape != k.shape or q.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"q, k, v: expected [R, H, Dqk] twice and [R, H, Dv], got {tuple(q.shape)}, {tuple(k.shape)} "
            f"and {tuple(v.shape)}"
        )
    if layout.num_targets is not None or layout.contextual_seq_len:
        raise ValueError("layout: expected new history rows alone; targets go to hstu_target_attention")
    layout.check_rows("q", q.shape[0])
    if cache.layout.batch_size != layout.batch_size:
        raise ValueError(f"cache: expected {layout.batch_size} sequences as layout, got {cache.layout.batch_size}")
    rows = int(cache.layout.seq_offsets[-1])
    for name, cached, new in (("cache.k", cache.k, k), ("cache.v", cache.v, v)):
        if cached.shape != (rows, *new.shape[1:]):
            raise ValueError(f"{name}: expected {(rows, *new.shape[1:])}, got {tuple(cached.shape)}")
        if cached.dtype != new.dtype or cached.device != new.device:
            raise TypeError(f"{name}: expected {new.dtype} on {new.device} as q, got {cached.dtype} on {cached.device}")
    if bias is not None and bias.time_table is not None:
        for name, times in (("timestamps", bias.timestamps), ("row_timestamps", bias.row_timestamps)):
            if times is None or times.numel() != q.shape[0]:
                raise ValueError(f"bias.{name}: expected one entry for each of {q.shape[0]} new rows")
        if cache.timestamps is None or cache.timestamps.numel() != rows:
            raise ValueError(f"cache.timestamps: expected one entry for each of {rows} cached rows")
