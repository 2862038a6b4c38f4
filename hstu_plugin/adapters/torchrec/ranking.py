"""Multi-task ranking over a KeyedJaggedTensor, with tables that DistributedModelParallel may shard."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from hstu_plugin.adapters.torchrec.batch import SequenceBatch, check_batch
from hstu_plugin.adapters.torchrec.reduce import global_mean
from hstu_plugin.adapters.torchrec.schema import FeatureSchema
from hstu_plugin.adapters.torchrec.sequence import KJTToSequence
from hstu_plugin.config import HSTUConfig
from hstu_plugin.ranker import HSTURanker
from hstu_plugin.ranking_config import RankingConfig
from hstu_plugin.ranking_losses import multi_task_loss


class RankingHead(nn.Module):
    """Everything behind the tables: dense, replicated, a leaf for TorchRec's tracer, ready for ``torch.compile``."""

    def __init__(self, config: HSTUConfig, schema: FeatureSchema, ranking: RankingConfig) -> None:
        super().__init__()
        if config.time_bias and (schema.time is None or schema.candidate_time is None):
            raise ValueError(
                "schema: expected the keys time and candidate_time as the model has a time bias, got "
                f"{schema.time!r} and {schema.candidate_time!r}"
            )
        self.schema = schema
        self.sequence = KJTToSequence(schema, with_candidates=True)
        self.core = HSTURanker(config, ranking)

    def forward(self, vectors: Mapping[str, JaggedTensor], numbers: KeyedJaggedTensor | None = None) -> Tensor:
        """As `scores`."""
        return self.scores(vectors, numbers)

    def scores(self, vectors: Mapping[str, JaggedTensor], numbers: KeyedJaggedTensor | None = None) -> Tensor:
        """``[total_candidates, num_tasks]`` in the order of the candidates' key: logits, values of regressions."""
        scores: Tensor = self.core(self.sequence(vectors, numbers))
        return scores


class RankingLossHead(RankingHead):
    """The same weights under the same names, with the loss over all ranks' rows as its forward."""

    def __init__(self, head: RankingHead, autocast: torch.dtype | None) -> None:
        nn.Module.__init__(self)
        self.autocast = autocast
        self.schema, self.sequence, self.core = head.schema, head.sequence, head.core

    def forward(  # type: ignore[override]
        self, vectors: Mapping[str, JaggedTensor], numbers: KeyedJaggedTensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        ranking = self.core.ranking
        with torch.autocast(labels.device.type, self.autocast, enabled=self.autocast is not None):
            scores = self.scores(vectors, numbers)
        alone = [
            multi_task_loss(scores[:, [k]], labels[:, [k]], RankingConfig(tasks=(task,)))[0]
            for k, task in enumerate(ranking.tasks)
        ]
        known = (~labels.isnan()).sum(0)
        loss = global_mean(torch.stack(alone), known).sum()
        return loss, known.sum()


class HSTURankingModel(nn.Module):
    """KeyedJaggedTensor in, ``[total_candidates, num_tasks]`` in the order of the candidates' key out.

    Every candidate is scored as if it stood alone behind the history. What was done with an event (its action) is a
    side feature of the history; candidates have none, so that the label cannot leak.

    Args:
        config: the transducer. schema: keys and tables. ranking: tasks and head.
        device: of the tables; ``torch.device("meta")`` where DistributedModelParallel makes them.
    """

    def __init__(
        self,
        config: HSTUConfig,
        schema: FeatureSchema,
        ranking: RankingConfig,
        *,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.schema = schema
        self.embeddings = EmbeddingCollection(tables=schema.embedding_configs(config.embedding_dim), device=device)
        self.head = RankingHead(config, schema, ranking)

    def forward(self, features: KeyedJaggedTensor, numbers: KeyedJaggedTensor | None = None) -> Tensor:
        """Scores.

        Args:
            features: ids under the schema's keys, validated by `check_batch` on the host.
            numbers: int64 seconds under its time keys.
        """
        scores: Tensor = self.head(self.embeddings(features), numbers)
        return scores

    def check(self, features: KeyedJaggedTensor, numbers: KeyedJaggedTensor | None = None) -> None:
        """Raise unless the batch fits the schema (`check_batch`); call it before the batch travels."""
        check_batch(SequenceBatch(features, numbers), self.schema)


class HSTURankingTask(nn.Module):
    """`SequenceBatch` in, ``(loss, (loss, rows))`` out, as TorchRec's pipelines want a model to train.

    Shares the weights of ``model`` under the same names; the loss is weighted as that of `HSTURetrievalTask`.
    """

    def __init__(self, model: HSTURankingModel, *, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.embeddings = model.embeddings
        self.head = RankingLossHead(model.head, autocast)

    def forward(self, batch: SequenceBatch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        loss, rows = self.head(self.embeddings(batch.features), batch.numbers, batch.labels)
        return loss, (loss.detach(), rows)
