"""The order in which rows of parquet files reach the ranks: the same global batches whatever the number of ranks.

All rows of an epoch, in an order drawn from (seed, epoch), are cut into ``num_shards`` runs of equal length. Every
step takes ``batch_size / num_shards`` rows of each. Ranks, and workers inside ranks, share the runs out among
themselves: the union is the same global batch, and the position in the data is one number, the step.

Inside a window of ``bucket_steps`` steps a run's rows are sorted by length, so that the rows of one step are of similar
length on all ranks; the order of the steps in a window is drawn anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from hstu_plugin.adapters.torchrec.parquet import (
    Array,
    Column,
    CorruptFile,
    FileColumns,
    OnCorrupt,
    RowGroup,
    join,
    read_row_group,
)

_GROUPS, _ROWS, _STEPS = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPlan:
    """What decides the order of the rows; equal on all ranks.

    Attributes:
        groups: row groups of the data set. columns: what to read.
        batch_size: rows of one step, over all ranks. num_shards: divides ``batch_size``.
        bucket_steps: steps in a window of similar lengths. shuffle: draw an order, or keep the files'.
        seed: of the order. on_corrupt: what to do with a row group that cannot be read.
    """

    groups: tuple[RowGroup, ...]
    columns: FileColumns
    batch_size: int
    num_shards: int
    bucket_steps: int = 16
    shuffle: bool = True
    seed: int = 0
    on_corrupt: OnCorrupt = OnCorrupt.ERROR

    def __post_init__(self) -> None:
        if self.num_shards < 1 or self.batch_size < 1 or self.batch_size % self.num_shards:
            raise ValueError(
                f"data_shards: expected a divisor of the global batch_size {self.batch_size}, got {self.num_shards}"
            )
        if self.bucket_steps < 1:
            raise ValueError(f"bucket_steps: expected a number >= 1, got {self.bucket_steps}")

    @property
    def num_rows(self) -> int:
        return sum(group.rows for group in self.groups)

    @property
    def rows_a_step(self) -> int:
        """Of one shard."""
        return self.batch_size // self.num_shards

    @property
    def steps_an_epoch(self) -> int:
        longest = -(-self.num_rows // self.num_shards)
        return -(-longest // self.rows_a_step)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """Rows ``[begin, end)`` of a shard, in the order of the epoch."""
        return self.num_rows * shard // self.num_shards, self.num_rows * (shard + 1) // self.num_shards


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one step from the shards of one worker; ``lost`` rows could not be read, for the reasons given."""

    columns: dict[str, Column]
    lost: int = 0
    reasons: tuple[str, ...] = ()


class PieceStream(IterableDataset[Piece]):
    """The pieces of one rank, the first epoch's from ``start_step`` on; workers take turns in a fixed order.

    Every worker yields one piece a step, empty where its shards have run out.
    """

    def __init__(self, plan: StreamPlan, *, epochs: range, start_step: int, rank: int, world_size: int) -> None:
        self.plan = plan
        self.epochs = epochs
        self.start_step = start_step
        self.shards = [shard for shard in range(plan.num_shards) if shard % world_size == rank]

    def steps(self) -> Iterator[tuple[int, int]]:
        """(epoch, step) of each batch."""
        for epoch in self.epochs:
            first = self.start_step if epoch == self.epochs.start else 0
            for step in range(first, self.plan.steps_an_epoch):
                yield epoch, step

    def __iter__(self) -> Iterator[Piece]:
        worker = get_worker_info()
        shards = self.shards if worker is None else self.shards[worker.id :: worker.num_workers]
        readers: list[_ShardReader] = []
        now = -1
        for epoch, step in self.steps():
            if epoch != now:
                now, order = epoch, _EpochOrder(self.plan, epoch)
                groups = _GroupCache(self.plan, order)
                readers = [_ShardReader(self.plan, order, groups, shard) for shard in shards]
            parts = [reader.rows(step) for reader in readers]
            empty = [{name: _empty(name, self.plan.columns) for name in self.plan.columns.names}]
            lost = [reader.take_lost() for reader in readers]
            reasons = groups.take_reasons()
            yield Piece(join([*parts, *empty]), sum(lost), tuple(reasons))


class _EpochOrder:
    """Row groups in the order of an epoch, and where each begins in it."""

    def __init__(self, plan: StreamPlan, epoch: int) -> None:
        self.seed = (plan.seed, epoch)
        chosen = np.arange(len(plan.groups))
        if plan.shuffle:
            chosen = np.random.default_rng((*self.seed, _GROUPS)).permutation(len(plan.groups))
        self.groups = [plan.groups[i] for i in chosen]
        self.starts = np.concatenate([[0], np.cumsum([group.rows for group in self.groups])]).astype(np.int64)


@dataclass(eq=False)
class _Group:
    """A row group in memory; ``columns`` are ``None`` where it cannot be read."""

    columns: dict[str, Column] | None


@dataclass
class _GroupCache:
    """Row groups by their place in the epoch's order, while a shard holds them: shards of one group read it once."""

    plan: StreamPlan
    order: _EpochOrder
    held: WeakValueDictionary[int, _Group] = field(default_factory=WeakValueDictionary)
    reasons: list[str] = field(default_factory=list)

    def get(self, index: int) -> _Group:
        """The group, from memory or from its file."""
        group = self.held.get(index)
        if group is None:
            try:
                group = _Group(read_row_group(self.order.groups[index], self.plan.columns))
            except CorruptFile as error:
                if self.plan.on_corrupt is OnCorrupt.ERROR:
                    raise CorruptFile(f"{error}; remove the file, or set data.on_corrupt: skip") from error
                group = _Group(None)
                self.reasons.append(str(error))
            self.held[index] = group
        return group

    def take_reasons(self) -> list[str]:
        """Why groups could not be read since the last call."""
        reasons, self.reasons = self.reasons, []
        return reasons


@dataclass
class _ShardReader:
    plan: StreamPlan
    order: _EpochOrder
    groups: _GroupCache
    shard: int
    window: int = -1
    pieces: list[dict[str, Column]] = field(default_factory=list)
    group: _Group | None = None
    lost: int = 0

    def rows(self, step: int) -> dict[str, Column]:
        """The shard's rows of a step."""
        window, place = divmod(step, self.plan.bucket_steps)
        if window != self.window:
            self.window, self.pieces = window, self._read_window(window)
        return self.pieces[place]

    def take_lost(self) -> int:
        """Rows lost since the last call."""
        lost, self.lost = self.lost, 0
        return lost

    def _read_window(self, window: int) -> list[dict[str, Column]]:
        plan = self.plan
        steps = min(plan.bucket_steps, plan.steps_an_epoch - window * plan.bucket_steps)
        begin, end = plan.shard_range(self.shard)
        begin = begin + window * plan.bucket_steps * plan.rows_a_step
        rows = self._read(begin, min(end, begin + steps * plan.rows_a_step))
        count = len(rows[plan.columns.schema.item].lengths)
        ids = np.arange(count)
        turn = np.arange(steps)
        if plan.shuffle:
            ids = np.random.default_rng((*self.order.seed, _ROWS, window, self.shard)).permutation(count)
            lengths = rows[plan.columns.schema.item].lengths[ids]
            ids = ids[np.argsort(lengths, kind="stable")]
            # Without the shard: all shards come to the long rows in the same step.
            turn = np.random.default_rng((*self.order.seed, _STEPS, window)).permutation(steps)
        cut = [ids[i * plan.rows_a_step : (i + 1) * plan.rows_a_step] for i in turn]
        return [{name: column.take(some) for name, column in rows.items()} for some in cut]

    def _read(self, begin: int, end: int) -> dict[str, Column]:
        """Rows ``[begin, end)`` of the epoch's order; those of unreadable groups are left out."""
        starts = self.order.starts
        parts = [{name: _empty(name, self.plan.columns) for name in self.plan.columns.names}]
        place = begin
        while place < end:
            index = int(np.searchsorted(starts, place, side="right")) - 1
            upto = min(end, int(starts[index + 1]))
            self.group = self.groups.get(index)
            if self.group.columns is None:
                self.lost += upto - place
            else:
                some = np.arange(place - starts[index], upto - starts[index])
                parts.append({name: column.take(some) for name, column in self.group.columns.items()})
            place = upto
        return join(parts)


def _empty(name: str, columns: FileColumns) -> Column:
    values: Array = np.zeros(0, dtype=np.float32 if name in columns.floats else np.int64)
    return Column(values, np.zeros(1, dtype=np.int64))
