"""Multi-task ranking over a KeyedJaggedTensor, with tables that DistributedModelParallel may shard."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from hstu_plugin.adapters.torchrec.batch import Counts, SequenceBatch, check_batch
from hstu_plugin.adapters.torchrec.channel import Channel, check_channels
from hstu_plugin.adapters.torchrec.events import EventBatch, KJTToEvents
from hstu_plugin.adapters.torchrec.reduce import global_mean
from hstu_plugin.adapters.torchrec.schema import FeatureSchema
from hstu_plugin.adapters.torchrec.sequence import KJTToSequence, awaited, pooled
from hstu_plugin.config import HSTUConfig
from hstu_plugin.ranker import HSTURanker
from hstu_plugin.ranking_config import RankingConfig
from hstu_plugin.ranking_losses import multi_task_loss
from hstu_plugin.ranking_tokens import with_targets
from hstu_plugin.sequence import JaggedSequence
from hstu_plugin.ultra.mixture import MixtureConfig, MixtureRanker


class RankingHead(nn.Module):
    """Everything behind the tables: dense, replicated, a leaf for TorchRec's tracer, ready for ``torch.compile``."""

    def __init__(
        self,
        config: HSTUConfig,
        schema: FeatureSchema,
        ranking: RankingConfig,
        mixture: Mapping[str, Channel] | None = None,
        head_users: bool = False,
    ) -> None:
        super().__init__()
        channels = dict(mixture or {})
        if head_users and (channels or not schema.contextual):
            raise ValueError(
                "head_users: expected False for a mixture of transducers, and for schemas without contextual keys, "
                "got True"
            )
        timed = any(one.time_bias for one in ([c.config for c in channels.values()] or [config]))
        if timed and (schema.time is None or schema.candidate_time is None):
            raise ValueError(
                "schema: expected the keys time and candidate_time as the model has a time bias, got "
                f"{schema.time!r} and {schema.candidate_time!r}"
            )
        self.schema, self.channels, self.head_users, self.width = schema, channels, head_users, config.embedding_dim
        self.core: HSTURanker | MixtureRanker
        if channels:
            check_channels(channels, config, schema)
            self.core = MixtureRanker(MixtureConfig(channels={n: c.config for n, c in channels.items()}), ranking)
        else:
            width = len(schema.contextual) * config.embedding_dim if head_users else 0
            self.core = HSTURanker(config, ranking, width)
        self.sequence: KJTToSequence | None = None
        self.events: KJTToEvents | None = None
        if schema.actions is None:
            self.sequence = KJTToSequence(schema, with_candidates=True, width=config.embedding_dim)
        else:
            self.events = KJTToEvents(schema, config.embedding_dim)

    def forward(
        self,
        vectors: Mapping[str, JaggedTensor],
        numbers: KeyedJaggedTensor | None = None,
        features: KeyedJaggedTensor | None = None,
        measures: KeyedJaggedTensor | None = None,
    ) -> Tensor:
        """As `scores`; ``features``, the ids themselves, are needed for schemas with ``actions``."""
        if self.sequence is not None:
            return self._plain_scores(vectors, numbers)
        if features is None:
            raise ValueError("features: expected the ids beside their vectors for a schema with actions, got None")
        return self.scores(vectors, SequenceBatch(features, numbers, None, measures))

    def scores(self, vectors: Mapping[str, JaggedTensor], batch: SequenceBatch) -> Tensor:
        """``[total_candidates, num_tasks]`` in the order of the candidates' key: logits, values of regressions."""
        if self.sequence is not None:
            return self._plain_scores(vectors, batch.numbers, batch.counts)
        history, candidates = self.tokens(vectors, batch)
        if isinstance(self.core, MixtureRanker):
            assert not isinstance(history, JaggedSequence)
            scores: Tensor = self.core(history, candidates)
        else:
            assert isinstance(history, JaggedSequence)
            scores = self.core(with_targets(history, candidates), self.context(vectors))
        return scores

    def _plain_scores(
        self, vectors: Mapping[str, JaggedTensor], numbers: KeyedJaggedTensor | None, counts: Counts | None = None
    ) -> Tensor:
        assert self.sequence is not None
        seq = self.sequence(vectors, numbers, counts)
        scores: Tensor = self.core(seq) if self.channels else self.core(seq, self.context(vectors))
        return scores

    def context(self, vectors: Mapping[str, JaggedTensor]) -> Tensor | None:
        """``[B, contextual keys * D]``: what the head reads beside a candidate; ``None`` without ``head_users``."""
        if not self.head_users:
            return None
        found = awaited(vectors, self.width)
        return torch.cat([pooled(found[key]) for key in self.schema.contextual], 1)

    def training_scores(self, vectors: Mapping[str, JaggedTensor], batch: SequenceBatch) -> Tensor:
        """As `scores`; interleaved tokens are trained as one series (HSTU, section 2.2), as `RankingModel` does."""
        if self.events is None or not self.schema.reads_candidate_actions:
            return self.scores(vectors, batch)
        assert isinstance(self.core, HSTURanker)
        events: EventBatch = self.events(vectors, batch)
        seq, rows = events.builder.generative(events.history, events.candidates, events.users)
        return self.core.score_rows(seq, rows, self.context(vectors))

    def tokens(
        self, vectors: Mapping[str, JaggedTensor], batch: SequenceBatch
    ) -> tuple[JaggedSequence | dict[str, JaggedSequence], JaggedSequence]:
        """Token vectors of the histories (by channel, for a mixture) and of the candidates, for cached scoring."""
        if self.sequence is not None:
            seq: JaggedSequence = self.sequence(vectors, batch.numbers, batch.counts)
            return seq.history(), seq.targets()
        assert self.events is not None
        events: EventBatch = self.events(vectors, batch)
        candidates = events.builder.candidates(events.candidates)
        if not self.channels:
            return events.builder.history(events.history, events.users), candidates
        histories = {
            name: events.builder.history(events.with_actions(channel.actions), events.users)
            for name, channel in self.channels.items()
        }
        return histories, candidates


class RankingLossHead(RankingHead):
    """The same weights under the same names, with the loss over all ranks' rows as its forward."""

    def __init__(self, head: RankingHead, autocast: torch.dtype | None) -> None:
        nn.Module.__init__(self)
        self.autocast = autocast
        self.schema, self.channels, self.head_users = head.schema, head.channels, head.head_users
        self.width = head.width
        self.core, self.sequence, self.events = head.core, head.sequence, head.events

    def forward(  # type: ignore[override]
        self, vectors: Mapping[str, JaggedTensor], batch: SequenceBatch
    ) -> tuple[Tensor, Tensor]:
        ranking, labels = self.core.ranking, batch.labels
        assert labels is not None
        with torch.autocast(labels.device.type, self.autocast, enabled=self.autocast is not None):
            scores = self.training_scores(vectors, batch)
        alone = [
            multi_task_loss(scores[:, [k]], labels[:, [k]], RankingConfig(tasks=(task,)))[0]
            for k, task in enumerate(ranking.tasks)
        ]
        known = (~labels.isnan()).sum(0)
        loss = global_mean(torch.stack(alone), known).sum()
        return loss, known.sum()


class HSTURankingModel(nn.Module):
    """KeyedJaggedTensor in, ``[total_candidates, num_tasks]`` in the order of the candidates' key out.

    Every candidate is scored as if it stood alone behind the history. What was done at an event is in
    ``schema.actions`` (types, intensities, contexts; tokens summed or interleaved), or a plain id among the side
    features of the history; candidates have no action, so that the label cannot leak.

    Args:
        config: the transducer. schema: keys and tables. ranking: tasks and head.
        mixture: channels by name, in the place of the one transducer of ``config``, which then gives the width.
        head_users: give the head the vectors of ``schema.contextual`` beside the encoded candidate.
        device: of the tables; ``torch.device("meta")`` where DistributedModelParallel makes them.
    """

    def __init__(
        self,
        config: HSTUConfig,
        schema: FeatureSchema,
        ranking: RankingConfig,
        *,
        mixture: Mapping[str, Channel] | None = None,
        head_users: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.schema = schema
        self.embeddings = EmbeddingCollection(tables=schema.embedding_configs(config.embedding_dim), device=device)
        self.head = RankingHead(config, schema, ranking, mixture, head_users)

    def forward(
        self,
        features: KeyedJaggedTensor,
        numbers: KeyedJaggedTensor | None = None,
        measures: KeyedJaggedTensor | None = None,
    ) -> Tensor:
        """Scores.

        Args:
            features: ids under the schema's keys, validated by `check_batch` on the host.
            numbers: int64 seconds, and the whole numbers of actions, under its keys.
            measures: float32 numbers of actions under its keys.
        """
        scores: Tensor = self.head(self.embeddings(features), numbers, features, measures)
        return scores

    def check(
        self,
        features: KeyedJaggedTensor,
        numbers: KeyedJaggedTensor | None = None,
        measures: KeyedJaggedTensor | None = None,
    ) -> None:
        """Raise unless the batch fits the schema (`check_batch`); call it before the batch travels."""
        check_batch(SequenceBatch(features, numbers, None, measures), self.schema)


class HSTURankingTask(nn.Module):
    """`SequenceBatch` in, ``(loss, (loss, rows))`` out, as TorchRec's pipelines want a model to train.

    Shares the weights of ``model`` under the same names; the loss is weighted as that of `HSTURetrievalTask`.
    """

    def __init__(self, model: HSTURankingModel, *, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.embeddings = model.embeddings
        self.head = RankingLossHead(model.head, autocast)

    def forward(self, batch: SequenceBatch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        loss, rows = self.head(self.embeddings(batch.features), batch)
        return loss, (loss.detach(), rows)
