"""Next-item retrieval over a KeyedJaggedTensor, with tables that DistributedModelParallel may shard."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from hstu_plugin.adapters.torchrec.batch import Counts, SequenceBatch, check_batch
from hstu_plugin.adapters.torchrec.reduce import global_mean
from hstu_plugin.adapters.torchrec.schema import FeatureSchema
from hstu_plugin.adapters.torchrec.sequence import KJTToSequence, awaited
from hstu_plugin.config import HSTUConfig, NegativeSource, RetrievalConfig
from hstu_plugin.losses import next_item_loss, normalise
from hstu_plugin.retrieval import HSTURetrieval
from hstu_plugin.sequence import JaggedSequence
from hstu_plugin.shared_negatives import shared_negatives_loss


class RetrievalHead(nn.Module):
    """Everything behind the tables: dense, replicated, a leaf for TorchRec's tracer, ready for ``torch.compile``."""

    def __init__(
        self, config: HSTUConfig, schema: FeatureSchema, retrieval: RetrievalConfig, *, whole_table: bool = False
    ) -> None:
        super().__init__()
        if config.mask.contextual_sees_history and schema.contextual:
            raise ValueError(
                "mask.contextual_sees_history: expected False for the next-item loss, got True; contextual rows then "
                "see the items that other rows have to predict"
            )
        if config.time_bias and schema.time is None:
            raise ValueError("schema.time: expected the key of the event times as the model has a time bias, got None")
        self.schema, self.whole_table = schema, whole_table
        self.sequence = KJTToSequence(schema, with_candidates=False, width=config.embedding_dim)
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
        vectors = awaited(vectors, self.core.config.embedding_dim)
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
        counts: Counts | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean next-item loss over all positions, and the number of positions (scalar int64).

        With ``counts`` (`SequenceBatch.counts`) the host never waits for the device, unless the model truncates.
        """
        vectors = awaited(vectors, self.core.config.embedding_dim)
        schema, retrieval = self.schema, self.core.retrieval
        seq = self.sequence(vectors, numbers, counts)
        ids, items = features[schema.item].values(), vectors[schema.item].values()
        # Before the encoder runs: where the host has to wait for the choice it then has the whole encoder to launch.
        known = None if counts is None else counts[schema.item]
        asks, predicted = self._asking(seq, vectors[schema.item].lengths().long(), ids.numel(), known)
        # Filled on the device; a copied number would wait for all that was launched before.
        count = torch.full((), predicted.numel(), dtype=torch.int64, device=ids.device)
        rows = self.core.encode(seq).values.index_select(0, asks)
        positive_ids = ids[predicted]
        if self.whole_table:
            if schema.negative is None:
                raise ValueError("schema.negative: expected the key under which all items come, got None")
            # Row 0 is the padding, which nobody draws.
            table = F.pad(vectors[schema.negative].values(), (0, 0, 1, 0))
            return next_item_loss(rows, positive_ids, table, retrieval), count
        positives = items.index_select(0, predicted)
        if retrieval.negatives is NegativeSource.UNIFORM:
            if schema.negative is None:
                raise ValueError("schema.negative: expected the key of the drawn negatives, got None")
            negative_ids, negatives = features[schema.negative].values(), vectors[schema.negative].values()
        else:
            chosen = torch.randperm(positive_ids.numel(), device=ids.device)[: retrieval.num_negatives]
            negative_ids, negatives = positive_ids[chosen], positives[chosen]
        loss = shared_negatives_loss(rows, positive_ids, positives, negative_ids, negatives, retrieval)
        return loss, count

    def _asking(
        self, seq: JaggedSequence, events: Tensor, total: int, known: tuple[int, ...] | None
    ) -> tuple[Tensor, Tensor]:
        """Rows of the encoder's output that predict, and the events in ``[0, total)`` that they predict, alike."""
        layout = seq.layout
        # All events but the first of each user.
        later = (events - 1).clamp(min=0)
        size = int(later.sum()) if known is None else sum(max(0, length - 1) for length in known)
        first = events.cumsum(0) - events
        shift = torch.repeat_interleave(first + 1 - (later.cumsum(0) - later), later, output_size=size)
        predicted = shift + torch.arange(size, device=shift.device)
        # An event's row stands behind the contextual rows of its own and all earlier users.
        shift = torch.repeat_interleave(
            layout.seq_offsets[:-1] - first + layout.contextual_seq_len, events, output_size=total
        )
        asks = predicted - 1 + shift[predicted]
        if not self.core.config.truncates:
            return asks, predicted
        # With truncation a row that the later layers drop predicts nothing.
        kept = self.core.encoder.output_rows(seq)
        stay = kept[asks].nonzero().squeeze(1)
        return (kept.cumsum(0) - 1)[asks[stay]], predicted[stay]


class HSTURetrievalModel(nn.Module):
    """KeyedJaggedTensor in, scores in the order of the candidates' key out.

    Args:
        config: the transducer. schema: keys and tables. retrieval: similarity, temperature, loss.
        whole_table: all items from id 1 on come under ``schema.negative``, in order, with every training batch, and
            the loss is that of `hstu_plugin.losses.next_item_loss` (``full_softmax``, or negatives for each row).
        device: of the tables; ``torch.device("meta")`` where DistributedModelParallel makes them.
    """

    def __init__(
        self,
        config: HSTUConfig,
        schema: FeatureSchema,
        retrieval: RetrievalConfig,
        *,
        whole_table: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.schema = schema
        self.embeddings = EmbeddingCollection(tables=schema.embedding_configs(config.embedding_dim), device=device)
        self.head = RetrievalHead(config, schema, retrieval, whole_table=whole_table)

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
        self.schema, self.whole_table = head.schema, head.whole_table
        self.sequence, self.core = head.sequence, head.core

    def forward(  # type: ignore[override]
        self,
        vectors: Mapping[str, JaggedTensor],
        features: KeyedJaggedTensor,
        numbers: KeyedJaggedTensor | None,
        counts: Counts | None = None,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(features.device().type, self.autocast, enabled=self.autocast is not None):
            loss, rows = self.loss(vectors, features, numbers, counts)
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
        loss, rows = self.head(self.embeddings(batch.features), batch.features, batch.numbers, batch.counts)
        return loss, (loss.detach(), rows)
