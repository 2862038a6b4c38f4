"""Evaluation over all ranks, equal to that of one process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hstu_plugin.adapters.torchrec.batch import SequenceBatch
from hstu_plugin.adapters.torchrec.metrics import RankingMetrics, RetrievalMetrics
from hstu_plugin.adapters.torchrec.ranking import HSTURankingTask
from hstu_plugin.adapters.torchrec.retrieval import HSTURetrievalTask
from hstu_plugin.adapters.torchrec.schema import FeatureSchema
from hstu_plugin.adapters.torchrec.sequence import awaited
from hstu_plugin.losses import normalise

_ITEMS_AT_ONCE = 1 << 14


@torch.no_grad()
def evaluate_ranking(
    model: DistributedModelParallel,
    batches: Iterable[SequenceBatch],
    metrics: RankingMetrics,
    device: torch.device,
    group: dist.ProcessGroup,
) -> dict[str, float]:
    """Score the candidates of every batch; all ranks pass the same number of batches."""
    task = model.module
    assert isinstance(task, HSTURankingTask)
    model.eval()
    for batch in batches:
        moved = batch.to(device)
        scores = task.head.scores(task.embeddings(moved.features), moved)
        assert batch.labels is not None
        metrics.add(scores, batch.labels, _users(batch, task.head.schema))
    model.train()
    return metrics.result(group)


@torch.no_grad()
def evaluate_retrieval(
    model: DistributedModelParallel,
    batches: Iterable[SequenceBatch],
    metrics: RetrievalMetrics,
    schema: FeatureSchema,
    device: torch.device,
    group: dist.ProcessGroup,
    *,
    filter_seen: bool = False,
) -> dict[str, float]:
    """Rank each held-out item among all items; all ranks pass the same number of batches.

    Users' vectors are kept, the items are looked up once, a slice at a time, by all ranks together. With
    ``filter_seen`` items of a user's history score below all others.
    """
    task = model.module
    assert isinstance(task, HSTURetrievalTask) and schema.candidate is not None
    similarity, width = task.head.core.retrieval.similarity, task.head.core.config.embedding_dim
    model.eval()
    asked = [_ask(task, batch.to(device), filter_seen=filter_seen) for batch in batches]
    better = [torch.zeros_like(some.own) for some in asked]
    ties = [torch.zeros_like(some.own) for some in asked]
    items = schema.table_of(schema.item).num_embeddings
    for begin in range(1, items, _ITEMS_AT_ONCE):
        ids = torch.arange(begin, min(items, begin + _ITEMS_AT_ONCE), device=device)
        table = awaited(task.embeddings(_lookup(schema, ids)), width)[schema.candidate].values()
        table = normalise(table, similarity)
        for place, some in enumerate(asked):
            scores = some.rows @ table.T
            inside = (some.seen_items >= begin) & (some.seen_items < begin + ids.numel())
            scores[some.seen_rows[inside], some.seen_items[inside] - begin] = -torch.inf
            # The positive itself is not compared with: the two products need not round alike.
            other = ids[None, :] != some.positives[:, None]
            better[place] += ((scores > some.own[:, None]) & other).sum(1)
            ties[place] += ((scores == some.own[:, None]) & other).sum(1)
    for above, beside in zip(better, ties, strict=True):
        metrics.add(1 + above + beside / 2)
    model.train()
    return metrics.result(group)


@dataclass(frozen=True, slots=True)
class _Asked:
    """Held-out items of one batch.

    Attributes:
        rows: ``[n, D]`` vectors of the users. positives, own: ``[n]`` items and their scores.
        seen_rows, seen_items: pairs that are not to be ranked.
    """

    rows: Tensor
    positives: Tensor
    own: Tensor
    seen_rows: Tensor
    seen_items: Tensor


def _ask(task: HSTURetrievalTask, batch: SequenceBatch, *, filter_seen: bool) -> _Asked:
    schema, head = task.head.schema, task.head
    assert schema.candidate is not None
    vectors = awaited(task.embeddings(batch.features), head.core.config.embedding_dim)
    asked = vectors[schema.candidate]
    counts = asked.lengths().long()
    rows = torch.repeat_interleave(head.users(vectors, batch.numbers), counts, dim=0)
    positives = batch.features[schema.candidate].values()
    own = (rows * normalise(asked.values(), head.core.retrieval.similarity)).sum(-1)
    nothing = positives[:0]
    if not filter_seen:
        return _Asked(rows, positives, own, nothing, nothing)
    history = batch.features[schema.item]
    users = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    owners = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), history.lengths().long())
    if users.numel() == counts.numel():
        # One held-out item each, as almost always: a user's row is the user's number.
        pair_rows, pair_items = owners, history.values()
    else:
        pair_rows, events = (users[:, None] == owners[None, :]).nonzero(as_tuple=True)
        pair_items = history.values()[events]
    hidden = torch.zeros_like(own, dtype=torch.bool)
    hidden[pair_rows[pair_items == positives[pair_rows]]] = True
    return _Asked(rows, positives, own.masked_fill(hidden, -torch.inf), pair_rows, pair_items)


def _users(batch: SequenceBatch, schema: FeatureSchema) -> Tensor | None:
    """``[total_candidates]``: whose each candidate is, where the schema says."""
    if schema.user is None or batch.numbers is None or schema.candidate is None:
        return None
    return torch.repeat_interleave(batch.numbers[schema.user].values(), batch.features[schema.candidate].lengths())


def _lookup(schema: FeatureSchema, ids: Tensor) -> KeyedJaggedTensor:
    """``ids`` under the key of the candidates, nothing under the others; one user."""
    lengths = [ids.numel() if key == schema.candidate else 0 for key in schema.id_keys]
    return KeyedJaggedTensor(
        keys=list(schema.id_keys), values=ids, lengths=torch.tensor(lengths, device=ids.device, dtype=torch.int64)
    )
