"""From looked-up features to events with their actions, and to the tokens of a ranker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from hstu_kernels import JaggedLayout
from hstu_plugin.adapters.torchrec.batch import SequenceBatch, check_keys
from hstu_plugin.adapters.torchrec.schema import FeatureSchema, of_candidates
from hstu_plugin.adapters.torchrec.sequence import awaited, match_lengths, pooled, summed
from hstu_plugin.events import Events
from hstu_plugin.ranking_embedding import ActionEncoder
from hstu_plugin.ranking_tokens import TokenBuilder


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Histories and candidates whose ids are rows of what was looked up.

    Attributes:
        history, candidates: events; those of candidates have their actions where the batch has them.
        users: ``[B, contextual keys]`` int64 rows.
        builder: makes tokens of them.
    """

    history: Events
    candidates: Events
    users: Tensor
    builder: TokenBuilder

    def with_actions(self, names: tuple[str, ...]) -> Events:
        """The events of the history at which any of these types was done; all events for no name."""
        if not names:
            return self.history
        bits = sum(1 << self.builder.features.action_types.index(name) for name in names)
        types = self.history.action_types
        rows = ((types >= 0) & ((types & bits) != 0)).nonzero().squeeze(1)
        owners = self.history.layout.sequence_ids(types.numel())[rows]
        counts = torch.zeros(self.history.layout.batch_size, dtype=torch.int64, device=types.device)
        counts.index_add_(0, owners, torch.ones_like(owners))
        layout = JaggedLayout.from_lengths(counts, max_seq_len=self.history.layout.max_seq_len)
        return self.history.take(rows, layout)


@dataclass(frozen=True, slots=True)
class RowTables:
    """Rows that were looked up, in the place of tables: a row's number is its id.

    Attributes:
        vectors: ``[rows, D]`` of each feature. width: ``D``.
    """

    vectors: Sequence[Tensor]
    width: int

    def __len__(self) -> int:
        return len(self.vectors)

    def __call__(self, ids: Tensor) -> Tensor:
        """``ids [R, features]`` to ``[R, features, D]``."""
        if not self.vectors:
            return torch.zeros(ids.shape[0], 0, self.width, device=ids.device)
        return torch.stack([self.one(feature, ids[:, feature]) for feature in range(len(self))], 1)

    def one(self, feature: int, ids: Tensor) -> Tensor:
        """``[R, D]`` of one feature; ``ids [R]``."""
        return self.vectors[feature].index_select(0, ids)


class KJTToEvents(nn.Module):
    """``dict[str, JaggedTensor] -> EventBatch``: the counterpart of `KJTToSequence` for schemas with ``actions``.

    Holds the small tables of the actions; a leaf for TorchRec's tracer. Tokens are those of
    `hstu_plugin.ranking_embedding.RankingEmbedding` over the same weights.

    Args:
        schema: keys of the batch, with ``actions``. width: of the vectors.
    """

    def __init__(self, schema: FeatureSchema, width: int) -> None:
        super().__init__()
        if schema.actions is None or schema.candidate is None:
            raise ValueError("schema: expected actions and the key of the candidates, got None")
        self.schema, self.columns, self.width = schema, schema.actions, width
        self.features = schema.actions.features(users=schema.contextual, series=schema.series)
        self.actions = ActionEncoder(self.features, width)
        self.no_action: nn.Parameter | None = None
        if self.features.learned_no_action:
            self.no_action = nn.Parameter(torch.zeros(width))

    def forward(self, vectors: Mapping[str, JaggedTensor], batch: SequenceBatch) -> EventBatch:
        """Arrange the events.

        Args:
            vectors: from an EmbeddingCollection: key -> values ``[n, D]`` with lengths ``[B]``.
            batch: what was looked up, with its numbers and measures.

        Raises:
            ValueError: a key is missing or lengths do not agree. TypeError: times are not int64.
        """
        schema = self.schema
        assert schema.candidate is not None
        found = awaited(vectors, self.width)
        check_keys(list(found), batch.numbers, schema, batch.measures)
        items, shown = summed(found, schema.history), summed(found, schema.candidates)
        rows = torch.arange(items.shape[0] + shown.shape[0], device=items.device)
        cut = items.shape[0]
        history_layout, shown_layout = (
            JaggedLayout.from_lengths(
                found[key].lengths().long(),
                max_seq_len=None if batch.counts is None else max(batch.counts[key], default=0),
            )
            for key in (schema.item, schema.candidate)
        )
        series = [_canonical(batch.features[key], found[key], found[schema.item], key) for key in schema.series]
        history = Events(
            history_layout,
            rows[:cut, None],
            _times(batch.numbers, schema.time, history_layout),
            *self._actions(batch, self.columns.number_keys, self.columns.measure_keys, history_layout),
            torch.stack(series, 1) if series else rows.new_zeros(cut, 0),
        )
        candidates = self._candidates(batch, shown_layout, rows[cut:])
        contextual = [pooled(found[key]) for key in schema.contextual]
        users = torch.arange(history_layout.batch_size, device=rows.device)[:, None].expand(-1, len(contextual))
        builder = TokenBuilder(
            features=self.features,
            items=RowTables([torch.cat([items, shown])], self.width),
            users=RowTables(contextual, self.width),
            series=RowTables([found[key].values() for key in schema.series], self.width),
            actions=self.actions,
            no_action=self.no_action,
        )
        return EventBatch(history, candidates, users, builder)

    def _candidates(self, batch: SequenceBatch, layout: JaggedLayout, rows: Tensor) -> Events:
        times = _times(batch.numbers, self.schema.candidate_time, layout)
        if not self.schema.reads_candidate_actions or batch.numbers is None:
            return Events.without_actions(layout, rows[:, None], times)
        keys = [of_candidates(key) for key in self.columns.number_keys]
        if batch.numbers[keys[0]].values().numel() != rows.numel():
            # A batch to be scored: nothing has been done yet.
            return Events.without_actions(layout, rows[:, None], times)
        measures = [of_candidates(key) for key in self.columns.measure_keys]
        actions = self._actions(batch, keys, measures, layout)
        return Events(layout, rows[:, None], times, *actions, rows.new_zeros(rows.numel(), len(self.schema.series)))

    def _actions(
        self, batch: SequenceBatch, numbers: Sequence[str], measures: Sequence[str], layout: JaggedLayout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Types ``[E]``, intensities ``[E, intensities]``, contexts ``[E, contexts]``."""
        assert batch.numbers is not None
        whole = [_column(batch.numbers, key, layout) for key in numbers]
        if not measures:
            floats = self.actions.shown.new_zeros(whole[0].numel(), 0)
        else:
            assert batch.measures is not None
            floats = torch.stack([_column(batch.measures, key, layout) for key in measures], 1)
        types, *contexts = whole
        return types, floats, torch.stack(contexts, 1) if contexts else types.new_zeros(types.numel(), 0)


def _column(jagged: KeyedJaggedTensor, key: str, layout: JaggedLayout) -> Tensor:
    own = jagged[key]
    match_lengths(key, own.lengths().long(), layout.seq_lengths)
    values: Tensor = own.values()
    return values


def _times(numbers: KeyedJaggedTensor | None, key: str | None, layout: JaggedLayout) -> Tensor | None:
    return None if key is None or numbers is None else _column(numbers, key, layout)


def _canonical(ids: JaggedTensor, vectors: JaggedTensor, items: JaggedTensor, key: str) -> Tensor:
    """``[E]``: for each id the first row that was looked up for it, so that equal ids stay equal."""
    match_lengths(key, vectors.lengths().long(), items.lengths().long())
    _, groups = torch.unique(ids.values(), return_inverse=True)
    rows = torch.arange(groups.numel(), device=groups.device)
    first = rows.new_full((groups.numel(),), groups.numel()).scatter_reduce(0, groups, rows, "amin")
    return first[groups]
