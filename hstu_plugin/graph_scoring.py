"""Scoring by CUDA graphs: one user at a time, in micro-batches of one shape, against buffers of a fixed capacity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hstu_kernels import JaggedLayout, LayerKV
from hstu_kernels.attention.static import static_target_attention
from hstu_kernels.bias import bucket_boundaries
from hstu_plugin.encoder import KVCache
from hstu_plugin.layer import HSTULayer
from hstu_plugin.ranker import HSTURanker
from hstu_plugin.sequence import JaggedSequence
from hstu_plugin.ultra.mixture import Transducer


@dataclass(frozen=True, slots=True)
class _Layer:
    module: HSTULayer
    keys: Tensor
    values: Tensor
    times: Tensor | None
    end: Tensor


@dataclass(frozen=True, slots=True)
class _Channel:
    transducer: HSTURanker | Transducer
    layers: tuple[_Layer, ...]
    boundaries: Tensor | None

    @property
    def history_end(self) -> Tensor:
        return self.layers[0].end


class GraphScorer:
    """A ranker's layers and head over fixed buffers.

    Args:
        transducers: by channel. head: over their rows, side by side.
        micro_batch_size: candidates of one replay; the last one of a user is filled up.
        capacity: history rows that the buffers hold, by channel.
        contextual_seq_len: leading rows of the histories.
        capture: record a CUDA graph. Without, the same code runs step by step, on any device.
    """

    def __init__(
        self,
        transducers: Mapping[str, HSTURanker | Transducer],
        head: nn.Module,
        *,
        micro_batch_size: int,
        capacity: Mapping[str, int],
        contextual_seq_len: int,
        capture: bool,
    ) -> None:
        weight = next(head.parameters())
        self.device, self._head = weight.device, head
        self._context = contextual_seq_len
        width = next(iter(transducers.values())).config.embedding_dim
        self._rows = torch.zeros(micro_batch_size, width, dtype=weight.dtype, device=self.device)
        self._asked_at = torch.zeros(micro_batch_size, dtype=torch.int64, device=self.device)
        self._layout = JaggedLayout(
            torch.tensor([0, micro_batch_size], device=self.device), max_seq_len=micro_batch_size
        )
        self._channels = {n: self._channel(t, capacity[n], weight.dtype) for n, t in transducers.items()}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._out = self._forward()
        if capture:
            self._capture()

    @torch.no_grad()
    def score(self, caches: Mapping[str, KVCache], targets: JaggedSequence) -> Tensor:
        """Scores ``[T, num_tasks]`` of one user's candidates against its cached histories."""
        for name, channel in self._channels.items():
            for buffer, kv in zip(channel.layers, caches[name], strict=True):
                _load(buffer, kv)
        parts = []
        step = self._rows.shape[0]
        for begin in range(0, targets.values.shape[0], step):
            rows = targets.values[begin : begin + step]
            self._rows[: rows.shape[0]].copy_(rows)
            if targets.timestamps is not None:
                self._asked_at[: rows.shape[0]].copy_(targets.timestamps[begin : begin + step])
            if self._graph is None:
                self._out = self._forward()
            else:
                self._graph.replay()
            parts.append(self._out[: rows.shape[0]].clone())
        return torch.cat(parts)

    def _channel(self, transducer: HSTURanker | Transducer, capacity: int, dtype: torch.dtype) -> _Channel:
        config, encoder = transducer.config, transducer.encoder
        late = min(capacity, self._context + config.truncate_to)
        layers: list[_Layer] = []
        stretches: Sequence[tuple[Sequence[HSTULayer], int]]
        stretches = [(encoder.first_layers, capacity), (encoder.last_layers, late)]
        for modules, rows in stretches:
            end = torch.zeros((), dtype=torch.int64, device=self.device)
            times = torch.zeros(rows, dtype=torch.int64, device=self.device) if config.time_bias else None
            for module in modules:
                keys = torch.zeros(rows, config.num_heads, config.attention_dim, dtype=dtype, device=self.device)
                values = torch.zeros(rows, config.num_heads, config.linear_dim, dtype=dtype, device=self.device)
                layers.append(_Layer(module, keys, values, times, end))
        # Made here: a graph may not copy from the host.
        bounds = bucket_boundaries(config.num_time_buckets, self.device) if config.time_bias else None
        return _Channel(transducer, tuple(layers), bounds)

    @torch.no_grad()
    def _forward(self) -> Tensor:
        rows = []
        for channel in self._channels.values():
            places = channel.history_end.expand(self._rows.shape[0])
            x = channel.transducer.embedding(JaggedSequence(self._rows, self._layout), places).values
            for layer in channel.layers:
                x = self._through(layer, channel.boundaries, x)
            rows.append(x)
        scores: Tensor = self._head(torch.cat(rows, dim=-1))
        return scores

    def _through(self, layer: _Layer, boundaries: Tensor | None, x: Tensor) -> Tensor:
        config = layer.module.config

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return static_target_attention(
                q,
                k,
                v,
                layer.keys,
                layer.values,
                layer.end,
                config.mask,
                contextual_seq_len=self._context,
                alpha=config.alpha,
                scale=config.attn_scale,
                bias=layer.module.bias(layer.times, self._asked_at),
                boundaries=boundaries,
            )

        return layer.module.through(x, attend)

    def _capture(self) -> None:
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            # Libraries allocate their workspaces in the first runs, which a graph may not hold.
            for _ in range(2):
                self._forward()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._out = self._forward()
        self._graph = graph


def capacity_for(rows: int) -> int:
    """The next power of two, 256 at least: a few graphs serve all lengths."""
    return max(256, 1 << (rows - 1).bit_length()) if rows else 256


def _load(buffer: _Layer, kv: LayerKV) -> None:
    rows = kv.k.shape[0]
    buffer.keys[:rows].copy_(kv.k)
    buffer.values[:rows].copy_(kv.v)
    if buffer.times is not None and kv.timestamps is not None:
        buffer.times[:rows].copy_(kv.timestamps)
    buffer.end.fill_(rows)
