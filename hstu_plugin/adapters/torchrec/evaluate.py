"""Evaluation over all ranks, equal to that of one process."""

from __future__ import annotations

from collections.abc import Iterable

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
        scores = task.head.scores(task.embeddings(moved.features), moved.numbers)
        assert batch.labels is not None
        metrics.add(scores, batch.labels)
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
) -> dict[str, float]:
    """Rank each held-out item among all items; all ranks pass the same number of batches.

    Users' vectors are kept, the items are looked up once, a slice at a time, by all ranks together.
    """
    task = model.module
    assert isinstance(task, HSTURetrievalTask) and schema.candidate is not None
    model.eval()
    users, positives, wanted = [], [], []
    for batch in batches:
        moved = batch.to(device)
        vectors = awaited(task.embeddings(moved.features))
        asked = vectors[schema.candidate]
        rows = torch.repeat_interleave(task.head.users(vectors, moved.numbers), asked.lengths().long(), dim=0)
        users.append(rows)
        positives.append(moved.features[schema.candidate].values())
        wanted.append((rows * normalise(asked.values(), task.head.core.retrieval.similarity)).sum(-1))
    rows, ids, own = torch.cat(users), torch.cat(positives), torch.cat(wanted)
    better, ties = torch.zeros_like(own), torch.zeros_like(own)
    items = schema.table_of(schema.item).num_embeddings
    for begin in range(1, items, _ITEMS_AT_ONCE):
        some = torch.arange(begin, min(items, begin + _ITEMS_AT_ONCE), device=device)
        table = awaited(task.embeddings(_lookup(schema, some)))[schema.candidate].values()
        scores = rows @ normalise(table, task.head.core.retrieval.similarity).T
        # The positive itself is not compared with: the two products need not round alike.
        other = some[None, :] != ids[:, None]
        better += ((scores > own[:, None]) & other).sum(1)
        ties += ((scores == own[:, None]) & other).sum(1)
    metrics.add(1 + better + ties / 2)
    model.train()
    return metrics.result(group)


def _lookup(schema: FeatureSchema, ids: Tensor) -> KeyedJaggedTensor:
    """``ids`` under the key of the candidates, nothing under the others; one user."""
    lengths = [ids.numel() if key == schema.candidate else 0 for key in schema.id_keys]
    return KeyedJaggedTensor(
        keys=list(schema.id_keys), values=ids, lengths=torch.tensor(lengths, device=ids.device, dtype=torch.int64)
    )
