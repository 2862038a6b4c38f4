"""A training batch on its way through TorchRec's pipelines, and its checks on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from hstu_plugin.adapters.torchrec.schema import FeatureSchema, of_candidates

Counts = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class SequenceBatch(Pipelineable):  # type: ignore[misc]
    """What one step needs.

    Attributes:
        features: ids, looked up by the EmbeddingCollection.
        numbers: exact int64 seconds, never looked up; ``None`` for models without times.
        labels: ``[total_candidates, num_tasks]`` float in the order of the candidates, for ranking.
        measures: float32 numbers of actions, NaN unknown; ``None`` for schemas without.
        counts: key of ``features`` -> the length of each user, as numbers of the host. `to` fills them in where the
            lengths lie on the host: a step that knows them never waits for its device.
    """

    features: KeyedJaggedTensor
    numbers: KeyedJaggedTensor | None = None
    labels: Tensor | None = None
    measures: KeyedJaggedTensor | None = None
    counts: Counts | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> SequenceBatch:
        for jagged in (self.features, self.numbers, self.measures):
            if jagged is not None:
                # Counted where the lengths lie: asked for later, each count would wait for the device.
                jagged.sync()
        moved = self._map(lambda part: part.to(device=device, non_blocking=non_blocking))
        return moved if self.counts is not None else replace(moved, counts=host_counts(self.features))

    def record_stream(self, stream: torch.Stream) -> None:
        for part in (self.features, self.numbers, self.labels, self.measures):
            if part is not None:
                part.record_stream(stream)

    def pin_memory(self) -> SequenceBatch:
        return self._map(lambda part: part.pin_memory())

    def _map(self, change: Callable[[Any], Any]) -> SequenceBatch:
        parts = (self.features, self.numbers, self.labels, self.measures)
        return SequenceBatch(*(None if part is None else change(part) for part in parts), self.counts)


def host_counts(features: KeyedJaggedTensor) -> Counts | None:
    """The lengths of every key as numbers of the host; ``None`` where a device would have to be asked for them."""
    lengths = features.lengths()
    if lengths.device.type != "cpu" or features.variable_stride_per_key():
        return None
    keys: list[str] = features.keys()
    return dict(zip(keys, map(tuple, lengths.view(len(keys), -1).tolist()), strict=True))


def keyed_jagged(columns: Mapping[str, Sequence[Tensor]], *, dtype: torch.dtype = torch.int64) -> KeyedJaggedTensor:
    """A KeyedJaggedTensor.

    Args:
        columns: key -> one 1-D tensor of ``dtype`` for each user; all keys have the same number of users.
        dtype: int64 for ids and times, float32 for measures.

    Raises:
        TypeError: values are of another dtype. ValueError: the keys differ in their number of users.
    """
    users = {key: len(rows) for key, rows in columns.items()}
    if len(set(users.values())) > 1:
        raise ValueError(f"columns: expected the same number of users for every key, got {users}")
    for key, rows in columns.items():
        for b, row in enumerate(rows):
            if row.dim() != 1 or row.dtype != dtype:
                name = str(dtype).removeprefix("torch.")
                raise TypeError(f"columns[{key!r}][{b}]: expected 1-D {name}, got {row.dim()}-D {row.dtype}")
    flat = [row for rows in columns.values() for row in rows]
    return KeyedJaggedTensor(
        keys=list(columns),
        values=torch.cat(flat) if flat else torch.zeros(0, dtype=dtype),
        lengths=torch.tensor([row.numel() for row in flat], dtype=torch.int64),
    )


def check_batch(batch: SequenceBatch, schema: FeatureSchema, *, num_tasks: int | None = None) -> None:
    """Raise unless the batch fits the schema; for the host, before the batch travels (reads every value).

    FBGEMM replaces an id outside its table by 0 with no more than a line on stderr, hence this check.

    Raises:
        ValueError: naming the key, the user (its place in the batch) and what was expected.
        TypeError: times that are not int64.
    """
    check_keys(batch.features.keys(), batch.numbers, schema, batch.measures)
    features = batch.features
    lengths = {key: features[key].lengths() for key in schema.id_keys}
    _check_totals("features", features)
    for name, jagged, keys in (
        ("numbers", batch.numbers, schema.number_keys),
        ("measures", batch.measures, schema.measure_keys),
    ):
        if jagged is not None:
            lengths |= {key: jagged[key].lengths() for key in keys}
            _check_totals(name, jagged)
    for key in schema.along_history[1:]:
        _same_lengths(lengths, schema.item, key)
    if schema.candidate is not None:
        for key in schema.along_candidates[1:]:
            _same_lengths(lengths, schema.candidate, key)
    for single in (schema.request_time, schema.user):
        if single is not None:
            _one_each(lengths[single], single)
    _check_actions(batch.numbers, lengths, schema)
    for key in schema.id_keys:
        table, first = schema.table_of(key), schema.lowest_id(key)
        values = features[key].values()
        outside = (values < first) | (values >= table.num_embeddings)
        if bool(outside.any()):
            place = int(outside.nonzero()[0])
            user = int(torch.searchsorted(features[key].lengths().cumsum(0), place, right=True))
            raise ValueError(
                f"feature key {key!r}: expected ids in [{first}, {table.num_embeddings}) as table {table.name!r} has "
                f"them, got {int(values[place])} in user {user} of the batch"
            )
    if num_tasks is not None:
        total = 0 if schema.candidate is None else int(lengths[schema.candidate].sum())
        got = None if batch.labels is None else tuple(batch.labels.shape)
        if got != (total, num_tasks):
            raise ValueError(f"labels: expected [{total}, {num_tasks}] (candidates, tasks), got {got}")


def check_keys(
    id_keys: Sequence[str],
    numbers: KeyedJaggedTensor | None,
    schema: FeatureSchema,
    measures: KeyedJaggedTensor | None = None,
) -> None:
    """Raise unless every key of the schema is there; reads no device.

    Raises:
        ValueError: names the missing key and those that came. TypeError: times that are not int64.
    """
    for key in schema.id_keys:
        if key not in id_keys:
            raise ValueError(f"feature key {key!r}: expected in the ids, got keys {list(id_keys)}")
    measure_keys = [] if measures is None else measures.keys()
    for key in schema.measure_keys:
        if key not in measure_keys:
            raise ValueError(f"measure key {key!r}: expected in the tensor of float32, got keys {list(measure_keys)}")
    if not schema.number_keys:
        return
    number_keys = [] if numbers is None else numbers.keys()
    for key in schema.number_keys:
        if key in number_keys:
            continue
        if key not in (schema.time, schema.candidate_time, schema.request_time):
            raise ValueError(f"number key {key!r}: expected in the tensor of int64, got keys {list(number_keys)}")
        role = "candidates without timestamps; " if key == schema.candidate_time else ""
        raise ValueError(
            f"time key {key!r}: {role}expected in the tensor of int64 seconds, got keys {list(number_keys)}; "
            "pass the times, or build schema and model without them (time_bias=False)"
        )
    assert numbers is not None
    if numbers.values().dtype != torch.int64:
        raise TypeError(f"times: expected int64 seconds, got {numbers.values().dtype}; floats lose seconds")


def _check_actions(numbers: KeyedJaggedTensor | None, lengths: Mapping[str, Tensor], schema: FeatureSchema) -> None:
    """Raise unless actions lie in their bounds; those of candidates may be left out as a whole."""
    if schema.actions is None or numbers is None:
        return
    bounds = schema.actions.bounds()
    if schema.reads_candidate_actions:
        assert schema.candidate is not None
        bounds |= {of_candidates(key): bound for key, bound in bounds.items()}
        for key in map(of_candidates, (*schema.actions.number_keys, *schema.actions.measure_keys)):
            if int(lengths[key].sum()):
                _same_lengths(lengths, schema.candidate, key)
    for key, (low, high) in bounds.items():
        values = numbers[key].values()
        outside = (values < low) | (values > high)
        if bool(outside.any()):
            raise ValueError(f"number key {key!r}: expected values in [{low}, {high}], got {int(values[outside][0])}")


def _check_totals(name: str, jagged: KeyedJaggedTensor) -> None:
    lengths = jagged.lengths()
    if lengths.numel() and int(lengths.min()) < 0:
        raise ValueError(f"{name}: expected lengths >= 0, got {int(lengths.min())}")
    if int(lengths.sum()) != jagged.values().numel():
        raise ValueError(
            f"{name}: the lengths add up to {int(lengths.sum())}, but there are {jagged.values().numel()} values"
        )


def _same_lengths(lengths: Mapping[str, Tensor], first: str, second: str) -> None:
    different = (lengths[first] != lengths[second]).nonzero()
    if different.numel():
        user = int(different[0])
        raise ValueError(
            f"lengths: expected as many {second!r} as {first!r} for every user, got {int(lengths[second][user])} and "
            f"{int(lengths[first][user])} for user {user} of the batch"
        )


def _one_each(lengths: Tensor, key: str) -> None:
    wrong = (lengths != 1).nonzero()
    if wrong.numel():
        user = int(wrong[0])
        raise ValueError(f"{key!r}: expected one value for each user, got {int(lengths[user])} for user {user}")
