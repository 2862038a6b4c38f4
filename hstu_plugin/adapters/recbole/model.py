"""HSTU as a RecBole model: padded batches in, jagged sequences inside, scores out."""

from __future__ import annotations

import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor, nn

from hstu_plugin.adapters.recbole.options import TrainExamples, data_options, hstu_config, retrieval_config, run_options
from hstu_plugin.adapters.recbole.register import refuse_multi_gpu
from hstu_plugin.config import RowTime
from hstu_plugin.embedding import init_item_table
from hstu_plugin.losses import normalise
from hstu_plugin.quantized_embedding import QuantizedEmbedding
from hstu_plugin.retrieval import HSTURetrieval
from hstu_plugin.sequence import JaggedSequence


class HSTU(SequentialRecommender):  # type: ignore[misc]
    """Next-item recommender; keys and defaults: `hstu_plugin.adapters.recbole.options`.

    Batches carry ``item_id_list [B, N]`` and ``timestamp_list [B, N]`` (int64 seconds, right-padded with 0),
    ``item_length [B]``, and the target's ``item_id [B]`` and ``timestamp [B]``.
    """

    input_type = InputType.POINTWISE

    def __init__(self, config, dataset) -> None:  # type: ignore[no-untyped-def]
        refuse_multi_gpu(config.final_config_dict)
        super().__init__(config, dataset)
        values = config.final_config_dict
        self.hstu_config = hstu_config(values)
        self.retrieval_config = retrieval_config(values)
        self.all_positions = data_options(values).train_examples is TrainExamples.GENERATIVE
        self.filter_seen_items = run_options(values).filter_seen_items
        self.time_field = config["TIME_FIELD"] if self.hstu_config.time_bias else None
        if self.hstu_config.time_bias and self.time_field is None:
            raise ValueError(
                "TIME_FIELD: HSTU measures time between events (time_bias), but the config names no time column; name "
                "it, or set `time_bias: False` to work with positions only"
            )
        self.time_list_field = f"{self.time_field}{config['LIST_SUFFIX']}"
        self.item_embedding: nn.Embedding | QuantizedEmbedding = nn.Embedding(
            self.n_items, self.hstu_config.embedding_dim, padding_idx=0
        )
        init_item_table(self.item_embedding.weight)
        self.retrieval = HSTURetrieval(self.hstu_config, self.retrieval_config)

    def forward(self, interaction) -> Tensor:  # type: ignore[no-untyped-def]
        """User vectors ``[B, D]`` after the histories of a batch."""
        seq = self._sequence(interaction, interaction[self.ITEM_SEQ])
        users: Tensor = self.retrieval(seq.with_values(self.item_embedding(seq.values)), self._request(interaction))
        return users

    def calculate_loss(self, interaction) -> Tensor:  # type: ignore[no-untyped-def]
        """Mean loss over all positions of the batch, or over the last ones with ``train_examples: prefix``."""
        items, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        last = (lengths - 1)[:, None]
        following = torch.zeros_like(items)
        if self.all_positions:
            following[:, :-1] = items[:, 1:]
        following = following.scatter(1, last, interaction[self.POS_ITEM_ID][:, None])
        seq = self._sequence(interaction, torch.stack([items, following], dim=-1))
        ids, positives = seq.values.unbind(-1)
        return self.retrieval.loss(
            seq.with_values(self.item_embedding(ids)),
            positives,
            self.item_embedding.weight,
            request_timestamps=self._request(interaction),
        )

    def predict(self, interaction) -> Tensor:  # type: ignore[no-untyped-def]
        """``[B]`` score of each row's own ``item_id``, as in `full_sort_predict` but without the whole table."""
        items = interaction[self.ITEM_ID]
        vectors = normalise(self.item_embedding(items), self.retrieval_config.similarity)
        scores: Tensor = (self.forward(interaction) * vectors).sum(-1) / self.retrieval_config.temperature
        if self.filter_seen_items:
            seen = (interaction[self.ITEM_SEQ] == items[:, None]).any(dim=1)
            scores = scores.masked_fill(seen, -torch.inf)
        return scores

    def full_sort_predict(self, interaction) -> Tensor:  # type: ignore[no-untyped-def]
        """``[B, n_items]`` scores; with ``filter_seen_items`` those of the input window are ``-inf``."""
        table = self.item_embedding
        # The weight of a quantised table would be all of it as numbers.
        items = table if isinstance(table, QuantizedEmbedding) else table.weight
        scores = self.retrieval.scores(self.forward(interaction), items)
        if self.filter_seen_items:
            scores = scores.scatter(1, interaction[self.ITEM_SEQ], -torch.inf)
        return scores

    def _sequence(self, interaction, values: Tensor) -> JaggedSequence:  # type: ignore[no-untyped-def]
        times = None if self.time_field is None else interaction[self.time_list_field]
        return JaggedSequence.from_padded(values, interaction[self.ITEM_SEQ_LEN], times)

    def _request(self, interaction) -> Tensor | None:  # type: ignore[no-untyped-def]
        """``[B]`` int64 time of the target event, where rows measure from the request."""
        if self.time_field is None or self.hstu_config.row_time is not RowTime.REQUEST:
            return None
        times: Tensor = interaction[self.time_field]
        return times
