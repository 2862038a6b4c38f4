"""HSTU as a RecBole model: padded batches in, jagged sequences inside, scores out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor, nn

from hstu_kernels import Backend
from hstu_plugin.adapters.recbole.actions import ActionEmbedding, training_values
from hstu_plugin.adapters.recbole.dataset import ExactTimeDataset
from hstu_plugin.adapters.recbole.options import (
    TrainExamples,
    data_options,
    hstu_config,
    retrieval_config,
    run_options,
    stochastic_length_config,
)
from hstu_plugin.adapters.recbole.register import refuse_multi_gpu
from hstu_plugin.config import RowTime
from hstu_plugin.embedding import init_item_table
from hstu_plugin.losses import normalise
from hstu_plugin.quantized_embedding import QuantizedEmbedding
from hstu_plugin.retrieval import HSTURetrieval
from hstu_plugin.sequence import JaggedSequence
from hstu_plugin.ultra.stochastic_length import stochastic_length


class HSTU(SequentialRecommender):  # type: ignore[misc]
    """Next-item recommender; keys and defaults: `hstu_plugin.adapters.recbole.options`.

    Batches carry ``item_id_list [B, N]`` and ``timestamp_list [B, N]`` (int64 seconds, right-padded with 0),
    ``item_length [B]``, and the target's ``item_id [B]`` and ``timestamp [B]``; with actions, ``rating_list [B, N]``.
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
        self.list_suffix = config["LIST_SUFFIX"]
        self.time_list_field = f"{self.time_field}{self.list_suffix}"
        self.item_embedding: nn.Embedding | QuantizedEmbedding = nn.Embedding(
            self.n_items, self.hstu_config.embedding_dim, padding_idx=0
        )
        init_item_table(self.item_embedding.weight)
        lengths = stochastic_length_config(values)
        # Called on each training batch; another sampler of histories may take its place.
        self.shorten: Callable[[JaggedSequence], JaggedSequence] | None = (
            None if lengths is None else partial(stochastic_length, config=lengths)
        )
        self.action_embedding: ActionEmbedding | None = None
        self.action_field = dataset.action_field if isinstance(dataset, ExactTimeDataset) else None
        if self.action_field is not None:
            actions = training_values(dataset, self.action_field)
            levels = data_options(values).action_levels
            self.action_embedding = ActionEmbedding(actions, levels, self.hstu_config.embedding_dim)
        self.retrieval = HSTURetrieval(self.hstu_config, self.retrieval_config)

    def backend_note(self) -> str:
        """Which implementation trains this model here, for a log."""
        layer = self.retrieval.encoder.first_layers[0]
        backend = layer.backend_for(next(layer.parameters()))
        if backend is not Backend.TRITON:
            return f"backend: {backend.value}"
        return "backend: triton. The first batches compile its kernels, once: later runs find them in Triton's cache."

    def forward(self, interaction) -> Tensor:  # type: ignore[no-untyped-def]
        """User vectors ``[B, D]`` after the histories of a batch."""
        seq = self._sequence(interaction)
        users: Tensor = self.retrieval(seq.with_values(self._vectors(seq.values)), self._request(interaction))
        return users

    def calculate_loss(self, interaction) -> Tensor:  # type: ignore[no-untyped-def]
        """Mean loss over all positions of the batch, or over the last ones with ``train_examples: prefix``."""
        seq = self._sequence(interaction)
        if self.shorten is not None and self.training:
            seq = self.shorten(seq)
        ids, last = seq.values[:, 0], seq.last_history_rows()
        following = ids.roll(-1) if self.all_positions else torch.zeros_like(ids)
        positives = following.index_copy(0, last, interaction[self.POS_ITEM_ID])
        return self.retrieval.loss(
            seq.with_values(self._vectors(seq.values)),
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

    def _sequence(self, interaction) -> JaggedSequence:  # type: ignore[no-untyped-def]
        """Ids of the histories, ``[L, 1]`` items or ``[L, 2]`` items and levels of actions."""
        columns = [interaction[self.ITEM_SEQ]]
        if self.action_embedding is not None:
            numbers = interaction[f"{self.action_field}{self.list_suffix}"]
            columns.append(self.action_embedding.levels(numbers))
        times = None if self.time_field is None else interaction[self.time_list_field]
        return JaggedSequence.from_padded(torch.stack(columns, dim=-1), interaction[self.ITEM_SEQ_LEN], times)

    def _vectors(self, ids: Tensor) -> Tensor:
        """``[L, D]``: item, plus action where there is one."""
        vectors: Tensor = self.item_embedding(ids[:, 0])
        return vectors if self.action_embedding is None else vectors + self.action_embedding(ids[:, 1])

    def _request(self, interaction) -> Tensor | None:  # type: ignore[no-untyped-def]
        """``[B]`` int64 time of the target event, where rows measure from the request."""
        if self.time_field is None or self.hstu_config.row_time is not RowTime.REQUEST:
            return None
        times: Tensor = interaction[self.time_field]
        return times


class ULTRAHSTU(HSTU):
    """HSTU with the defaults of ULTRA-HSTU, ``recbole_configs/ultra_hstu.yaml``; also called ``ULTRA-HSTU``."""
