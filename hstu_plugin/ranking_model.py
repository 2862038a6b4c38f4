"""Embedding and ranker as one model over batches of windows, for training and evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hstu_plugin.config import HSTUConfig
from hstu_plugin.events import Events
from hstu_plugin.ranker import HSTURanker, MultiTaskHead
from hstu_plugin.ranking_config import RankingConfig, RankingFeatures, TokenForm
from hstu_plugin.ranking_embedding import RankingEmbedding


@dataclass(frozen=True, slots=True)
class RankingBatch:
    """Windows: what users did before, and the candidates that they were shown next.

    Attributes:
        history: events with their actions.
        candidates: one sequence of events for each user of ``history``, later than all of it. Their actions are read by
            generative training of interleaved tokens alone, where each stands behind the row that predicts it.
        users: ``[B, user features]`` int64 ids.
        labels: ``[T, num_tasks]`` float; NaN missing.
    """

    history: Events
    candidates: Events
    users: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        windows, rows = self.history.layout.batch_size, self.candidates.items.shape[0]
        if self.candidates.layout.batch_size != windows or self.users.shape[:1] != (windows,):
            raise ValueError(
                f"candidates, users: expected {windows} windows as history, "
                f"got {self.candidates.layout.batch_size} and {tuple(self.users.shape)}"
            )
        if self.labels.dim() != 2 or self.labels.shape[0] != rows:
            raise ValueError(f"labels: expected [{rows}, tasks], got {tuple(self.labels.shape)}")

    def to(self, device: torch.device | str) -> RankingBatch:
        """The same batch on another device."""
        return replace(
            self,
            history=self.history.to(device),
            candidates=self.candidates.to(device),
            users=self.users.to(device),
            labels=self.labels.to(device),
        )


class WindowRanker(nn.Module, ABC):
    """A model that ranks the candidates of windows; HSTU and the baselines it is compared with."""

    head: MultiTaskHead

    @abstractmethod
    def forward(self, batch: RankingBatch) -> Tensor:
        """``[T, num_tasks]``: logits of binary tasks, values of regressions, as in use."""

    def training_scores(self, batch: RankingBatch) -> Tensor:
        """``[T, num_tasks]`` for the loss; no score depends on the candidate's own action."""
        scores: Tensor = self(batch)
        return scores


class RankingModel(WindowRanker):
    """HSTU or ULTRA-HSTU as a ranker of windows.

    Training on summed tokens scores candidates as in use, behind the history in item form. Training on interleaved
    tokens takes history and candidates as one series in one pass, so that every candidate also has the actions before
    it.

    ``head_users`` gives the head the vectors of the user's features beside the encoded candidate.
    """

    def __init__(
        self, features: RankingFeatures, config: HSTUConfig, ranking: RankingConfig, *, head_users: bool = False
    ) -> None:
        super().__init__()
        self.embedding = RankingEmbedding(features, config.embedding_dim)
        self.head_users = head_users and len(features.users) > 0
        self.ranker = HSTURanker(config, ranking, len(features.users) * config.embedding_dim if head_users else 0)

    @property
    def head(self) -> MultiTaskHead:  # type: ignore[override]
        return self.ranker.head

    def forward(self, batch: RankingBatch) -> Tensor:
        """As `WindowRanker.forward`."""
        tokens = self.embedding.scoring(batch.history, batch.candidates, batch.users)
        scores: Tensor = self.ranker(tokens, self.context(batch.users))
        return scores

    def context(self, users: Tensor) -> Tensor | None:
        """``[B, context_width]`` for the head from ``users [B, user features]``; ``None`` without ``head_users``."""
        return self.embedding.users(users).flatten(1) if self.head_users else None

    def training_scores(self, batch: RankingBatch) -> Tensor:
        """As `WindowRanker.training_scores`."""
        if self.embedding.features.form is TokenForm.SUMMED:
            return super().training_scores(batch)
        seq, rows = self.embedding.generative(batch.history, batch.candidates, batch.users)
        return self.ranker.score_rows(seq, rows, self.context(batch.users))
