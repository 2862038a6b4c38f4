"""Next-item retrieval: user vectors from histories, generative training over all positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hstu_plugin.config import HSTUConfig, RetrievalConfig
from hstu_plugin.embedding import SequenceEmbedding
from hstu_plugin.encoder import HSTUEncoder
from hstu_plugin.losses import next_item_loss, normalise
from hstu_plugin.quantized_embedding import QuantizedEmbedding
from hstu_plugin.sequence import JaggedSequence


class HSTURetrieval(nn.Module):
    """Encoder and retrieval head. The item table is the caller's: a plain embedding or a sharded one.

    Sequences come as item vectors ``[L, D]``; item id 0 is the padding and never scored.
    """

    def __init__(self, config: HSTUConfig, retrieval: RetrievalConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.retrieval = retrieval if retrieval is not None else RetrievalConfig()
        self.embedding = SequenceEmbedding(config)
        self.encoder = HSTUEncoder(config)

    def encode(self, seq: JaggedSequence, request_timestamps: Tensor | None = None) -> JaggedSequence:
        """Item vectors ``[L, D]`` to contextualised rows ``[L, D]``; with truncation only the latest."""
        rows: JaggedSequence = self.encoder(self.embedding(seq), request_timestamps)
        return rows

    def forward(self, seq: JaggedSequence, request_timestamps: Tensor | None = None) -> Tensor:
        """User vectors ``[B, D]`` after each history, normalised as the similarity wants them.

        Args:
            seq: histories of item vectors, without targets.
            request_timestamps: ``[B]`` int64 seconds, where known (`HSTUEncoder.forward`).
        """
        rows = self.encode(seq, request_timestamps)
        lengths = rows.layout.history_lengths
        # A user without history has no row: a zero vector, under which all items score alike.
        known = lengths > 0
        users = rows.values.new_zeros(lengths.numel(), rows.values.shape[1])
        users = users.index_put((known,), rows.values[rows.last_history_rows()[known]])
        return normalise(users, self.retrieval.similarity)

    def scores(self, users: Tensor, items: Tensor | QuantizedEmbedding) -> Tensor:
        """``[B, num_items]`` from `forward`'s user vectors and item table ``[num_items, D]``; -inf for the padding.

        A quantised table is turned into numbers one part at a time.
        """
        if isinstance(items, QuantizedEmbedding):
            products = items.scores(users, lambda rows: normalise(rows, self.retrieval.similarity))
        else:
            products = users @ normalise(items, self.retrieval.similarity).T
        padding = torch.arange(products.shape[1], device=products.device) == 0
        return (products / self.retrieval.temperature).masked_fill(padding, -torch.inf)

    def loss(
        self,
        seq: JaggedSequence,
        positives: Tensor,
        items: Tensor,
        *,
        request_timestamps: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean next-item loss over all positions (generative training, HSTU section 2.2).

        With truncation a row that the later layers drop has no output and predicts nothing: the loss is the mean over
        the rows that are left, the latest ``truncate_to`` of each history (and the contextual ones).

        Args:
            seq: histories of item vectors ``[L, D]``.
            positives: ``[L]`` int64, the item that follows each row; 0 where there is none.
            items: ``[num_items, D]`` item table.
            request_timestamps: ``[B]`` int64 time of the event that follows each history, where known.
            generator: source of sampled negatives.

        Raises:
            ValueError: ``positives`` do not fit the rows, or the mask would show the rows what they have to predict.
        """
        if self.config.mask.contextual_sees_history and seq.layout.contextual_seq_len > 0:
            raise ValueError(
                "mask.contextual_sees_history: expected False for the next-item loss, got True; contextual rows then "
                "see the whole history and every row sees them, so that from the second layer on each row knows the "
                "items it has to predict. Train this loss without it; it fits models that score candidates"
            )
        if positives.shape != seq.values.shape[:1]:
            raise ValueError(f"positives: expected [{seq.values.shape[0]}], got {tuple(positives.shape)}")
        rows = self.encode(seq, request_timestamps).values
        if self.config.truncates:
            positives = positives[self.encoder.output_rows(seq)]
        asked = positives != 0
        return next_item_loss(rows[asked], positives[asked], items, self.retrieval, generator=generator)
