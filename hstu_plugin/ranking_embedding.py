"""From events to tokens: item and action vectors, summed or interleaved, contextual tokens and slow series."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hstu_plugin.events import Events, check_events
from hstu_plugin.feature_tables import FeatureTables
from hstu_plugin.ranking_config import Categorical, RankingFeatures
from hstu_plugin.ranking_tokens import TokenBuilder, with_targets
from hstu_plugin.sequence import JaggedSequence

__all__ = ["ActionEncoder", "RankingEmbedding", "with_targets"]

_INIT_STD = 0.02


class ActionEncoder(nn.Module):
    """Vector of an action: type bits + bucket of each intensity + contexts, each with an encoder of its own, summed.

    An event at which nothing was done still differs from a candidate: it has the row ``shown``. One of which nobody
    knows what was done has the row ``unknown`` alone.
    """

    def __init__(self, features: RankingFeatures, width: int) -> None:
        super().__init__()
        self.features = features
        self.types = nn.Parameter(torch.empty(len(features.action_types), width))
        self.shown = nn.Parameter(torch.empty(width))
        self.unknown = nn.Parameter(torch.empty(width))
        # One row more than buckets: row 0 is the missing number.
        buckets = [Categorical(name=i.name, num_ids=len(i.boundaries) + 2) for i in features.intensities]
        self.intensities = FeatureTables(buckets, width)
        self.contexts = FeatureTables(features.action_contexts, width)
        # Not buffers: a model in half precision would round them.
        self._bounds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for rows in (self.types, self.shown, self.unknown):
            nn.init.trunc_normal_(rows, std=_INIT_STD)

    def forward(self, events: Events) -> Tensor:
        """``[E, D]``."""
        check_events(events, self.features, actions=True)
        types = events.action_types
        places = torch.arange(self.types.shape[0], device=types.device)
        bits = (types.clamp(min=0)[:, None] >> places) & 1
        vector = self.shown + bits.to(self.types.dtype) @ self.types
        if self.features.intensities:
            vector = vector + self.intensities(self._buckets(events.intensities)).sum(1)
        if self.features.action_contexts:
            vector = vector + self.contexts(events.action_contexts).sum(1)
        return torch.where((types >= 0)[:, None], vector, self.unknown)

    def _buckets(self, numbers: Tensor) -> Tensor:
        """``[E, intensities]``: 0 for a missing number, buckets from 1."""
        key = (numbers.device, numbers.dtype)
        if key not in self._bounds:
            rows = [feature.boundaries for feature in self.features.intensities]
            self._bounds[key] = [torch.tensor(row, dtype=numbers.dtype, device=numbers.device) for row in rows]
        columns = numbers.t().contiguous()
        buckets = [torch.bucketize(own, row, right=True) for own, row in zip(columns, self._bounds[key], strict=True)]
        return (torch.stack(buckets, 1) + 1).masked_fill(numbers.isnan(), 0)


class RankingEmbedding(nn.Module):
    """Tokens of histories, candidates and users, each by itself, so that cached scoring never embeds a history again.

    ``summed``: an event is one token, item + action; a candidate's action is zero, or a learned row. ``interleaved``:
    an event is an item token and an action token; a candidate is an item token.
    """

    def __init__(self, features: RankingFeatures, width: int) -> None:
        super().__init__()
        self.features = features
        self.width = width
        self.items = FeatureTables(features.items, width)
        self.actions = ActionEncoder(features, width)
        self.users = FeatureTables(features.users, width)
        self.series = FeatureTables(features.series, width)
        self.no_action: nn.Parameter | None = None
        if features.learned_no_action:
            self.no_action = nn.Parameter(torch.zeros(width))

    def history(self, events: Events, users: Tensor | None = None, *, items: Tensor | None = None) -> JaggedSequence:
        """``[contextual | history]`` tokens.

        Args:
            events: each user's in order of time.
            users: ``[B, user features]`` int64 ids; ``None`` leaves the contextual tokens out, as for events that are
                appended to a cached history.
            items: ``[E, D]`` what `item_vectors` gives, where it was looked up elsewhere (`mfalcon_serving`).

        Raises:
            ValueError: columns do not fit the features.
        """
        return self._builder().history(events, users, items=items)

    def candidates(self, events: Events, *, items: Tensor | None = None) -> JaggedSequence:
        """One token for each candidate, from item features and request times; actions are not looked at.

        Args:
            events: the candidates.
            items: as in `history`.
        """
        return self._builder().candidates(events, items=items)

    def scoring(self, history: Events, candidates: Events, users: Tensor | None = None) -> JaggedSequence:
        """``[contextual | history | targets]`` tokens: every candidate behind the whole history."""
        return with_targets(self.history(history, users), self.candidates(candidates))

    def generative(
        self, history: Events, following: Events, users: Tensor | None = None
    ) -> tuple[JaggedSequence, Tensor]:
        """Interleaved tokens of both as one history, and the rows of the item tokens of ``following``.

        As `TokenBuilder.generative`.
        """
        return self._builder().generative(history, following, users)

    def item_vectors(self, events: Events) -> Tensor:
        """``[E, D]``: the item features, summed."""
        return self._builder().item_vectors(events)

    def contextual(self, users: Tensor) -> JaggedSequence:
        """The contextual tokens, one for each user feature; ``users [B, user features]`` int64 ids."""
        return self._builder().contextual(users)

    def _builder(self) -> TokenBuilder:
        return TokenBuilder(
            features=self.features,
            items=self.items,
            users=self.users,
            series=self.series,
            actions=self.actions,
            no_action=self.no_action,
        )
