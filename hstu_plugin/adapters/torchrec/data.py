"""From pieces of parquet files to the batches of one rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hstu_kernels import JaggedLayout
from hstu_plugin.adapters.torchrec.batch import SequenceBatch
from hstu_plugin.adapters.torchrec.options import DataOptions, NegativePool, TaskName, TrainOptions
from hstu_plugin.adapters.torchrec.parquet import (
    Column,
    FileColumns,
    OnCorrupt,
    find_files,
    join,
    list_row_groups,
)
from hstu_plugin.adapters.torchrec.schema import FeatureSchema, of_candidates
from hstu_plugin.adapters.torchrec.stream import Piece, PieceStream, StreamPlan
from hstu_plugin.config import NegativeSource
from hstu_plugin.sequence import JaggedSequence

_NEGATIVES, _LENGTHS, _IDS = 3, 4, 5
# More steps than a pipeline looks ahead.
_AHEAD = 8


class HistorySampler(Protocol):
    """Shortens the histories of a rank's training batch; `stochastic_length` and `LoadBalancedLength` are such.

    ``seq.values`` are row numbers ``[L]`` in ``[history | targets]``, with the times of the events; what comes back
    says which rows stay. Called once a step on every rank, empty batches included. ``generator`` follows from (seed,
    epoch, step, rank). ``state_dict`` is plain data that goes into checkpoints.
    """

    def __call__(self, seq: JaggedSequence, *, generator: torch.Generator | None = None) -> JaggedSequence: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class SkippedData:
    """Rows that could not be read so far, on this rank, and why."""

    rows: int = 0
    reasons: list[str] = field(default_factory=list)


def plan_stream(options: TrainOptions, *, training: bool) -> tuple[StreamPlan, list[str]]:
    """List the row groups of the training or evaluation files; messages about files that are left out.

    Raises:
        ValueError: no path is given, the files hold no row, or their columns do not fit.
    """
    data = options.data
    pattern = data.train if training else data.eval
    if pattern is None:
        raise ValueError("data.eval: expected parquet files to evaluate on, got nothing")
    columns = file_columns(options, training=training)
    groups, skipped = list_row_groups(find_files(pattern), columns, data.on_corrupt)
    plan = StreamPlan(
        groups=tuple(groups),
        columns=columns,
        batch_size=data.batch_size,
        num_shards=data.data_shards,
        bucket_steps=data.bucket_steps,
        shuffle=data.shuffle and training,
        seed=options.run.seed,
        on_corrupt=OnCorrupt(data.on_corrupt),
    )
    if plan.num_rows == 0:
        raise ValueError(f"data: expected rows in {pattern!r}, found none")
    return plan, skipped


def file_columns(options: TrainOptions, *, training: bool) -> FileColumns:
    """The columns that training, or evaluation, reads.

    Raises:
        ValueError: evaluation of a retrieval lacks the column of the held-out items.
    """
    schema = options.schema
    if options.task is TaskName.RANKING:
        assert options.ranking is not None
        numbers = [key for key in schema.number_keys if key not in (schema.request_time, schema.user)]
        measures = list(schema.measure_keys)
        if not training:
            # What was done with a candidate is what is to be predicted.
            hidden = () if schema.actions is None else (*schema.actions.number_keys, *schema.actions.measure_keys)
            numbers, measures = (
                [key for key in keys if key not in map(of_candidates, hidden)] for keys in (numbers, measures)
            )
            numbers += [] if schema.user is None else [schema.user]
        return FileColumns(
            schema=schema,
            ids=(*schema.history, *schema.series, *schema.contextual, *schema.candidates),
            numbers=tuple(numbers),
            measures=tuple(measures),
            labels=tuple(task.name for task in options.ranking.tasks),
        )
    ids = (*schema.history, *schema.contextual)
    times = (schema.time,) if training else (schema.time, schema.request_time)
    if not training:
        if schema.candidate is None:
            raise ValueError("schema.candidate: expected the column of the held-out items to evaluate on, got None")
        ids = (*ids, schema.candidate)
    return FileColumns(schema=schema, ids=ids, numbers=tuple(key for key in times if key is not None))


class RankBatches:
    """The batches of one rank, from any position on.

    Args:
        options: of the training. plan: equal on all ranks. rank, world_size: of this process.
        training: draw negatives and shorten histories.
        sampler: of training histories; ``None`` keeps them whole.
        skipped: counts what could not be read.
    """

    def __init__(
        self,
        options: TrainOptions,
        plan: StreamPlan,
        *,
        rank: int,
        world_size: int,
        training: bool,
        sampler: HistorySampler | None = None,
        skipped: SkippedData | None = None,
    ) -> None:
        if plan.num_shards < world_size:
            raise ValueError(
                f"data.data_shards: expected at least one for each of {world_size} ranks, got {plan.num_shards}; "
                "raise data.batch_size or data.data_shards"
            )
        self.options, self.plan = options, plan
        self.rank, self.world_size = rank, world_size
        self.training, self.sampler = training, sampler
        self.skipped = SkippedData() if skipped is None else skipped
        self._states: deque[tuple[tuple[int, int], dict[str, Any]]] = deque(maxlen=_AHEAD)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[SequenceBatch]:
        """Batches of an epoch; every rank yields the same number of them."""
        return self.epochs(range(epoch, epoch + 1), start_step)

    def epochs(self, epochs: range, start_step: int = 0) -> Iterator[SequenceBatch]:
        """Batches of several epochs, the first from ``start_step`` on; loading processes live through all of them."""
        stream = PieceStream(
            self.plan, epochs=epochs, start_step=start_step, rank=self.rank, world_size=self.world_size
        )
        workers = min(self.options.data.workers, len(stream.shards))
        loader = DataLoader(stream, batch_size=None, num_workers=workers, multiprocessing_context=_context(workers))
        pieces = iter(loader)
        for epoch, step in stream.steps():
            yield self._batch([next(pieces) for _ in range(max(1, workers))], epoch, step)

    def sampler_state(self, epoch: int, step: int) -> dict[str, Any] | None:
        """The sampler's state before it draws for a step: one of the latest, or the next; ``None`` without sampler."""
        if self.sampler is None:
            return None
        drawn = dict(self._states)
        return drawn[epoch, step] if (epoch, step) in drawn else self.sampler.state_dict()

    def _batch(self, pieces: list[Piece], epoch: int, step: int) -> SequenceBatch:
        for piece in pieces:
            self.skipped.rows += piece.lost
            self.skipped.reasons.extend(piece.reasons)
        schema, data = self.options.schema, self.options.data
        columns = join([piece.columns for piece in pieces])
        history = [key for key in schema.along_history if key in columns]
        columns |= {key: columns[key].last(data.max_history) for key in history}
        if self.training and self.sampler is not None:
            self._states.append(((epoch, step), self.sampler.state_dict()))
            columns |= self._sampled(columns, history, epoch, step)
        if self.training and data.id_dropout:
            columns |= self._dropped(columns, epoch, step)
        if schema.negative is not None:
            columns[schema.negative] = self._negatives(max(1, len(columns[schema.item].lengths)), epoch, step)
        return to_batch(columns, schema, self.plan.columns.labels)

    def _dropped(self, columns: dict[str, Column], epoch: int, step: int) -> dict[str, Column]:
        """The columns of ids that `DataOptions.id_dropout` names, with some of them unknown."""
        draw = np.random.default_rng((self.options.run.seed, epoch, step, self.rank, _IDS))
        found = {}
        for key in self.options.schema.id_keys:
            rate = self.options.data.id_dropout.get(self.options.schema.table_of(key).name, 0.0)
            if rate and key in columns:
                values = columns[key].values
                found[key] = Column(np.where(draw.random(len(values)) < rate, 0, values), columns[key].offsets)
        return found

    def _negatives(self, users: int, epoch: int, step: int) -> Column:
        """The same on all ranks, all with the first user: drawn ones, or the whole table; none in evaluation."""
        options, schema = self.options, self.options.schema
        items = schema.table_of(schema.item).num_embeddings
        values = np.zeros(0, dtype=np.int64)
        if self.training and options.negative_pool is NegativePool.TABLE:
            values = np.arange(1, items)
        elif self.training and options.retrieval.negatives is NegativeSource.UNIFORM:
            draw = np.random.default_rng((options.run.seed, epoch, step, _NEGATIVES))
            values = draw.integers(1, items, options.retrieval.num_negatives)
        return Column(values, np.concatenate([[0], np.full(users, len(values))]))

    def _sampled(self, columns: dict[str, Column], history: list[str], epoch: int, step: int) -> dict[str, Column]:
        assert self.sampler is not None
        schema = self.options.schema
        events = torch.from_numpy(columns[schema.item].lengths)
        targets = torch.zeros_like(events)
        if schema.candidate in columns:
            targets = torch.from_numpy(columns[str(schema.candidate)].lengths)
        layout = JaggedLayout.from_lengths(events + targets, num_targets=targets)
        rows = torch.arange(int(layout.seq_offsets[-1]))
        is_event = layout.row_indices(rows.numel()) < layout.history_ends(rows.numel())
        times = None
        if schema.time is not None:
            times = torch.zeros(rows.numel(), dtype=torch.int64)
            times[is_event] = torch.from_numpy(columns[schema.time].values)
        seed = np.random.SeedSequence((self.options.run.seed, epoch, step, self.rank, _LENGTHS)).generate_state(1)[0]
        drawn = self.sampler(JaggedSequence(rows, layout, times), generator=torch.Generator().manual_seed(int(seed)))
        stays = torch.zeros(rows.numel(), dtype=torch.bool)
        stays[drawn.values] = True
        chosen = stays[is_event].numpy()
        lengths = (drawn.layout.history_lengths).numpy()
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return {key: Column(columns[key].values[chosen], offsets) for key in history}


def to_batch(columns: dict[str, Column], schema: FeatureSchema, labels: tuple[str, ...] = ()) -> SequenceBatch:
    """A batch of checked columns; keys of the schema that are not there are empty, and there is always one user."""
    users = max(1, len(columns[schema.item].lengths))
    ids = {key: _padded(columns.get(key), users) for key in schema.id_keys}
    single = (schema.request_time, schema.user)
    numbers = {key: _padded(columns.get(key), users, one=key in single) for key in schema.number_keys}
    measures = {key: _padded(columns.get(key), users, dtype=np.float32) for key in schema.measure_keys}
    stacked = torch.stack([torch.from_numpy(columns[name].values) for name in labels], dim=1) if labels else None
    return SequenceBatch(
        _keyed(ids), _keyed(numbers) if numbers else None, stacked, _keyed(measures) if measures else None
    )


def data_identity(plan: StreamPlan, options: DataOptions) -> dict[str, Any]:
    """What must not change for a position in the data to mean the same rows."""
    return {
        "rows": plan.num_rows,
        "row_groups": len(plan.groups),
        "batch_size": plan.batch_size,
        "data_shards": plan.num_shards,
        "bucket_steps": plan.bucket_steps,
        "shuffle": plan.shuffle,
        "seed": plan.seed,
        "max_history": options.max_history,
    }


def _padded(column: Column | None, users: int, *, one: bool = False, dtype: Any = np.int64) -> Column:
    """``users`` rows: nothing for keys that a step does not use, and for the one user of a rank without any."""
    if column is not None and len(column.lengths) == users:
        return column
    return Column(np.zeros(int(one) * users, dtype=dtype), np.arange(users + 1) * int(one))


def _keyed(columns: dict[str, Column]) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=list(columns),
        values=torch.from_numpy(np.concatenate([column.values for column in columns.values()])),
        lengths=torch.from_numpy(np.concatenate([column.lengths for column in columns.values()])),
    )


def _context(workers: int) -> str | None:
    # A fork of a process with running threads may inherit their locks.
    return "forkserver" if workers else None
