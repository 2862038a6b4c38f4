"""Several jagged series of the same users as one: in sequence, by time, and with repeats left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hstu_kernels import JaggedLayout
from hstu_plugin.sequence import JaggedSequence


def compress_runs(values: Tensor, layout: JaggedLayout) -> Tensor:
    """Which rows begin a run of equal values (HSTU, section 2.1: slowly changing series).

    Args:
        values: ``[L]`` ids, each user's in order of time.
        layout: of the rows.

    Returns:
        ``[L]`` bool, True for a user's first row and wherever a value differs from the one before.
    """
    if values.dim() != 1:
        raise ValueError(f"values: expected [L], got {tuple(values.shape)}; compress one series at a time")
    begins = layout.row_indices(values.shape[0]) == 0
    return begins | (values != values.roll(1))


def keep_rows(seq: JaggedSequence, kept: Tensor) -> JaggedSequence:
    """The rows with ``kept [L]`` True; sequences may become empty. No contextual rows or targets."""
    _plain("seq", seq)
    if kept.shape != seq.values.shape[:1] or kept.dtype != torch.bool:
        raise ValueError(f"kept: expected [{seq.values.shape[0]}] bool, got {tuple(kept.shape)} {kept.dtype}")
    layout = seq.layout
    counts = torch.zeros(layout.batch_size, dtype=torch.int64, device=kept.device)
    counts.index_add_(0, layout.sequence_ids(kept.shape[0]), kept.long())
    times = None if seq.timestamps is None else seq.timestamps[kept]
    return JaggedSequence(seq.values[kept], JaggedLayout.from_lengths(counts, max_seq_len=layout.max_seq_len), times)


def concatenate(parts: Sequence[JaggedSequence]) -> tuple[JaggedSequence, list[Tensor]]:
    """Each user's rows of the first part, then of the second, and so on.

    Args:
        parts: of the same users, without contextual rows or targets; timestamps in all or in none.

    Returns:
        The sequences, and for each part the new places of its rows, ``[L_part]`` int64.
    """
    return _join(parts, lambda ids, _times: torch.argsort(ids, stable=True))


def merge_by_time(parts: Sequence[JaggedSequence]) -> tuple[JaggedSequence, list[Tensor]]:
    """Each user's rows of all parts by time; at equal times earlier parts first, and a part keeps its own order.

    Put series that are known before an event (a user's city) in front of the events, so that they precede it.

    Args:
        parts: of the same users, with timestamps, without contextual rows or targets.

    Returns:
        As `concatenate`.
    """
    for index, part in enumerate(parts):
        if part.timestamps is None:
            raise ValueError(f"parts[{index}]: expected timestamps to merge by, got None")

    def order(ids: Tensor, times: Tensor | None) -> Tensor:
        assert times is not None
        by_time = torch.argsort(times, stable=True)
        return by_time[torch.argsort(ids[by_time], stable=True)]

    return _join(parts, order)


def _join(
    parts: Sequence[JaggedSequence], order: Callable[[Tensor, Tensor | None], Tensor]
) -> tuple[JaggedSequence, list[Tensor]]:
    if not parts:
        raise ValueError("parts: expected at least one, got none")
    batch, timed = parts[0].layout.batch_size, parts[0].timestamps is not None
    for index, part in enumerate(parts):
        _plain(f"parts[{index}]", part)
        if part.layout.batch_size != batch:
            raise ValueError(f"parts[{index}]: expected {batch} users as parts[0], got {part.layout.batch_size}")
        if (part.timestamps is not None) != timed:
            raise ValueError(f"parts[{index}]: expected timestamps in all parts or in none")
    ids = torch.cat([part.layout.sequence_ids(part.values.shape[0]) for part in parts])
    times = torch.cat([part.timestamps for part in parts if part.timestamps is not None]) if timed else None
    rows = order(ids, times)
    places = torch.empty_like(rows)
    places[rows] = torch.arange(rows.numel(), device=rows.device)
    lengths = torch.stack([part.layout.seq_lengths for part in parts]).sum(0)
    layout = JaggedLayout.from_lengths(lengths, max_seq_len=sum(part.layout.max_seq_len for part in parts))
    values = torch.cat([part.values for part in parts])[rows]
    joined = JaggedSequence(values, layout, None if times is None else times[rows])
    return joined, list(torch.split_with_sizes(places, [part.values.shape[0] for part in parts]))


def _plain(name: str, seq: JaggedSequence) -> None:
    if seq.layout.num_targets is not None or seq.layout.contextual_seq_len:
        raise ValueError(f"{name}: expected rows without contextual rows or targets; add those last")
