"""From events and the vectors of their ids to tokens, whoever holds the tables."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from hstu_kernels import JaggedLayout
from hstu_plugin.events import Events, check_events, join_events
from hstu_plugin.jagged_series import compress_runs, concatenate, keep_rows, merge_by_time
from hstu_plugin.ranking_config import RankingFeatures, TokenForm
from hstu_plugin.sequence import JaggedSequence

# A time of their own: the same far distance from every event, whoever else is in the sequence and whatever follows.
_CONTEXTUAL_TIME = 0


class Lookup(Protocol):
    """Vectors of several features: `hstu_plugin.feature_tables.FeatureTables`, or rows looked up elsewhere."""

    def __len__(self) -> int: ...

    def __call__(self, ids: Tensor) -> Tensor:
        """``ids [R, features]`` to ``[R, features, D]``."""

    def one(self, feature: int, ids: Tensor) -> Tensor:
        """``[R, D]`` of one feature; ``ids [R]``."""


class Actions(Protocol):
    """Vectors ``[E, D]`` of what was done at events."""

    def __call__(self, events: Events) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBuilder:
    """The forms of the tokens; `hstu_plugin.ranking_embedding.RankingEmbedding` documents them.

    Attributes:
        features: what there is. items, users, series: their vectors. actions: those of what was done.
        no_action: ``[D]`` of candidates, or ``None`` for zero.
    """

    features: RankingFeatures
    items: Lookup
    users: Lookup
    series: Lookup
    actions: Actions
    no_action: Tensor | None = None

    def history(self, events: Events, users: Tensor | None = None, *, items: Tensor | None = None) -> JaggedSequence:
        """``[contextual | history]`` tokens.

        Args:
            events: each user's in order of time.
            users: ``[B, user features]`` int64 ids; ``None`` leaves the contextual tokens out, as for events that are
                appended to a cached history.
            items: ``[E, D]`` what `item_vectors` gives, where it was looked up elsewhere.

        Raises:
            ValueError: columns do not fit the features.
        """
        tokens, _ = self._with_series(self._event_tokens(events, items), events)
        return tokens if users is None else self._behind_context(tokens, users)[0]

    def candidates(self, events: Events, *, items: Tensor | None = None) -> JaggedSequence:
        """One token for each candidate, from item features and request times; actions are not looked at.

        Args:
            events: the candidates.
            items: as in `history`.
        """
        vectors = self.item_vectors(events) if items is None else items
        return events.as_sequence(vectors if self.no_action is None else vectors + self.no_action)

    def scoring(self, history: Events, candidates: Events, users: Tensor | None = None) -> JaggedSequence:
        """``[contextual | history | targets]`` tokens: every candidate behind the whole history."""
        return with_targets(self.history(history, users), self.candidates(candidates))

    def generative(
        self, history: Events, following: Events, users: Tensor | None = None
    ) -> tuple[JaggedSequence, Tensor]:
        """Interleaved tokens of both as one history, and the rows of the item tokens of ``following``.

        The row of item ``i`` sees the items and actions before it and not its own action, which comes behind it.

        Returns:
            The sequence, and ``[following events]`` int64 rows, in their order.

        Raises:
            ValueError: the tokens are summed, so that an item's token holds its action.
        """
        if self.features.form is not TokenForm.INTERLEAVED:
            raise ValueError(
                f"form: expected interleaved, got {self.features.form}; a summed token holds the action that is to be "
                "predicted. Train on candidates behind a history (scoring)"
            )
        events, places = join_events(history, following)
        # Series of the history alone: what is known of the following events is what a candidate shows.
        tokens, moved = self._with_series(self._event_tokens(events), history)
        rows = moved[2 * places]
        if users is None:
            return tokens, rows
        placed, moved = self._behind_context(tokens, users)
        return placed, moved[rows]

    def item_vectors(self, events: Events) -> Tensor:
        """``[E, D]``: the item features, summed."""
        check_events(events, self.features, actions=False)
        summed: Tensor = self.items(events.items).sum(1)
        return summed

    def contextual(self, users: Tensor) -> JaggedSequence:
        """The contextual tokens, one for each user feature; ``users [B, user features]`` int64 ids."""
        wanted = (users.shape[0], len(self.users))
        if users.shape != wanted:
            raise ValueError(f"users: expected [B, {wanted[1]}] ids, got {tuple(users.shape)}")
        values = self.users(users).flatten(0, 1)
        lengths = torch.full((users.shape[0],), len(self.users), device=users.device)
        layout = JaggedLayout.from_lengths(lengths, max_seq_len=len(self.users))
        return JaggedSequence(values, layout, users.new_full((values.shape[0],), _CONTEXTUAL_TIME))

    def _event_tokens(self, events: Events, items: Tensor | None = None) -> JaggedSequence:
        items, actions = self.item_vectors(events) if items is None else items, self.actions(events)
        if self.features.form is TokenForm.SUMMED:
            return events.as_sequence(items + actions)
        values = torch.stack([items, actions], 1).flatten(0, 1)
        layout = JaggedLayout(events.layout.seq_offsets * 2, events.layout.max_seq_len * 2)
        times = None if events.timestamps is None else events.timestamps.repeat_interleave(2)
        return JaggedSequence(values, layout, times)

    def _with_series(self, tokens: JaggedSequence, source: Events) -> tuple[JaggedSequence, Tensor]:
        """The tokens with those of the slow series among them, and the new places of the former."""
        if not self.features.series:
            return tokens, torch.arange(tokens.values.shape[0], device=tokens.values.device)
        parts = []
        for column in range(len(self.series)):
            ids = source.series[:, column]
            kept = keep_rows(source.as_sequence(ids), compress_runs(ids, source.layout))
            parts.append(kept.with_values(self.series.one(column, kept.values)))
        merged, places = merge_by_time([*parts, tokens])
        return merged, places[-1]

    def _behind_context(self, tokens: JaggedSequence, users: Tensor) -> tuple[JaggedSequence, Tensor]:
        if users.shape[:1] != (tokens.layout.batch_size,):
            raise ValueError(f"users: expected {tokens.layout.batch_size} rows as events, got {tuple(users.shape)}")
        context = self.contextual(users)
        if tokens.timestamps is None:
            context = replace(context, timestamps=None)
        joined, (_, places) = concatenate([context, tokens])
        return replace(joined, layout=replace(joined.layout, contextual_seq_len=len(self.users))), places


def with_targets(history: JaggedSequence, targets: JaggedSequence) -> JaggedSequence:
    """``[contextual | history | targets]`` from ``[contextual | history]`` and each user's targets."""
    if history.layout.num_targets is not None:
        raise ValueError("history: expected a layout without targets")
    context = history.layout.contextual_seq_len
    bare = replace(history, layout=replace(history.layout, contextual_seq_len=0))
    joined, _ = concatenate([bare, targets])
    layout = replace(joined.layout, num_targets=targets.layout.seq_lengths, contextual_seq_len=context)
    return replace(joined, layout=layout)
