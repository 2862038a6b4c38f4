"""Relative attention bias (rab): tables looked up by distance in position and in time (HSTU, section 3.3)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_kernels.layout import JaggedLayout

_BUCKET_WIDTH = 0.301
_INT64_MAX = 2**63 - 1


def bucket_boundaries(num_buckets: int, device: torch.device | str = "cpu") -> Tensor:
    """``[num_buckets]`` int64: entry ``k - 1`` is the smallest time difference in seconds that falls in bucket ``k``.

    ``bucket(x) = clamp(floor(ln(max(1, x)) / 0.301), 0, num_buckets)`` as integer thresholds, so that every backend
    and every float precision agrees on the bucket of a time difference.
    """
    return torch.tensor(_boundaries(num_buckets), dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=16)
def _boundaries(num_buckets: int) -> tuple[int, ...]:
    bounds = []
    for k in range(1, num_buckets + 1):
        if k * _BUCKET_WIDTH >= math.log(_INT64_MAX):
            bounds.append(_INT64_MAX)
            continue
        bound = max(1, math.floor(math.exp(k * _BUCKET_WIDTH)) - 2)
        while math.floor(math.log(bound) / _BUCKET_WIDTH) < k:
            bound += max(1, bound >> 50)
        bounds.append(min(bound, _INT64_MAX))
    return tuple(bounds)


def time_buckets(row_timestamps: Tensor, key_timestamps: Tensor, boundaries: Tensor) -> Tensor:
    """Bucket of ``|t_row - t_key|``. Int64 seconds of shapes that broadcast; returns int32 of the broadcast shape."""
    return torch.bucketize((row_timestamps - key_timestamps).abs(), boundaries, right=True, out_int32=True)


def next_event_timestamps(timestamps: Tensor, layout: JaggedLayout) -> Tensor:
    """``[L]`` int64: the time each row asks at.

    A history row predicts the event after it and asks at that event's time; the last history row repeats its own
    time (so that history never depends on targets); a target row asks at its own, the request's, time.
    """
    total_rows = timestamps.numel()
    if total_rows == 0:
        return timestamps
    rows = layout.row_indices(total_rows)
    ends = layout.history_ends(total_rows)
    following = torch.cat([timestamps[1:], timestamps[-1:]])
    return torch.where(rows < ends - 1, following, timestamps)


@dataclass(frozen=True, slots=True)
class RelativeBias:
    """``rab_ij = pos_table[p_j - p_i + N - 1] + time_table[bucket(|t_row_i - t_j|)]``, shared by all heads.

    Attributes:
        pos_table: ``[2N - 1]`` float, or ``None`` for no position term. ``p`` is the place inside the sequence, the
            history end for every target. Distances beyond ``N - 1`` take the outermost entry.
        time_table: ``[num_buckets + 1]`` float, or ``None`` for no time term.
        timestamps: ``[L]`` int64 seconds of the keys; needed by ``time_table``.
        row_timestamps: ``[L]`` int64 seconds at which the rows ask. ``None`` stands for `next_event_timestamps` in
            `hstu_attention`; `hstu_target_attention` needs them, the request times ``[T]``, beside a ``time_table``.
    """

    pos_table: Tensor | None = None
    time_table: Tensor | None = None
    timestamps: Tensor | None = None
    row_timestamps: Tensor | None = None

    def __post_init__(self) -> None:
        if self.pos_table is not None and (self.pos_table.dim() != 1 or self.pos_table.numel() % 2 == 0):
            raise ValueError(f"pos_table: expected [2N - 1] entries, got shape {tuple(self.pos_table.shape)}")
        if self.time_table is not None:
            if self.time_table.dim() != 1 or self.time_table.numel() < 1:
                raise ValueError(f"time_table: expected [num_buckets + 1], got shape {tuple(self.time_table.shape)}")
            if self.timestamps is None:
                raise ValueError(
                    "timestamps: needed by time_table, got None; pass [L] int64 seconds or drop time_table"
                )
        for name, times in (("timestamps", self.timestamps), ("row_timestamps", self.row_timestamps)):
            if times is not None and (times.dim() != 1 or times.dtype != torch.int64):
                raise ValueError(f"{name}: expected [L] int64 seconds, got {tuple(times.shape)} {times.dtype}")

    @property
    def num_buckets(self) -> int:
        return 0 if self.time_table is None else self.time_table.numel() - 1

    def dense(
        self,
        row_positions: Tensor,
        key_positions: Tensor,
        row_timestamps: Tensor | None,
        key_timestamps: Tensor | None,
    ) -> Tensor:
        """The definition for one sequence: ``[rows, keys]`` from ``[rows]`` and ``[keys]`` positions and times."""
        shape = (row_positions.numel(), key_positions.numel())
        table = self.pos_table if self.pos_table is not None else self.time_table
        if table is None:
            return torch.zeros(shape, device=row_positions.device)
        rab = table.new_zeros(shape)
        if self.pos_table is not None:
            rab = rab + self.pos_table[position_index(row_positions[:, None], key_positions[None, :], self.pos_table)]
        if self.time_table is not None:
            assert row_timestamps is not None and key_timestamps is not None
            bounds = bucket_boundaries(self.num_buckets, self.time_table.device)
            rab = rab + self.time_table[time_buckets(row_timestamps[:, None], key_timestamps[None, :], bounds).long()]
        return rab


def position_index(row_positions: Tensor, key_positions: Tensor, pos_table: Tensor) -> Tensor:
    """Index into ``pos_table [2N - 1]`` for positions that broadcast; distances are clamped to the table."""
    reach = (pos_table.numel() - 1) // 2
    return (key_positions - row_positions).clamp(-reach, reach) + reach
