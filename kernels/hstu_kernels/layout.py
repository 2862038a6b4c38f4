"""Where sequences, contextual rows and targets lie inside the flat row dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class JaggedLayout:
    """Geometry of a jagged batch; every sequence is ``[contextual | history | targets]``.

    Attributes:
        seq_offsets: ``[B + 1]`` int64, first row of each sequence; the last entry is the total row count ``L``.
        max_seq_len: an upper bound on the sequence lengths. Launch geometry only: it never enters a number.
        num_targets: ``[B]`` int64, candidates at the end of each sequence, or ``None`` for no candidates.
        contextual_seq_len: leading feature rows, the same number for every non-empty sequence of the batch.
    """

    seq_offsets: Tensor
    max_seq_len: int
    num_targets: Tensor | None = None
    contextual_seq_len: int = 0
    # What `check_rows` found right: the number of rows, and the versions of the tensors at that time.
    _checked: list[tuple[int, int, int]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, tensor in (("seq_offsets", self.seq_offsets), ("num_targets", self.num_targets)):
            if tensor is None:
                continue
            if tensor.dim() != 1 or tensor.dtype != torch.int64:
                raise ValueError(
                    f"{name}: expected a 1-D int64 tensor, got {tensor.dim()}-D {tensor.dtype}; convert it with .long()"
                )
        if self.seq_offsets.numel() < 1:
            raise ValueError("seq_offsets: expected [B + 1] entries, got an empty tensor; an empty batch is [0]")
        if self.num_targets is not None and self.num_targets.numel() != self.batch_size:
            raise ValueError(
                f"num_targets: expected one entry for each of {self.batch_size} sequences, "
                f"got {self.num_targets.numel()}"
            )
        if self.max_seq_len < 0 or self.contextual_seq_len < 0:
            raise ValueError(
                "max_seq_len and contextual_seq_len: expected numbers >= 0, got "
                f"{self.max_seq_len} and {self.contextual_seq_len}"
            )

    @classmethod
    def from_lengths(
        cls,
        seq_lengths: Tensor,
        *,
        max_seq_len: int | None = None,
        num_targets: Tensor | None = None,
        contextual_seq_len: int = 0,
    ) -> JaggedLayout:
        """Build the layout from ``seq_lengths [B]`` (any integer dtype). Reads the maximum if no bound is given.

        Raises:
            TypeError: the lengths are no integers.
        """
        whole = not (seq_lengths.dtype == torch.bool or seq_lengths.is_floating_point() or seq_lengths.is_complex())
        # `torch.tensor([])`, an empty batch, comes in floats.
        if not whole and seq_lengths.numel():
            raise TypeError(f"seq_lengths: expected integers, got {seq_lengths.dtype}")
        seq_lengths = seq_lengths.long()
        seq_offsets = torch.zeros(seq_lengths.numel() + 1, dtype=torch.int64, device=seq_lengths.device)
        torch.cumsum(seq_lengths, 0, out=seq_offsets[1:])
        if max_seq_len is None:
            max_seq_len = int(seq_lengths.max()) if seq_lengths.numel() else 0
        return cls(seq_offsets, max_seq_len, num_targets, contextual_seq_len)

    @classmethod
    def from_counts(
        cls, counts: Sequence[int], *, device: torch.device | str = "cpu", contextual_seq_len: int = 0
    ) -> JaggedLayout:
        """Build the layout on ``device`` from lengths that the host knows; nothing has to ask the device for them.

        Raises:
            ValueError: a length is negative.
        """
        if counts and min(counts) < 0:
            raise ValueError(f"counts: expected lengths >= 0, got {min(counts)}")
        ends = list(accumulate(counts, initial=0))
        offsets = torch.tensor(ends, dtype=torch.int64).to(device, non_blocking=True)
        layout = cls(offsets, max(counts, default=0), contextual_seq_len=contextual_seq_len)
        if not any(0 < count < contextual_seq_len for count in counts):
            layout.vouched(ends[-1])
        return layout

    @property
    def batch_size(self) -> int:
        return self.seq_offsets.numel() - 1

    @property
    def device(self) -> torch.device:
        return self.seq_offsets.device

    @property
    def seq_lengths(self) -> Tensor:
        """``[B]`` int64 rows of each sequence, targets included."""
        return self.seq_offsets[1:] - self.seq_offsets[:-1]

    @property
    def history_lengths(self) -> Tensor:
        """``[B]`` int64 rows before the first target: contextual and history. Also the position of the targets."""
        return self.seq_lengths if self.num_targets is None else self.seq_lengths - self.num_targets

    def sequence_ids(self, total_rows: int) -> Tensor:
        """``[L]`` int64, the sequence each row belongs to. ``total_rows`` is given so that no device is asked."""
        ids = torch.arange(self.batch_size, device=self.device)
        return torch.repeat_interleave(ids, self.seq_lengths, output_size=total_rows)

    def row_indices(self, total_rows: int) -> Tensor:
        """``[L]`` int64, the place of each row inside its own sequence, counted from 0."""
        starts = torch.repeat_interleave(self.seq_offsets[:-1], self.seq_lengths, output_size=total_rows)
        return torch.arange(total_rows, device=self.device) - starts

    def positions(self, total_rows: int) -> Tensor:
        """``[L]`` int64, like `row_indices`, but every target stands at the end of the history."""
        indices = self.row_indices(total_rows)
        if self.num_targets is None:
            return indices
        return torch.minimum(indices, self.history_ends(total_rows))

    def history_ends(self, total_rows: int) -> Tensor:
        """``[L]`` int64, the history end of each row's own sequence: the place of its first target."""
        return torch.repeat_interleave(self.history_lengths, self.seq_lengths, output_size=total_rows)

    def without_targets(self) -> JaggedLayout:
        """The same sequences with their targets cut off."""
        if self.num_targets is None:
            return self
        trimmed = JaggedLayout.from_lengths(self.history_lengths, max_seq_len=self.max_seq_len)
        return replace(trimmed, contextual_seq_len=self.contextual_seq_len)

    def vouched(self, rows: int) -> JaggedLayout:
        """Itself, for a caller that has checked on the host what `check_rows` would ask the device."""
        self._checked[:] = [(rows, *self._versions())]
        return self

    def check_rows(self, name: str, rows: int) -> None:
        """Raise ``ValueError`` unless the layout is consistent and covers ``rows`` rows.

        Reads the device, unless this was found right before and the tensors have not been written to since.
        """
        found = (rows, *self._versions())
        if found in self._checked:
            return
        offsets = self.seq_offsets.cpu()
        lengths = offsets.diff()
        if int(offsets[0]) != 0 or bool((lengths < 0).any()):
            raise ValueError("seq_offsets: expected a non-decreasing tensor that starts at 0; use from_lengths()")
        if int(offsets[-1]) != rows:
            raise ValueError(f"{name}: expected {int(offsets[-1])} rows as seq_offsets ends there, got {rows} rows")
        if self.batch_size and int(lengths.max()) > self.max_seq_len:
            raise ValueError(
                f"max_seq_len: expected a bound >= the longest sequence ({int(lengths.max())}), got {self.max_seq_len}"
            )
        targets = torch.zeros_like(lengths) if self.num_targets is None else self.num_targets.cpu()
        outside = ((targets < 0) | (targets > lengths)).nonzero().flatten().tolist()
        if outside:
            b = outside[0]
            raise ValueError(
                f"num_targets: expected a number in [0, {int(lengths[b])}], the length of sequence {b}, "
                f"got {int(targets[b])}"
            )
        short = ((lengths > 0) & (lengths - targets < self.contextual_seq_len)).nonzero().flatten().tolist()
        if short:
            b = short[0]
            raise ValueError(
                f"contextual_seq_len: sequence {b} has {int(lengths[b] - targets[b])} rows before its targets, fewer "
                f"than the {self.contextual_seq_len} contextual rows that every non-empty sequence must have"
            )
        self.vouched(rows)

    def _versions(self) -> tuple[int, int]:
        return _version(self.seq_offsets), 0 if self.num_targets is None else _version(self.num_targets)


def _version(tensor: Tensor) -> int:
    """How often it was written to; not counted in inference mode."""
    return -1 if tensor.is_inference() else tensor._version


@dataclass(frozen=True, slots=True)
class LayerKV:
    """Keys and values of one layer over the histories of a batch, kept for cached target attention.

    Attributes:
        k: ``[L, H, Dqk]`` keys of the contextual and history rows.
        v: ``[L, H, Dv]`` values of the same rows.
        layout: their geometry, without targets.
        timestamps: ``[L]`` int64 seconds of the same rows, or ``None``.
    """

    k: Tensor
    v: Tensor
    layout: JaggedLayout
    timestamps: Tensor | None = None
