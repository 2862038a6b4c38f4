"""Next-item retrieval over a KeyedJaggedTensor, with tables that DistributedModelParallel may shard."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from hstu_plugin.adapters.torchrec.batch import SequenceBatch, check_batch
from hstu_plugin.adapters.torchrec.reduce import global_mean
from hstu_plugin.adapters.torchrec.schema import FeatureSchema
from hstu_plugin.adapters.torchrec.sequence import KJTToSequence, awaited
from hstu_plugin.config import HSTUConfig, NegativeSource, RetrievalConfig
from hstu_plugin.losses import normalise
from hstu_plugin.retrieval import HSTURetrieval
from hstu_plugin.shared_negatives import shared_negatives_loss


class RetrievalHead(nn.Module):
    """Everything behind the tables: dense, replicated, a leaf for TorchRec's tracer, ready for ``torch.compile``."""

    def __init__(self, config: HSTUConfig, schema: FeatureSchema, retrieval: RetrievalConfig) -> None:
        super().__init__()
        if config.time_bias and schema.time is None:
            raise ValueError("schema.time: expected the key of the event times as the model has a time bias, got None")
        self.schema = schema
        self.sequence = KJTToSequence(schema, with_candidates=False)
        self.core = HSTURetrieval(config, retrieval)

    def users(self, vectors: Mapping[str, JaggedTensor], numbers: KeyedJaggedTensor | None) -> Tensor:
        """User vectors ``[B, D]``."""
        request = None
        if self.schema.request_time is not None and numbers is not None:
            request = numbers[self.schema.request_time].values()
        users: Tensor = self.core(self.sequence(vectors, numbers), request)
        return users

    def forward(self, vectors: Mapping[str, JaggedTensor], numbers: KeyedJaggedTensor | None = None) -> Tensor:
        """As `scores`."""
        return self.scores(vectors, numbers)

    def scores(self, vectors: Mapping[str, JaggedTensor], numbers: KeyedJaggedTensor | None = None) -> Tensor:
        """Scores ``[total_candidates]`` in the order of the candidates' key: similarity by temperature."""
        key = self.schema.candidate
        if key is None:
            raise ValueError("schema.candidate: expected the key of the items to score, got None")
        vectors = awaited(vectors)
        users = self.users(vectors, numbers)
        asked = vectors[key]
        items = normalise(asked.values(), self.core.retrieval.similarity)
        rows = torch.repeat_interleave(users, asked.lengths().long(), dim=0, output_size=items.shape[0])
        scores: Tensor = (rows * items).sum(-1) / self.core.retrieval.temperature
        return scores

    def loss(
        self,
        vectors: Mapping[str, JaggedTensor],
        features: KeyedJaggedTensor,
        numbers: KeyedJaggedTensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Mean next-item loss over all positions, and the number of positions (scalar int64)."""
        vectors = awaited(vectors)
        schema = self.schema
        seq = self.sequence(vectors, numbers)
        rows = self.core.encode(seq)
        ids = features[schema.item].values()
        items = vectors[schema.item].values()
        layout, total = seq.layout, seq.values.shape[0]
        places, ends = layout.row_indices(total), layout.history_ends(total)
        # Rows of the history; the last of each user has nothing to predict.
        asks = (places >= layout.contextual_seq_len) & (places < ends - 1)
        events = _event_places(vectors[schema.item].lengths().long())
        predicted = (events > 0).nonzero().squeeze(1)
        positive_ids, positives = ids[predicted], items[predicted]
        if self.core.retrieval.negatives is NegativeSource.UNIFORM:
            if schema.negative is None:
                raise ValueError("schema.negative: expected the key of the drawn negatives, got None")
            negative_ids, negatives = features[schema.negative].values(), vectors[schema.negative].values()
        else:
            count = min(self.core.retrieval.num_negatives, positive_ids.numel())
            chosen = torch.randperm(positive_ids.numel(), device=ids.device)[:count]
            negative_ids, negatives = positive_ids[chosen], positives[chosen]
        loss = shared_negatives_loss(
            rows.values[asks], positive_ids, positives, negative_ids, negatives, self.core.retrieval
        )
        return loss, torch.tensor(positive_ids.numel(), device=ids.device)


class HSTURetrievalModel(nn.Module):
    """KeyedJaggedTensor in, scores in the order of the candidates' key out.

    Args:
        config: the transducer. schema: keys and tables. retrieval: similarity, temperature, loss.
        device: of the tables; ``torch.device("meta")`` where DistributedModelParallel makes them.
    """

    def __init__(
        self,
        config: HSTUConfig,
        schema: FeatureSchema,
        retrieval: RetrievalConfig,
        *,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.schema = schema
        self.embeddings = EmbeddingCollection(tables=schema.embedding_configs(config.embedding_dim), device=device)
        self.head = RetrievalHead(config, schema, retrieval)

    def forward(self, features: KeyedJaggedTensor, numbers: KeyedJaggedTensor | None = None) -> Tensor:
        """Scores ``[total_candidates]``.

        Args:
            features: ids under the schema's keys, validated by `check_batch` on the host.
            numbers: int64 seconds under its time keys.
        """
        scores: Tensor = self.head(self.embeddings(features), numbers)
        return scores

    def users(self, features: KeyedJaggedTensor, numbers: KeyedJaggedTensor | None = None) -> Tensor:
        """User vectors ``[B, D]``, for an index over the items."""
        return self.head.users(self.embeddings(features), numbers)

    def check(self, features: KeyedJaggedTensor, numbers: KeyedJaggedTensor | None = None) -> None:
        """Raise unless the batch fits the schema (`check_batch`); call it before the batch travels."""
        check_batch(SequenceBatch(features, numbers), self.schema)


class RetrievalLossHead(RetrievalHead):
    """The same weights under the same names, with the loss over all ranks' rows as its forward."""

    def __init__(self, head: RetrievalHead, autocast: torch.dtype | None) -> None:
        nn.Module.__init__(self)
        self.autocast = autocast
        self.schema, self.sequence, self.core = head.schema, head.sequence, head.core

    def forward(  # type: ignore[override]
        self,
        vectors: Mapping[str, JaggedTensor],
        features: KeyedJaggedTensor,
        numbers: KeyedJaggedTensor | None,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(features.device().type, self.autocast, enabled=self.autocast is not None):
            loss, rows = self.loss(vectors, features, numbers)
        return global_mean(loss, rows), rows


class HSTURetrievalTask(nn.Module):
    """`SequenceBatch` in, ``(loss, (loss, rows))`` out, as TorchRec's pipelines want a model to train.

    Shares the weights of ``model`` under the same names; ``autocast`` is the dtype of the dense part's products. The
    loss is weighted such that the gradients, averaged over the ranks by DistributedModelParallel, are those of the
    mean over all positions of the global batch, whatever the number of ranks.
    """

    def __init__(self, model: HSTURetrievalModel, *, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.embeddings = model.embeddings
        self.head = RetrievalLossHead(model.head, autocast)

    def forward(self, batch: SequenceBatch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        loss, rows = self.head(self.embeddings(batch.features), batch.features, batch.numbers)
        return loss, (loss.detach(), rows)


def _event_places(lengths: Tensor) -> Tensor:
    """``[n]``: the place of each event inside its own history."""
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    return torch.arange(starts.numel(), device=lengths.device) - starts
