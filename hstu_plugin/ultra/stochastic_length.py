"""Stochastic length: train on parts of long histories (HSTU, section 3.2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from hstu_kernels import JaggedLayout
from hstu_plugin.config import _checked_int, _enum, _expect, _positive, _set
from hstu_plugin.sequence import JaggedSequence


class Sampling(StrEnum):
    """Which events of a shortened history stay.

    ``RECENT``: the latest. ``RANDOM``: any, all alike. ``RECENCY_WEIGHTED``: any, later ones more often.
    """

    RECENT = "recent"
    RANDOM = "random"
    RECENCY_WEIGHTED = "recency_weighted"


@dataclass(frozen=True, kw_only=True)
class StochasticLengthConfig:
    """How often and to what length histories are shortened.

    With ``T = int(N ** (alpha / 2))``, a history of ``n <= T`` events stays whole; a longer one stays whole with
    probability ``N ** alpha / n ** 2`` and otherwise keeps ``T`` events. The expected cost of attention falls from
    ``O(N ** 2)`` to ``O(N ** alpha)``.

    Attributes:
        alpha: in (1, 2]; at 2 nothing is shortened.
        max_seq_len: ``N``, the longest history in events.
        sampling: which events stay.
        recency_power: the ``j``-th of ``n`` events, oldest first, is drawn with weight ``(j / n) ** recency_power``.
    """

    alpha: float = 1.6
    max_seq_len: int = 200
    sampling: Sampling = Sampling.RECENT
    recency_power: float = 1.0

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        _expect(number and 1 < self.alpha <= 2, "alpha", "a number in (1, 2]", self.alpha)
        _checked_int("max_seq_len", self.max_seq_len, 1)
        _set(self, "sampling", _enum(Sampling, "sampling", self.sampling))
        _positive("recency_power", self.recency_power)

    @property
    def threshold(self) -> int:
        """``T``, the length of a shortened history."""
        return int(self.max_seq_len ** (self.alpha / 2))


def draw_lengths(events: Tensor, config: StochasticLengthConfig, generator: torch.Generator | None = None) -> Tensor:
    """``[B]`` int64 events to keep of ``events [B]`` int64."""
    whole = config.max_seq_len**config.alpha / events.double().clamp(min=1).square()
    drawn = torch.rand(events.shape, dtype=torch.float64, device=events.device, generator=generator)
    return torch.where((events <= config.threshold) | (drawn < whole), events, config.threshold)


def shorten(
    seq: JaggedSequence,
    kept: Tensor,
    config: StochasticLengthConfig,
    generator: torch.Generator | None = None,
) -> JaggedSequence:
    """``kept [B]`` int64 events of each history, drawn as the config says, in their old order.

    Contextual rows and targets stay. What is left is a history of its own: a row's next event is the next one kept.

    Raises:
        ValueError: ``kept`` does not fit the batch.
    """
    layout, total = seq.layout, seq.values.shape[0]
    events = count_events(layout)
    if kept.shape != events.shape:
        raise ValueError(f"kept: expected [{layout.batch_size}], got {tuple(kept.shape)}")
    kept = torch.minimum(kept, events)
    rows, ends = layout.row_indices(total), layout.history_ends(total)
    is_event = (rows >= layout.contextual_seq_len) & (rows < ends)
    chosen = ~is_event
    if config.sampling is Sampling.RECENT:
        most = torch.repeat_interleave(kept, layout.seq_lengths, output_size=total)
        chosen |= rows >= ends - most
    else:
        where = is_event.nonzero().squeeze(1)
        ranks = _ranks(layout.sequence_ids(total)[where], _keys(rows, ends, layout, config, generator)[where], events)
        most = torch.repeat_interleave(kept, events, output_size=where.numel())
        chosen[where] = ranks < most
    shorter = JaggedLayout.from_lengths(
        layout.seq_lengths - events + kept,
        max_seq_len=layout.max_seq_len,
        num_targets=layout.num_targets,
        contextual_seq_len=layout.contextual_seq_len,
    )
    times = None if seq.timestamps is None else seq.timestamps[chosen]
    return JaggedSequence(seq.values[chosen], shorter, times)


def stochastic_length(
    seq: JaggedSequence, config: StochasticLengthConfig, generator: torch.Generator | None = None
) -> JaggedSequence:
    """Shorten the histories of a training batch; not for evaluation.

    Args:
        seq: rows of any kind (ids or vectors) in ``[contextual | history | targets]``.
        generator: source of all draws, on the device of ``seq``.
    """
    return shorten(seq, draw_lengths(count_events(seq.layout), config, generator), config, generator)


def count_events(layout: JaggedLayout) -> Tensor:
    """``[B]`` int64 history rows without the contextual ones."""
    return (layout.history_lengths - layout.contextual_seq_len).clamp(min=0)


def _keys(
    rows: Tensor, ends: Tensor, layout: JaggedLayout, config: StochasticLengthConfig, generator: torch.Generator | None
) -> Tensor:
    """``[L]`` random keys, the largest of which are a weighted draw without replacement (Gumbel's trick)."""
    drawn = torch.rand(rows.shape, dtype=torch.float64, device=rows.device, generator=generator)
    noise = -torch.log(-torch.log(drawn.clamp(1e-300, 1 - 1e-16)))
    if config.sampling is Sampling.RANDOM:
        return noise
    place = (rows - layout.contextual_seq_len + 1).clamp(min=1).double()
    count = (ends - layout.contextual_seq_len).clamp(min=1).double()
    return noise + config.recency_power * torch.log(place / count)


def _ranks(ids: Tensor, keys: Tensor, events: Tensor) -> Tensor:
    """``[E]`` place of each event in its own sequence by falling key; ``ids`` rise, ``events [B]`` count them."""
    by_key = torch.argsort(keys, descending=True)
    order = by_key[torch.argsort(ids[by_key], stable=True)]
    starts = torch.repeat_interleave(events.cumsum(0) - events, events, output_size=ids.numel())
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(ids.numel(), device=ids.device) - starts
    return ranks
