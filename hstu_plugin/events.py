"""What happened between users and items, as ids: the input of a ranker's embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hstu_kernels import JaggedLayout
from hstu_plugin.jagged_series import concatenate
from hstu_plugin.ranking_config import Categorical, RankingFeatures
from hstu_plugin.sequence import JaggedSequence

UNKNOWN_ACTION = -1


@dataclass(frozen=True, slots=True)
class Events:
    """Events of several users, each user's in order of time. Columns are those of `RankingFeatures`.

    Attributes:
        layout: where the users' events lie; no contextual rows, no targets.
        items: ``[E, item features]`` int64 ids, 0 unknown.
        timestamps: ``[E]`` int64 seconds; ``None`` where unknown.
        action_types: ``[E]`` int64, bit ``t`` for an action of type ``t``; 0 where the item was shown and nothing was
            done, -1 where nobody knows.
        intensities: ``[E, intensities]`` float; NaN unknown.
        action_contexts: ``[E, action contexts]`` int64 ids, 0 unknown.
        series: ``[E, series]`` int64 ids, the values in force at the event.
    """

    layout: JaggedLayout
    items: Tensor
    timestamps: Tensor | None
    action_types: Tensor
    intensities: Tensor
    action_contexts: Tensor
    series: Tensor

    def __post_init__(self) -> None:
        rows = self.items.shape[0]
        for name, dims in (("items", 2), ("action_types", 1), ("action_contexts", 2), ("series", 2)):
            tensor = getattr(self, name)
            if tensor.dim() != dims or tensor.dtype != torch.int64 or tensor.shape[0] != rows:
                raise ValueError(
                    f"{name}: expected {dims}-D int64 with {rows} rows as items, "
                    f"got {tuple(tensor.shape)} {tensor.dtype}"
                )
        if self.intensities.dim() != 2 or self.intensities.shape[0] != rows or not self.intensities.is_floating_point():
            raise ValueError(
                f"intensities: expected [{rows}, intensities] float, "
                f"got {tuple(self.intensities.shape)} {self.intensities.dtype}"
            )
        if self.layout.num_targets is not None or self.layout.contextual_seq_len:
            raise ValueError("layout: expected events alone, got contextual rows or targets")

    @classmethod
    def without_actions(cls, layout: JaggedLayout, items: Tensor, timestamps: Tensor | None = None) -> Events:
        """Candidates: ``items [T, item features]`` and their request times ``[T]``; nothing was done yet."""
        rows = items.shape[0]
        none = items.new_zeros(rows, 0)
        unknown = items.new_full((rows,), UNKNOWN_ACTION)
        return cls(layout, items, timestamps, unknown, torch.zeros(rows, 0, device=items.device), none, none)

    def take(self, rows: Tensor, layout: JaggedLayout) -> Events:
        """These rows, laid out anew."""
        return self._map(lambda tensor: tensor[rows], layout)

    def to(self, device: torch.device | str) -> Events:
        """The same events on another device."""
        offsets = self.layout.seq_offsets.to(device, non_blocking=True)
        moved = replace(self.layout, seq_offsets=offsets)
        return self._map(lambda tensor: tensor.to(device, non_blocking=True), moved)

    def columns(self) -> list[Tensor]:
        """All columns but the items, for `with_columns`."""
        columns = [self.action_types, self.intensities, self.action_contexts, self.series]
        return columns if self.timestamps is None else [*columns, self.timestamps]

    def with_columns(self, layout: JaggedLayout, columns: Sequence[Tensor]) -> Events:
        """The same items beside other `columns`, on another device, too."""
        types, intensities, contexts, series, *times = columns
        return Events(layout, self.items, times[0] if times else None, types, intensities, contexts, series)

    def as_sequence(self, values: Tensor) -> JaggedSequence:
        """``values [E, ...]``, one row for each event, at the events' times."""
        return JaggedSequence(values, self.layout, self.timestamps)

    def _map(self, change: Callable[[Tensor], Tensor], layout: JaggedLayout) -> Events:
        return Events(
            layout,
            change(self.items),
            None if self.timestamps is None else change(self.timestamps),
            change(self.action_types),
            change(self.intensities),
            change(self.action_contexts),
            change(self.series),
        )


def join_events(history: Events, following: Events) -> tuple[Events, Tensor]:
    """Each user's history and the events that follow it, and the rows ``[following events]`` of the latter."""
    timed = history.timestamps is not None and following.timestamps is not None
    pair = (history, following)
    rows = torch.arange(sum(e.items.shape[0] for e in pair), device=history.items.device)
    ranges = torch.split_with_sizes(rows, [e.items.shape[0] for e in pair])
    parts = [JaggedSequence(own, events.layout) for own, events in zip(ranges, pair, strict=True)]
    joined, (_, places) = concatenate(parts)
    stacked = Events(
        JaggedLayout.from_lengths(torch.zeros(0, dtype=torch.int64)),
        torch.cat([e.items for e in pair]),
        torch.cat([e.timestamps for e in pair if e.timestamps is not None]) if timed else None,
        torch.cat([e.action_types for e in pair]),
        torch.cat([e.intensities for e in pair]),
        torch.cat([e.action_contexts for e in pair]),
        torch.cat([e.series for e in pair]),
    )
    return stacked.take(joined.values, joined.layout), places


def check_events(events: Events, features: RankingFeatures, *, actions: bool) -> None:
    """Raise ``ValueError`` unless the columns fit; of candidates (``actions`` False) only the item's are looked at."""
    wanted = [("items", len(features.items))]
    if actions:
        wanted += [
            ("intensities", len(features.intensities)),
            ("action_contexts", len(features.action_contexts)),
            ("series", len(features.series)),
        ]
    for name, width in wanted:
        got = getattr(events, name).shape[1]
        if got != width:
            raise ValueError(f"{name}: expected {width} columns as in RankingFeatures.{name}, got {got}")


def check_ids(name: str, ids: Tensor, features: tuple[Categorical, ...]) -> None:
    """Raise ``ValueError`` unless ``ids [R, features]`` lie inside their tables. Reads the device."""
    if not ids.numel():
        return
    low, high = ids.amin(0).tolist(), ids.amax(0).tolist()
    for feature, least, most in zip(features, low, high, strict=True):
        if least < 0 or most >= feature.num_ids:
            raise ValueError(f"{name}: expected ids of {feature.name} in [0, {feature.num_ids}), got {least} to {most}")
