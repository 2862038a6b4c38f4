"""Token rows of a jagged batch, with their geometry and times."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_kernels import JaggedLayout


@dataclass(frozen=True, slots=True)
class JaggedSequence:
    """``values [L, D]`` (or ``[L]`` ids) of sequences laid out by ``layout``.

    Attributes:
        values: one row for each token.
        layout: where the sequences lie.
        timestamps: ``[L]`` int64 seconds of the tokens; a target's is its request time. ``None`` where unknown.
    """

    values: Tensor
    layout: JaggedLayout
    timestamps: Tensor | None = None

    def __post_init__(self) -> None:
        if self.timestamps is not None:
            if self.timestamps.dtype != torch.int64:
                raise TypeError(f"timestamps: expected int64 seconds, got {self.timestamps.dtype}; floats lose seconds")
            if self.timestamps.shape != self.values.shape[:1]:
                raise ValueError(
                    f"timestamps: expected one for each of {self.values.shape[0]} rows, "
                    f"got {tuple(self.timestamps.shape)}"
                )

    @classmethod
    def from_padded(cls, values: Tensor, seq_lengths: Tensor, timestamps: Tensor | None = None) -> JaggedSequence:
        """Flatten a right-padded batch.

        Args:
            values: ``[B, N, ...]``, the first ``seq_lengths[b]`` entries of row ``b`` are real.
            seq_lengths: ``[B]`` integers in ``[0, N]``.
            timestamps: ``[B, N]`` int64 seconds, or ``None``.

        Raises:
            TypeError: the lengths are no integers.
            ValueError: shapes do not agree or a length is outside ``[0, N]``.
        """
        if values.dim() < 2 or seq_lengths.shape != values.shape[:1]:
            raise ValueError(
                f"seq_lengths: expected [B] for values [B, N, ...], got {tuple(seq_lengths.shape)} "
                f"for {tuple(values.shape)}"
            )
        if timestamps is not None and timestamps.shape != values.shape[:2]:
            raise ValueError(f"timestamps: expected {tuple(values.shape[:2])} as values, got {tuple(timestamps.shape)}")
        width = values.shape[1]
        layout = JaggedLayout.from_lengths(seq_lengths, max_seq_len=width)
        if seq_lengths.numel():
            low, high = torch.stack(torch.aminmax(seq_lengths)).tolist()
            if low < 0 or high > width:
                raise ValueError(
                    f"seq_lengths: expected numbers in [0, {width}] (the padded width), got {low} to {high}"
                )
        real = torch.arange(width, device=values.device) < seq_lengths[:, None]
        return cls(values[real], layout, None if timestamps is None else timestamps[real])

    def with_values(self, values: Tensor) -> JaggedSequence:
        """The same geometry and times around other rows."""
        return JaggedSequence(values, self.layout, self.timestamps)

    def history(self) -> JaggedSequence:
        """The sequences without their targets."""
        if self.layout.num_targets is None:
            return self
        return self._select(~self._target_rows(), self.layout.without_targets())

    def targets(self) -> JaggedSequence:
        """Only the targets, one sequence of them for each user; empty where a user has none."""
        layout = self.layout
        if layout.num_targets is None:
            zeros = torch.zeros(layout.batch_size, dtype=torch.int64, device=layout.device)
            return self._select(slice(0, 0), JaggedLayout.from_lengths(zeros, max_seq_len=0))
        kept = JaggedLayout.from_lengths(layout.num_targets, max_seq_len=layout.max_seq_len)
        return self._select(self._target_rows(), kept)

    def keep_recent(self, max_history: int) -> JaggedSequence:
        """Contextual rows, the latest ``max_history`` history rows and all targets (truncation of ULTRA-HSTU)."""
        if max_history < 0:
            raise ValueError(f"max_history: expected a number >= 0, got {max_history}")
        layout = self.layout
        events = (layout.history_lengths - layout.contextual_seq_len).clamp(min=0)
        lengths = layout.seq_lengths - (events - max_history).clamp(min=0)
        return self._select(
            self.recent_rows(max_history),
            JaggedLayout.from_lengths(
                lengths,
                max_seq_len=layout.max_seq_len,
                num_targets=layout.num_targets,
                contextual_seq_len=layout.contextual_seq_len,
            ),
        )

    def recent_rows(self, max_history: int) -> Tensor:
        """``[L]`` bool: the rows that `keep_recent` keeps."""
        layout, total = self.layout, self.values.shape[0]
        rows = layout.row_indices(total)
        return (rows >= layout.history_ends(total) - max_history) | (rows < layout.contextual_seq_len)

    def last_history_rows(self) -> Tensor:
        """``[B]`` int64: the row of each user's latest event. Sequences must have a history."""
        return self.layout.seq_offsets[:-1] + self.layout.history_lengths - 1

    def _target_rows(self) -> Tensor:
        layout, total = self.layout, self.values.shape[0]
        ends = layout.history_ends(total)
        return layout.row_indices(total) >= ends

    def _select(self, kept: Tensor | slice, layout: JaggedLayout) -> JaggedSequence:
        times = None if self.timestamps is None else self.timestamps[kept]
        return JaggedSequence(self.values[kept], layout, times)
