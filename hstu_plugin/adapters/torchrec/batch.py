"""A training batch on its way through TorchRec's pipelines, and its checks on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from hstu_plugin.adapters.torchrec.schema import FeatureSchema


@dataclass(frozen=True)
class SequenceBatch(Pipelineable):  # type: ignore[misc]
    """What one step needs.

    Attributes:
        features: ids, looked up by the EmbeddingCollection.
        numbers: exact int64 seconds, never looked up; ``None`` for models without times.
        labels: ``[total_candidates, num_tasks]`` float in the order of the candidates, for ranking.
    """

    features: KeyedJaggedTensor
    numbers: KeyedJaggedTensor | None = None
    labels: Tensor | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> SequenceBatch:
        return replace(
            self,
            features=self.features.to(device=device, non_blocking=non_blocking),
            numbers=None if self.numbers is None else self.numbers.to(device=device, non_blocking=non_blocking),
            labels=None if self.labels is None else self.labels.to(device=device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        for part in (self.features, self.numbers, self.labels):
            if part is not None:
                part.record_stream(stream)

    def pin_memory(self) -> SequenceBatch:
        return replace(
            self,
            features=self.features.pin_memory(),
            numbers=None if self.numbers is None else self.numbers.pin_memory(),
            labels=None if self.labels is None else self.labels.pin_memory(),
        )


def keyed_jagged(columns: Mapping[str, Sequence[Tensor]]) -> KeyedJaggedTensor:
    """A KeyedJaggedTensor of int64 values.

    Args:
        columns: key -> one 1-D int64 tensor for each user; all keys have the same number of users.

    Raises:
        TypeError: values are no whole numbers. ValueError: the keys differ in their number of users.
    """
    users = {key: len(rows) for key, rows in columns.items()}
    if len(set(users.values())) > 1:
        raise ValueError(f"columns: expected the same number of users for every key, got {users}")
    for key, rows in columns.items():
        for b, row in enumerate(rows):
            if row.dim() != 1 or row.dtype != torch.int64:
                raise TypeError(f"columns[{key!r}][{b}]: expected 1-D int64, got {row.dim()}-D {row.dtype}")
    flat = [row for rows in columns.values() for row in rows]
    return KeyedJaggedTensor(
        keys=list(columns),
        values=torch.cat(flat) if flat else torch.zeros(0, dtype=torch.int64),
        lengths=torch.tensor([row.numel() for row in flat], dtype=torch.int64),
    )


def check_batch(batch: SequenceBatch, schema: FeatureSchema, *, num_tasks: int | None = None) -> None:
    """Raise unless the batch fits the schema; for the host, before the batch travels (reads every value).

    FBGEMM replaces an id outside its table by 0 with no more than a line on stderr, hence this check.

    Raises:
        ValueError: naming the key, the user (its place in the batch) and what was expected.
        TypeError: times that are not int64.
    """
    check_keys(batch.features.keys(), batch.numbers, schema)
    features = batch.features
    lengths = {key: features[key].lengths() for key in schema.id_keys}
    if batch.numbers is not None:
        lengths |= {key: batch.numbers[key].lengths() for key in schema.number_keys}
    _check_totals("features", features)
    if batch.numbers is not None:
        _check_totals("numbers", batch.numbers)
    times = () if schema.time is None else (schema.time,)
    for key in (*schema.side, *times):
        _same_lengths(lengths, schema.item, key)
    if schema.candidate is not None:
        times = () if schema.candidate_time is None else (schema.candidate_time,)
        for key in (*schema.candidate_side, *times):
            _same_lengths(lengths, schema.candidate, key)
    if schema.request_time is not None:
        _one_each(lengths[schema.request_time], schema.request_time)
    for key in schema.id_keys:
        table = schema.table_of(key)
        first = 1 if table is schema.table_of(schema.item) else 0
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


def check_keys(id_keys: Sequence[str], numbers: KeyedJaggedTensor | None, schema: FeatureSchema) -> None:
    """Raise unless every key of the schema is there; reads no device.

    Raises:
        ValueError: names the missing key and those that came. TypeError: times that are not int64.
    """
    for key in schema.id_keys:
        if key not in id_keys:
            raise ValueError(f"feature key {key!r}: expected in the ids, got keys {list(id_keys)}")
    if not schema.number_keys:
        return
    number_keys = [] if numbers is None else numbers.keys()
    for key in schema.number_keys:
        if key in number_keys:
            continue
        role = "candidates without timestamps; " if key == schema.candidate_time else ""
        raise ValueError(
            f"time key {key!r}: {role}expected in the tensor of int64 seconds, got keys {list(number_keys)}; "
            "pass the times, or build schema and model without them (time_bias=False)"
        )
    assert numbers is not None
    if numbers.values().dtype != torch.int64:
        raise TypeError(f"times: expected int64 seconds, got {numbers.values().dtype}; floats lose seconds")


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
