"""From events to tokens: item and action vectors, summed or interleaved, contextual tokens and slow series."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from hstu_kernels import JaggedLayout
from hstu_plugin.events import Events, check_events, join_events
from hstu_plugin.feature_tables import FeatureTables
from hstu_plugin.jagged_series import compress_runs, concatenate, keep_rows, merge_by_time
from hstu_plugin.ranking_config import Categorical, RankingFeatures, TokenForm
from hstu_plugin.sequence import JaggedSequence

_INIT_STD = 0.02
# A time of their own: the same far distance from every event, whoever else is in the sequence and whatever follows.
_CONTEXTUAL_TIME = 0


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

    def history(self, events: Events, users: Tensor | None = None) -> JaggedSequence:
        """``[contextual | history]`` tokens.

        Args:
            events: each user's in order of time.
            users: ``[B, user features]`` int64 ids; ``None`` leaves the contextual tokens out, as for events that are
                appended to a cached history.

        Raises:
            ValueError: columns do not fit the features.
        """
        tokens, _ = self._with_series(self._event_tokens(events), events)
        return tokens if users is None else self._behind_context(tokens, users)[0]

    def candidates(self, events: Events) -> JaggedSequence:
        """One token for each candidate, from item features and request times; actions are not looked at."""
        vectors = self.item_vectors(events)
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

    def _event_tokens(self, events: Events) -> JaggedSequence:
        items, actions = self.item_vectors(events), self.actions(events)
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
