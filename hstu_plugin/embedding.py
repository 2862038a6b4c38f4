"""From item vectors to the tokens of the encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hstu_kernels.dropout import dropout
from hstu_plugin.config import HSTUConfig
from hstu_plugin.sequence import JaggedSequence


class SequenceEmbedding(nn.Module):
    """``dropout(sqrt(D) * x + position_table[position])``, the input of the published research models.

    Targets stand at the position of the history end. A position beyond ``max_seq_len`` takes the last entry.
    """

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        self.config = config
        self.positions: nn.Embedding | None = None
        if config.position_embedding:
            # One entry more than N: the targets behind a full history.
            self.positions = nn.Embedding(config.max_seq_len + 1, config.embedding_dim)
            nn.init.trunc_normal_(self.positions.weight, std=config.embedding_dim**-0.5)

    def forward(self, seq: JaggedSequence, places: Tensor | None = None) -> JaggedSequence:
        """``values [L, D]`` of item (and action) vectors to tokens of the same shape.

        Args:
            seq: the vectors.
            places: ``[L]`` int64 positions, where they are not those of ``seq.layout``: of targets or new events that
                continue a cached history.
        """
        x: Tensor = seq.values * self.config.embedding_dim**0.5
        if self.positions is not None:
            if places is None:
                places = seq.layout.positions(x.shape[0])
            x = x + self.positions(places.clamp(max=self.config.max_seq_len))
        return seq.with_values(dropout(x, self.config.dropout, self.training))


def init_item_table(table: Tensor) -> None:
    """Draw ``[items, D]`` from the truncated normal of the published research code; row 0, the padding, becomes 0."""
    with torch.no_grad():
        nn.init.trunc_normal_(table, std=0.02)
        table[0].zero_()
