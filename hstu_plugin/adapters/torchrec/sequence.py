"""From looked-up features to the core's sequences."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.distributed.types import LazyAwaitable
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from hstu_kernels import JaggedLayout
from hstu_plugin.adapters.torchrec.batch import Counts, check_keys
from hstu_plugin.adapters.torchrec.schema import FeatureSchema
from hstu_plugin.sequence import JaggedSequence

_CONTEXTUAL_TIME = 0


class KJTToSequence(nn.Module):
    """``dict[str, JaggedTensor] -> JaggedSequence`` of ``[contextual | history | candidates]`` rows for each user.

    A module of its own holding no sharded one, so that TorchRec's tracer treats it as a leaf and the core's value
    objects never meet the tracer. It has no weights and may stand in any pipeline.

    Args:
        schema: keys of the batch.
        with_candidates: append the candidates as targets (ranking); without, sequences end with the history.
        width: columns to read of wider vectors; ``None``: all.
    """

    def __init__(self, schema: FeatureSchema, *, with_candidates: bool, width: int | None = None) -> None:
        super().__init__()
        if with_candidates and schema.candidate is None:
            raise ValueError("schema.candidate: expected the key of the candidates, got None")
        self.schema = schema
        self.with_candidates = with_candidates
        self.width = width

    def forward(
        self,
        vectors: Mapping[str, JaggedTensor],
        numbers: KeyedJaggedTensor | None = None,
        counts: Counts | None = None,
    ) -> JaggedSequence:
        """Arrange the rows.

        Args:
            vectors: from an EmbeddingCollection: key -> values ``[n, D]`` with lengths ``[B]``.
            numbers: int64 seconds under the schema's time keys.
            counts: the lengths as numbers (`SequenceBatch.counts`); without them the device is asked.

        Returns:
            values ``[L, D]`` in the dtype of ``vectors``, timestamps ``[L]``. Contextual rows bear time 0: the
            same far distance from every event.

        Raises:
            ValueError: a key is missing or lengths do not agree. TypeError: times are not int64.
        """
        schema = self.schema
        found = awaited(vectors, self.width)
        check_keys(list(found), numbers, schema)
        history = summed(found, schema.history)
        lengths = found[schema.item].lengths().long()
        contextual = [pooled(found[key]) for key in schema.contextual]
        parts, rows = [*contextual, history], [*(torch.ones_like(lengths) for _ in contextual), lengths]
        num_targets = None
        if self.with_candidates:
            assert schema.candidate is not None
            parts.append(summed(found, schema.candidates))
            num_targets = found[schema.candidate].lengths().long()
            rows.append(num_targets)
        sizes = [part.shape[0] for part in parts]
        known = None if counts is None else self._known_lengths(counts, sum(sizes))
        layout = JaggedLayout.from_lengths(
            torch.stack(rows).sum(0),
            max_seq_len=None if known is None else max(known, default=0),
            num_targets=num_targets,
            contextual_seq_len=len(contextual),
        )
        if known is not None:
            layout.vouched(sum(sizes))
        # One part alone stands in its order already.
        order = None if len(parts) == 1 else _order(rows, sizes, layout)
        values = parts[0] if order is None else torch.cat(parts).index_select(0, order)
        timestamps = self._timestamps(numbers, rows, len(contextual), order)
        return JaggedSequence(values, layout, timestamps)

    def _known_lengths(self, counts: Counts, total: int) -> list[int]:
        """Rows of each user, the contextual ones included."""
        schema = self.schema
        keys = [schema.item]
        if self.with_candidates:
            assert schema.candidate is not None
            keys.append(schema.candidate)
        lengths = [len(schema.contextual) + sum(own) for own in zip(*(counts[key] for key in keys), strict=True)]
        if sum(lengths) != total:
            raise ValueError(f"counts: expected lengths that add up to the {total} rows of a batch, got {sum(lengths)}")
        return lengths

    def _timestamps(
        self, numbers: KeyedJaggedTensor | None, counts: list[Tensor], contextual: int, order: Tensor | None
    ) -> Tensor | None:
        schema = self.schema
        if schema.time is None or numbers is None:
            return None
        keys = [schema.time]
        if self.with_candidates:
            if schema.candidate_time is None:
                raise ValueError("schema.candidate_time: candidates without timestamps beside a history with them")
            keys.append(schema.candidate_time)
        times = [numbers[key].values() for key in keys]
        for key, own, rows in zip(keys, times, counts[contextual:], strict=True):
            match_lengths(key, numbers[key].lengths().long(), rows)
            assert own.dtype == torch.int64
        context = torch.full_like(counts[0], _CONTEXTUAL_TIME)
        joined = torch.cat([context] * contextual + times)
        return joined if order is None else joined.index_select(0, order)


def awaited(vectors: Mapping[str, JaggedTensor], width: int | None = None) -> Mapping[str, JaggedTensor]:
    """The looked-up vectors themselves, where a sharded collection returns a promise; the first ``width`` columns."""
    if isinstance(vectors, LazyAwaitable):
        waited: Mapping[str, JaggedTensor] = LazyAwaitable._wait_async(vectors)
        vectors = waited
    if width is None or all(own.values().shape[1] == width for own in vectors.values()):
        return vectors
    return {
        key: JaggedTensor(values=own.values()[:, :width], lengths=own.lengths(), offsets=own.offsets_or_none())
        for key, own in vectors.items()
    }


def pooled(vectors: JaggedTensor) -> Tensor:
    """``[B, D]``: the sum of each user's vectors."""
    lengths = vectors.lengths().long()
    values = vectors.values()
    users = torch.repeat_interleave(
        torch.arange(lengths.numel(), device=values.device), lengths, output_size=values.shape[0]
    )
    total: Tensor = values.new_zeros(lengths.numel(), values.shape[1]).index_add(0, users, values)
    return total


def summed(vectors: Mapping[str, JaggedTensor], keys: tuple[str, ...]) -> Tensor:
    """``[n, D]``: the sum of the vectors of features with one id for each event.

    Raises:
        ValueError: the features differ in their lengths.
    """
    first = vectors[keys[0]]
    total: Tensor = first.values()
    for key in keys[1:]:
        match_lengths(key, vectors[key].lengths().long(), first.lengths().long(), keys[0])
        total = total + vectors[key].values()
    return total


def match_lengths(key: str, got: Tensor, expected: Tensor, other: str = "its events") -> None:
    """Raise ``ValueError`` unless the lengths ``[B]`` are equal; on a GPU an asynchronous device assertion."""
    if got.is_cuda and got.shape == expected.shape:
        torch._assert_async((got == expected).all())
        return
    if got.shape != expected.shape or not bool((got == expected).all()):
        raise ValueError(f"lengths: expected as many {key!r} as {other}, got {got.tolist()} and {expected.tolist()}")


def _order(counts: list[Tensor], sizes: list[int], layout: JaggedLayout) -> Tensor:
    """``[L]``: for each row of the layout, its place among the concatenated parts of so many rows each."""
    starts = layout.seq_offsets[:-1]
    places = []
    for lengths, size in zip(counts, sizes, strict=True):
        # A part's rows are already in the order of the users: the place is the user's start plus the row within.
        offsets = lengths.cumsum(0) - lengths
        moved = torch.repeat_interleave(starts - offsets, lengths, output_size=size)
        places.append(moved + torch.arange(size, device=starts.device))
        starts = starts + lengths
    rows = torch.cat(places)
    return torch.empty_like(rows).scatter_(0, rows, torch.arange(rows.numel(), device=rows.device))
