"""The order in which rows of parquet files reach the ranks: the same global batches whatever the number of ranks.

All rows of an epoch stand in an order drawn from (seed, epoch): that of the row groups, and in each of them that of its
rows. It is cut into ``num_shards`` runs of equal length. Every step takes ``batch_size / num_shards`` rows of each.
Ranks, and workers inside ranks, share the runs out among themselves: the union is the same global batch, and the
position in the data is one number, the step.

Inside a window of ``bucket_steps`` steps a run's rows are sorted by length, so that the rows of one step are of similar
length on all ranks; the order of the steps in a window is drawn anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
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

_GROUPS, _ROWS, _STEPS, _INSIDE = 0, 1, 2, 3
# Steps that are read at once, or a whole window: opening a run for two rows costs as much as for thirty.
_BLOCK_STEPS = 8
# Of row groups that a loading process keeps when no shard needs them any more: all of a small data set.
_KEPT_BYTES = 1 << 28


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
        groups = _GroupCache(self.plan)
        reader: _Reader | None = None
        now = -1
        for epoch, step in self.steps():
            if reader is None or epoch != now:
                now, reader = epoch, _Reader(self.plan, epoch, shards, groups)
            columns = reader.rows(step)
            yield Piece(columns, reader.take_lost(), tuple(groups.take_reasons()))


class _EpochOrder:
    """Row groups in the order of an epoch, and where each begins in it."""

    def __init__(self, plan: StreamPlan, epoch: int) -> None:
        self.seed = (plan.seed, epoch)
        chosen = np.arange(len(plan.groups))
        if plan.shuffle:
            chosen = np.random.default_rng((*self.seed, _GROUPS)).permutation(len(plan.groups))
        self.groups = [plan.groups[i] for i in chosen]
        self.starts = np.concatenate([[0], np.cumsum([group.rows for group in self.groups])]).astype(np.int64)
        self.chosen, self.shuffle = chosen, plan.shuffle

    def inside(self, index: int) -> Array:
        """The rows of the epoch's group ``index`` in their order."""
        rows = self.groups[index].rows
        if not self.shuffle:
            return np.arange(rows)
        return np.random.default_rng((*self.seed, _INSIDE, int(self.chosen[index]))).permutation(rows)


@dataclass(eq=False)
class _Group:
    """A row group in memory; ``columns`` are ``None`` where it cannot be read. ``drawn``: its order of an epoch."""

    columns: dict[str, Column] | None
    drawn: tuple[_EpochOrder, Array] | None = None

    @property
    def nbytes(self) -> int:
        return sum(own.values.nbytes + own.offsets.nbytes for own in (self.columns or {}).values())


class _GroupCache:
    """Row groups while a shard holds them, so that shards of one group read it once, and the latest of all epochs."""

    def __init__(self, plan: StreamPlan) -> None:
        self.plan = plan
        self.reasons: list[str] = []
        self.held: WeakValueDictionary[RowGroup, _Group] = WeakValueDictionary()
        self.latest: OrderedDict[RowGroup, _Group] = OrderedDict()
        self.bytes = 0
        self.footers: dict[str, Any] = {}

    def get(self, place: RowGroup) -> _Group:
        """The group, from memory or from its file."""
        group = self.held.get(place)
        if group is None:
            try:
                group = _Group(read_row_group(place, self.plan.columns, self.footers))
            except CorruptFile as error:
                if self.plan.on_corrupt is OnCorrupt.ERROR:
                    raise CorruptFile(f"{error}; remove the file, or set data.on_corrupt: skip") from error
                group = _Group(None)
                self.reasons.append(str(error))
            self.held[place] = group
        self._keep(place, group)
        return group

    def take_reasons(self) -> list[str]:
        """Why groups could not be read since the last call."""
        reasons, self.reasons = self.reasons, []
        return reasons

    def _keep(self, place: RowGroup, group: _Group) -> None:
        if place not in self.latest:
            self.bytes += group.nbytes
        self.latest[place] = group
        self.latest.move_to_end(place)
        while self.bytes > _KEPT_BYTES:
            self.bytes -= self.latest.popitem(last=False)[1].nbytes


class _Reader:
    """The rows of some shards, read for several steps at once."""

    def __init__(self, plan: StreamPlan, epoch: int, shards: list[int], groups: _GroupCache) -> None:
        self.plan, self.shards, self.groups = plan, shards, groups
        self.order = _EpochOrder(plan, epoch)
        self.windows = -(-_BLOCK_STEPS // plan.bucket_steps)
        self.block = -1
        self.columns: dict[str, Column] = {}
        self.steps: list[Array] = []
        # The group that each shard has come to: what keeps it in memory.
        self.current: dict[int, _Group] = {}
        self.lost = 0

    def rows(self, step: int) -> dict[str, Column]:
        """The shards' rows of a step, in the order of the shards."""
        steps = self.windows * self.plan.bucket_steps
        block, place = divmod(step, steps)
        if block != self.block:
            self.block = block
            self._read_block(block * steps, min(steps, self.plan.steps_an_epoch - block * steps))
        return {name: column.take(self.steps[place]) for name, column in self.columns.items()}

    def take_lost(self) -> int:
        """Rows lost since the last call."""
        lost, self.lost = self.lost, 0
        return lost

    def _read_block(self, first: int, steps: int) -> None:
        """Read the rows of ``steps`` steps from ``first`` on, and say which of them each step takes."""
        plan = self.plan
        parts = [{name: _empty(name, plan.columns) for name in plan.columns.names}]
        chosen: list[list[Array]] = [[] for _ in range(steps)]
        held = 0
        for shard in self.shards:
            begin, end = plan.shard_range(shard)
            begin = min(end, begin + first * plan.rows_a_step)
            read, places = self._read(shard, begin, min(end, begin + steps * plan.rows_a_step))
            lengths = np.concatenate([part[plan.columns.schema.item].lengths for part in read] or [places])
            for window in range(first // plan.bucket_steps, -(-(first + steps) // plan.bucket_steps)):
                low = window * plan.bucket_steps - first
                count = min(plan.bucket_steps, steps - low)
                rows, upto = np.searchsorted(places, np.array([low, low + count]) * plan.rows_a_step)
                ids, turn = self._arranged(lengths[rows:upto], window, shard, count)
                for place, i in enumerate(turn):
                    some = ids[i * plan.rows_a_step : (i + 1) * plan.rows_a_step]
                    chosen[low + place].append(held + rows + some)
            parts += read
            held += len(places)
        self.columns = join(parts)
        self.steps = [np.concatenate([np.zeros(0, dtype=np.int64), *some]) for some in chosen]

    def _arranged(self, lengths: Array, window: int, shard: int, steps: int) -> tuple[Array, Array]:
        """The rows of a window in the order in which they are cut into steps, and the order of these."""
        ids, turn = np.arange(len(lengths)), np.arange(steps)
        # The order inside one step means nothing.
        if self.plan.shuffle and steps > 1:
            ids = np.random.default_rng((*self.order.seed, _ROWS, window, shard)).permutation(len(lengths))
            ids = ids[np.argsort(lengths[ids], kind="stable")]
            # Without the shard: all shards come to the long rows in the same step.
            turn = np.random.default_rng((*self.order.seed, _STEPS, window)).permutation(steps)
        return ids, turn

    def _read(self, shard: int, begin: int, end: int) -> tuple[list[dict[str, Column]], Array]:
        """Rows ``[begin, end)`` of the epoch's order without those of unreadable groups, and their places in it."""
        starts = self.order.starts
        parts, places = [], [np.zeros(0, dtype=np.int64)]
        place = begin
        while place < end:
            index = int(np.searchsorted(starts, place, side="right")) - 1
            upto, start = min(end, int(starts[index + 1])), int(starts[index])
            group = self.current[shard] = self.groups.get(self.order.groups[index])
            if group.columns is None:
                self.lost += upto - place
            else:
                if group.drawn is None or group.drawn[0] is not self.order:
                    group.drawn = self.order, self.order.inside(index)
                rows = group.drawn[1][place - start : upto - start]
                parts.append({name: own.take(rows) for name, own in group.columns.items()})
                places.append(np.arange(place, upto) - begin)
            place = upto
        return parts, np.concatenate(places)


def _empty(name: str, columns: FileColumns) -> Column:
    values: Array = np.zeros(0, dtype=np.float32 if name in columns.floats else np.int64)
    return Column(values, np.zeros(1, dtype=np.int64))
