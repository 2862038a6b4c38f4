"""The stack of HSTU layers, with cached scoring."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hstu_kernels import AttentionPlan, LayerKV, next_event_timestamps, plan_attention
from hstu_plugin._versions import check_versions
from hstu_plugin.config import HSTUConfig, RowTime
from hstu_plugin.layer import HSTULayer
from hstu_plugin.sequence import JaggedSequence

check_versions(doors=())

KVCache = tuple[LayerKV, ...]


class HSTUEncoder(nn.Module):
    """Sequences of tokens in, sequences of contextualised tokens out. Holds no state of a request."""

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.num_layers))

    def _stack(self) -> list[HSTULayer]:
        return [layer for layer in self.layers if isinstance(layer, HSTULayer)]

    def forward(self, seq: JaggedSequence, request_timestamps: Tensor | None = None) -> JaggedSequence:
        """Transform ``seq`` (targets allowed). With truncation only `output_rows` come out, in a layout of their own.

        Args:
            seq: ``[contextual | history | targets]`` tokens ``[L, D]``; timestamps when the config has a time bias.
            request_timestamps: ``[B]`` int64 seconds of the request behind each history, where it is known; the last
                history row then measures from it instead of from its own time (``row_time: request`` only).

        Raises:
            ValueError: timestamps are missing or do not fit.
        """
        return self._run(seq, request_timestamps, None)

    def output_rows(self, seq: JaggedSequence) -> Tensor:
        """``[L]`` bool: the rows of ``seq`` that have an output. All of them, unless the config truncates."""
        if not self.config.truncates:
            return torch.ones(seq.values.shape[0], dtype=torch.bool, device=seq.values.device)
        return seq.recent_rows(self.config.truncate_to)

    def prefill(self, seq: JaggedSequence, request_timestamps: Tensor | None = None) -> tuple[JaggedSequence, KVCache]:
        """As `forward` over histories without targets, and the keys and values that `decode` needs."""
        if seq.layout.num_targets is not None:
            raise ValueError("seq: expected histories without targets; take seq.history() first")
        cache: list[LayerKV] = []
        rows = self._run(seq, request_timestamps, cache)
        return rows, tuple(cache)

    def decode(self, targets: JaggedSequence, cache: KVCache) -> JaggedSequence:
        """Targets ``[T, D]`` against cached histories; equals the target rows of `forward` over both.

        Args:
            targets: one sequence of candidates for each user, with request timestamps when there is a time bias.
            cache: from `prefill` of the same users in the same order.

        A target measures from its own timestamp, the request's; ``row_time`` has no effect here.
        """
        if len(cache) != len(self.layers):
            raise ValueError(f"cache: expected one entry for each of {len(self.layers)} layers, got {len(cache)}")
        self._check_times(targets)
        x = targets.values
        for layer, kv in zip(self._stack(), cache, strict=True):
            x = layer.decode(x, targets.layout, targets.timestamps, kv)
        return targets.with_values(x)

    def _run(
        self, seq: JaggedSequence, request_timestamps: Tensor | None, cache: list[LayerKV] | None
    ) -> JaggedSequence:
        """All layers; their keys and values go into ``cache`` when there is one, and are let go otherwise."""
        self._check_times(seq)
        rows = self._row_timestamps(seq, request_timestamps)
        plan = self._plan(seq, rows)
        for index, layer in enumerate(self._stack()):
            if self.config.truncates and index == self.config.truncate_after_layers:
                # A row keeps the time it asks at; behind a dropped row the next event would be another one.
                rows = None if rows is None else rows[seq.recent_rows(self.config.truncate_to)]
                seq = seq.keep_recent(self.config.truncate_to)
                plan = self._plan(seq, rows)
            if cache is None:
                x = layer(seq.values, seq.layout, self._key_times(seq), rows, plan)
            else:
                x, kv = layer.prefill(seq.values, seq.layout, self._key_times(seq), rows, plan)
                cache.append(kv)
            seq = seq.with_values(x)
        return seq

    def _key_times(self, seq: JaggedSequence) -> Tensor | None:
        return seq.timestamps if self.config.time_bias else None

    def _plan(self, seq: JaggedSequence, row_timestamps: Tensor | None) -> AttentionPlan:
        return plan_attention(
            seq.layout,
            self.config.mask,
            bias=self._stack()[0].bias(self._key_times(seq), row_timestamps),
            total_rows=seq.values.shape[0],
            backend=self.config.backend,
        )

    def _row_timestamps(self, seq: JaggedSequence, request_timestamps: Tensor | None) -> Tensor | None:
        if not self.config.time_bias or seq.timestamps is None:
            return None
        if self.config.row_time is RowTime.EVENT:
            return seq.timestamps
        rows = next_event_timestamps(seq.timestamps, seq.layout)
        if request_timestamps is None:
            return rows
        if request_timestamps.shape != (seq.layout.batch_size,):
            raise ValueError(
                f"request_timestamps: expected [{seq.layout.batch_size}], got {tuple(request_timestamps.shape)}"
            )
        if request_timestamps.dtype != torch.int64:
            raise TypeError(f"request_timestamps: expected int64 seconds, got {request_timestamps.dtype}")
        filled = seq.layout.history_lengths > 0
        return rows.index_copy(0, seq.last_history_rows()[filled], request_timestamps[filled])

    def _check_times(self, seq: JaggedSequence) -> None:
        if self.config.time_bias and seq.timestamps is None:
            raise ValueError(
                "timestamps: the model has a time bias but the sequence has no timestamps; give int64 seconds, or "
                "build the model with time_bias=False (position bias only)"
            )
