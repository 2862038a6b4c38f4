"""The stack of HSTU layers, with cached scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hstu_kernels import AttentionPlan, Backend, LayerKV, next_event_timestamps, plan_attention
from hstu_plugin._versions import check_versions
from hstu_plugin.config import HSTUConfig, RowTime
from hstu_plugin.layer import HSTULayer
from hstu_plugin.sequence import JaggedSequence

check_versions(doors=())

KVCache = tuple[LayerKV, ...]


@dataclass(frozen=True, slots=True)
class EncodedHistory:
    """What encoding histories leaves behind.

    Attributes:
        rows: the encoder's output.
        cache: keys and values of all layers.
        waist: rows ``[W, D]`` that enter the layers behind the truncation; ``None`` without truncation.
    """

    rows: JaggedSequence
    cache: KVCache
    waist: JaggedSequence | None = None


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
        self.check_times(seq)
        asked_at = self._row_timestamps(seq, request_timestamps)
        rows = self._run(self.first_layers, seq, asked_at)
        return self._run(self.last_layers, *self._truncate(rows, asked_at)) if self.config.truncates else rows

    def output_rows(self, seq: JaggedSequence) -> Tensor:
        """``[L]`` bool: the rows of ``seq`` that have an output. All of them, unless the config truncates."""
        if not self.config.truncates:
            return torch.ones(seq.values.shape[0], dtype=torch.bool, device=seq.values.device)
        return seq.recent_rows(self.config.truncate_to)

    def prefill(self, seq: JaggedSequence, request_timestamps: Tensor | None = None) -> tuple[JaggedSequence, KVCache]:
        """As `forward` over histories without targets, and the keys and values that `decode` needs."""
        encoded = self.encode_history(seq, request_timestamps)
        return encoded.rows, encoded.cache

    def encode_history(self, seq: JaggedSequence, request_timestamps: Tensor | None = None) -> EncodedHistory:
        """As `prefill`, with what it takes to append events later (`extend`, `finish`)."""
        if seq.layout.num_targets is not None:
            raise ValueError("seq: expected histories without targets; take seq.history() first")
        self.check_times(seq)
        asked_at = self._row_timestamps(seq, request_timestamps)
        rows, cache = self._prefill(self.first_layers, seq, asked_at)
        if not self.config.truncates:
            return EncodedHistory(rows, cache)
        waist, asked_at = self._truncate(rows, asked_at)
        rows, late = self._prefill(self.last_layers, waist, asked_at)
        return EncodedHistory(rows, cache + late, waist)

    def extend(self, new: JaggedSequence, cache: KVCache) -> tuple[JaggedSequence, KVCache]:
        """History rows behind cached ones, through the layers before the truncation (all, without truncation).

        Args:
            new: ``[R, D]`` rows that continue the histories, without targets; the last one of each is the latest event.
            cache: of the rows before them in each of these layers; their outputs must not depend on what follows.

        Returns:
            outputs, and keys and values, of the new rows alone.
        """
        self.check_times(new)
        times, asked_at = self._key_times(new), self._row_timestamps(new, None)
        fresh = []
        for layer, kv in zip(self.first_layers, cache, strict=True):
            x, own = layer.extend(new.values, new.layout, times, asked_at, kv)
            new = new.with_values(x)
            fresh.append(own)
        return new, tuple(fresh)

    def finish(self, waist: JaggedSequence, next_times: Tensor | None) -> KVCache:
        """Keys and values of the layers behind the truncation.

        Args:
            waist: the rows that enter them.
            next_times: ``[W]`` int64, the time each row asks at where it asks at its next event's.
        """
        asked_at = next_times if self.config.row_time is RowTime.REQUEST else self._key_times(waist)
        return self._prefill(self.last_layers, waist, asked_at if self.config.time_bias else None)[1]

    def decode(self, targets: JaggedSequence, cache: KVCache) -> JaggedSequence:
        """Targets ``[T, D]`` against cached histories; equals the target rows of `forward` over both.

        Args:
            targets: one sequence of candidates for each user, with request timestamps when there is a time bias.
            cache: from `prefill` of the same users in the same order.

        A target measures from its own timestamp, the request's; ``row_time`` has no effect here.
        """
        if len(cache) != len(self.layers):
            raise ValueError(f"cache: expected one entry for each of {len(self.layers)} layers, got {len(cache)}")
        self.check_times(targets)
        x, checked = targets.values, None
        fused = self._stack()[0].backend_for(x) is Backend.TRITON
        for layer, kv in zip(self._stack(), cache, strict=True):
            # The layers of a stretch share what there is to check.
            decode = layer.decode_static if fused and kv.layout is checked else layer.decode
            x, checked = decode(x, targets.layout, targets.timestamps, kv), kv.layout
        return targets.with_values(x)

    @property
    def first_layers(self) -> Sequence[HSTULayer]:
        """The layers that see whole sequences; all of them, without truncation."""
        return self._stack()[: self.config.truncate_after_layers or None]

    @property
    def last_layers(self) -> Sequence[HSTULayer]:
        """The layers behind the truncation."""
        return self._stack()[self.config.truncate_after_layers :] if self.config.truncates else []

    def _prefill(
        self, layers: Sequence[HSTULayer], seq: JaggedSequence, asked_at: Tensor | None
    ) -> tuple[JaggedSequence, KVCache]:
        plan, cache = self._plan(seq, asked_at), []
        for layer in layers:
            x, kv = layer.prefill(seq.values, seq.layout, self._key_times(seq), asked_at, plan)
            seq = seq.with_values(x)
            cache.append(kv)
        return seq, tuple(cache)

    def _run(self, layers: Sequence[HSTULayer], seq: JaggedSequence, asked_at: Tensor | None) -> JaggedSequence:
        # Not `_prefill`: a cache that nobody asked for would keep the projections of all layers alive.
        plan = self._plan(seq, asked_at)
        for layer in layers:
            seq = seq.with_values(layer(seq.values, seq.layout, self._key_times(seq), asked_at, plan))
        return seq

    def _truncate(self, seq: JaggedSequence, asked_at: Tensor | None) -> tuple[JaggedSequence, Tensor | None]:
        # A row keeps the time it asks at: the event behind it in the shorter sequence may be another one.
        kept = seq.recent_rows(self.config.truncate_to)
        return seq.keep_recent(self.config.truncate_to), None if asked_at is None else asked_at[kept]

    def _key_times(self, seq: JaggedSequence) -> Tensor | None:
        return seq.timestamps if self.config.time_bias else None

    def _plan(self, seq: JaggedSequence, row_timestamps: Tensor | None) -> AttentionPlan:
        return plan_attention(
            seq.layout,
            self.config.mask,
            bias=self._stack()[0].bias(self._key_times(seq), row_timestamps),
            total_rows=seq.values.shape[0],
            backend=self._stack()[0].backend_for(seq.values),
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

    def check_times(self, seq: JaggedSequence) -> None:
        """Raise ``ValueError`` where the config has a time bias and ``seq`` has no times."""
        if self.config.time_bias and seq.timestamps is None:
            raise ValueError(
                "timestamps: the model has a time bias but the sequence has no timestamps; give int64 seconds, or "
                "build the model with time_bias=False (position bias only)"
            )
