"""What HSTU is compared with as a ranker: pooled features with interactions, attention pooling, item averages."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hstu_kernels import JaggedLayout
from hstu_plugin.events import Events
from hstu_plugin.ranker import MultiTaskHead
from hstu_plugin.ranking_config import RankingConfig, RankingFeatures, TaskKind, TokenForm
from hstu_plugin.ranking_embedding import RankingEmbedding
from hstu_plugin.ranking_model import RankingBatch, WindowRanker
from hstu_plugin.sequence import JaggedSequence


class DLRM(WindowRanker):
    """DLRM-style (arXiv 1906.00091): feature vectors, the mean of the history, their pairwise products, an MLP."""

    def __init__(self, features: RankingFeatures, width: int, ranking: RankingConfig) -> None:
        super().__init__()
        self.embedding = _summed_embedding(features, width)
        fields = len(features.items) + len(features.users) + len(features.series) + 1
        left, right = torch.triu_indices(fields, fields, offset=1)
        self.pairs: Tensor
        self.register_buffer("pairs", left * fields + right, persistent=False)
        self.head = MultiTaskHead(fields * width + self.pairs.numel(), ranking)

    def forward(self, batch: RankingBatch) -> Tensor:
        """As `WindowRanker.forward`."""
        embedding, history = self.embedding, batch.history
        events = embedding.item_vectors(history) + embedding.actions(history)
        known = [_mean(history.as_sequence(events))]
        known += embedding.users(batch.users).unbind(1)
        known += embedding.series(_latest(history)).unbind(1)
        counts, total = batch.candidates.layout.seq_lengths, batch.candidates.items.shape[0]
        fields = [torch.repeat_interleave(rows, counts, dim=0, output_size=total) for rows in known]
        fields += embedding.items(batch.candidates.items).unbind(1)
        stacked = torch.stack(fields, 1)
        products = (stacked @ stacked.mT).flatten(1).index_select(1, self.pairs)
        scores: Tensor = self.head(torch.cat([stacked.flatten(1), products], 1))
        return scores


class PooledAttention(WindowRanker):
    """SASRec-style pooling (arXiv 1808.09781): softmax attention over the history, its last row beside the candidate.

    The history is read without knowing the candidate, which meets it only in the head.
    """

    def __init__(
        self,
        features: RankingFeatures,
        width: int,
        ranking: RankingConfig,
        *,
        num_layers: int,
        num_heads: int,
        max_seq_len: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embedding = _summed_embedding(features, width)
        self.positions = nn.Embedding(max_seq_len, width)
        nn.init.trunc_normal_(self.positions.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            width, num_heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)
        self.head = MultiTaskHead((3 + len(features.users)) * width, ranking)

    def forward(self, batch: RankingBatch) -> Tensor:
        """As `WindowRanker.forward`."""
        user = self._pooled(self.embedding.history(batch.history))
        known = [user, self.embedding.users(batch.users).flatten(1)]
        shown = self.embedding.candidates(batch.candidates)
        counts, total = shown.layout.seq_lengths, shown.values.shape[0]
        fields = torch.repeat_interleave(torch.cat(known, 1), counts, dim=0, output_size=total)
        user = fields[:, : shown.values.shape[1]]
        scores: Tensor = self.head(torch.cat([fields, shown.values, user * shown.values], 1))
        return scores

    def _pooled(self, history: JaggedSequence) -> Tensor:
        """``[B, D]``: the row of the latest token; zero for a user without history."""
        layout, total = history.layout, history.values.shape[0]
        width, reach = history.values.shape[1], self.positions.num_embeddings
        if layout.max_seq_len > reach:
            raise ValueError(f"history: expected at most {reach} tokens, got up to {layout.max_seq_len}")
        places, ids = layout.row_indices(total), layout.sequence_ids(total)
        rows = self.dropout(history.values * width**0.5 + self.positions(places))
        padded = rows.new_zeros(layout.batch_size, max(1, layout.max_seq_len), width).index_put((ids, places), rows)
        # Padding stands behind the real rows, so the causal mask hides it from them.
        hidden = nn.Transformer.generate_square_subsequent_mask(padded.shape[1], device=rows.device, dtype=rows.dtype)
        encoded = self.encoder(padded, mask=hidden, is_causal=True)
        lengths = layout.seq_lengths
        last = encoded[torch.arange(layout.batch_size, device=rows.device), (lengths - 1).clamp(min=0)]
        pooled: Tensor = last * (lengths > 0)[:, None]
        return pooled


class ItemMean(WindowRanker):
    """Each item's mean label in training, drawn towards the mean of all; nothing about the user. Nothing to train."""

    prior_events = 20.0

    def __init__(self, features: RankingFeatures, ranking: RankingConfig) -> None:
        super().__init__()
        self.head = MultiTaskHead(1, ranking)
        self.head.requires_grad_(False)
        self.means: Tensor
        self.register_buffer("means", torch.zeros(features.items[0].num_ids, len(ranking.tasks)))

    def fit(self, items: Tensor, labels: Tensor) -> None:
        """Take the means from ``items [E]`` ids and ``labels [E, num_tasks]``, NaN missing."""
        known = ~labels.isnan()
        overall = labels.nanmean(0).nan_to_num(0.0)
        sums = torch.zeros_like(self.means).index_add_(0, items, labels.nan_to_num(0.0).to(self.means.dtype))
        counts = torch.zeros_like(self.means).index_add_(0, items, known.to(self.means.dtype))
        self.means.copy_((sums + self.prior_events * overall) / (counts + self.prior_events))

    def forward(self, batch: RankingBatch) -> Tensor:
        """As `WindowRanker.forward`."""
        means = self.means[batch.candidates.items[:, 0]]
        binary = torch.tensor([t.kind is TaskKind.BINARY for t in self.head.ranking.tasks], device=means.device)
        return torch.where(binary, means.clamp(1e-6, 1 - 1e-6).logit(), means)


def _summed_embedding(features: RankingFeatures, width: int) -> RankingEmbedding:
    if features.form is not TokenForm.SUMMED:
        raise ValueError(f"features.form: expected summed for a baseline, got {features.form}")
    return RankingEmbedding(features, width)


def _mean(seq: JaggedSequence) -> Tensor:
    layout: JaggedLayout = seq.layout
    sums = seq.values.new_zeros(layout.batch_size, seq.values.shape[1])
    sums = sums.index_add(0, layout.sequence_ids(seq.values.shape[0]), seq.values)
    return sums / layout.seq_lengths.clamp(min=1)[:, None]


def _latest(events: Events) -> Tensor:
    """``[B, series]``: the values in force at each user's latest event; 0, unknown, without any."""
    series, known = events.series, events.layout.seq_lengths > 0
    if not series.shape[0]:
        return series.new_zeros(known.shape[0], series.shape[1])
    # A user without events reads some other row, which is then masked.
    rows = (events.layout.seq_offsets[1:] - 1).clamp(min=0)
    return series[rows] * known[:, None]
