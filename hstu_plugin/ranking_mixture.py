"""Mixture of transducers over windows: channels are kinds of events, told apart by what the user did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_plugin.config import HSTUConfig, _checked_int
from hstu_plugin.events import Events
from hstu_plugin.jagged_series import keep_rows
from hstu_plugin.ranker import MultiTaskHead
from hstu_plugin.ranking_config import RankingConfig, RankingFeatures, TokenForm
from hstu_plugin.ranking_embedding import RankingEmbedding
from hstu_plugin.ranking_model import RankingBatch, WindowRanker
from hstu_plugin.sequence import JaggedSequence
from hstu_plugin.ultra.mixture import MixtureConfig, MixtureRanker


@dataclass(frozen=True, kw_only=True)
class Channel:
    """Which events of a history a channel sees.

    Attributes:
        actions: names of action types; events at which one of them was done. Empty: all events, also those of which
            nobody knows what was done.
        max_events: the latest of them that are kept; ``None`` for all.
    """

    actions: tuple[str, ...] = ()
    max_events: int | None = None

    def __post_init__(self) -> None:
        if self.max_events is not None:
            _checked_int("max_events", self.max_events, 1)

    def select(self, events: Events, features: RankingFeatures) -> Events:
        """The channel's events.

        Raises:
            ValueError: an action is none of the features' types.
        """
        unknown = [name for name in self.actions if name not in features.action_types]
        if unknown:
            known = ", ".join(features.action_types) or "none"
            raise ValueError(f"actions: expected names of action types ({known}), got {unknown[0]!r}")
        rows = torch.arange(events.items.shape[0], device=events.items.device)
        kept = JaggedSequence(rows, events.layout)
        if self.actions:
            wanted = sum(1 << features.action_types.index(name) for name in set(self.actions))
            types = events.action_types
            kept = keep_rows(kept, (types > 0) & ((types & wanted) != 0))
        if self.max_events is not None:
            kept = kept.keep_recent(self.max_events)
        return events.take(kept.values, kept.layout)


class MixtureModel(WindowRanker):
    """`MixtureRanker` over windows: one embedding for all channels, candidates and contextual tokens shared.

    Args:
        features: in the summed form.
        channels: by name, with the configuration of each one's transducer; one ``embedding_dim`` for all.
        ranking: the tasks.
    """

    def __init__(
        self, features: RankingFeatures, channels: Mapping[str, tuple[Channel, HSTUConfig]], ranking: RankingConfig
    ) -> None:
        super().__init__()
        if features.form is not TokenForm.SUMMED:
            raise ValueError(f"form: expected summed for a mixture of transducers, got {features.form}")
        config = MixtureConfig(channels={name: own for name, (_, own) in channels.items()})
        self.channels = {name: channel for name, (channel, _) in channels.items()}
        self.embedding = RankingEmbedding(features, next(iter(config.channels.values())).embedding_dim)
        self.ranker = MixtureRanker(config, ranking)

    @property
    def head(self) -> MultiTaskHead:  # type: ignore[override]
        return self.ranker.head

    def forward(self, batch: RankingBatch) -> Tensor:
        """As `WindowRanker.forward`."""
        histories = self.histories(batch.history, batch.users)
        scores: Tensor = self.ranker(histories, self.embedding.candidates(batch.candidates))
        return scores

    def histories(self, events: Events, users: Tensor | None = None) -> dict[str, JaggedSequence]:
        """Each channel's tokens, as `RankingEmbedding.history`; for `forward`, prefill and M-FALCON."""
        features = self.embedding.features
        return {
            name: self.embedding.history(channel.select(events, features), users)
            for name, channel in self.channels.items()
        }
