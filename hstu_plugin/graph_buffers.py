"""Buffers of fixed shapes and addresses for cached histories: what CUDA graphs of the scoring read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_kernels import JaggedLayout, LayerKV
from hstu_plugin.encoder import KVCache
from hstu_plugin.layer import HSTULayer
from hstu_plugin.ranker import HSTURanker
from hstu_plugin.ultra.mixture import Transducer

Transducers = Mapping[str, HSTURanker | Transducer]
_FEWEST_ROWS = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """What a set of buffers is made for: a few sets serve all batches.

    Attributes:
        users: of a micro-batch, at most.
        rows: of all their histories, by channel. longest: of one of them, by channel.
        contextual: leading contextual rows of each.
    """

    users: int
    rows: tuple[int, ...]
    longest: tuple[int, ...]
    contextual: int

    @classmethod
    def of(cls, caches: Mapping[str, KVCache]) -> Shape:
        """The smallest that holds ``caches``; channels in their order."""
        first = [cache[0] for cache in caches.values()]
        rows = [power_of_two(kv.k.shape[0], _FEWEST_ROWS) for kv in first]
        longest = [power_of_two(kv.layout.max_seq_len, _FEWEST_ROWS) for kv in first]
        users = power_of_two(first[0].layout.batch_size, 1)
        # No history is longer than all of them together.
        bounds = tuple(min(pair) for pair in zip(longest, rows, strict=True))
        return cls(users, tuple(rows), bounds, first[0].layout.contextual_seq_len)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Layers that see the same rows, and a cache of theirs."""

    layers: tuple[HSTULayer, ...]
    cache: KVCache

    @property
    def layout(self) -> JaggedLayout:
        return self.cache[0].layout

    def load(self, cache: Sequence[LayerKV]) -> None:
        """Copy histories in: all keys and values by one launch where they lie side by side."""
        rows, users = cache[0].k.shape[0], cache[0].layout.batch_size
        offsets = self.layout.seq_offsets
        offsets[: users + 1].copy_(cache[0].layout.seq_offsets)
        offsets[users + 1 :].fill_(rows)
        torch._foreach_copy_([kv.k[:rows] for kv in self.cache], [kv.k for kv in cache])
        torch._foreach_copy_([kv.v[:rows] for kv in self.cache], [kv.v for kv in cache])
        times = self.cache[0].timestamps
        if times is not None and cache[0].timestamps is not None:
            times[:rows].copy_(cache[0].timestamps)


class HistoryBuffers:
    """Caches of all channels in buffers of one `Shape`."""

    def __init__(self, transducers: Transducers, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.channels: dict[str, tuple[Stretch, ...]] = {}
        for (name, transducer), rows, longest in zip(transducers.items(), shape.rows, shape.longest, strict=True):
            config, encoder = transducer.config, transducer.encoder
            kept = shape.contextual + config.truncate_to
            late = min(rows, shape.users * kept), min(longest, kept)
            stretches = [(encoder.first_layers, (rows, longest)), (encoder.last_layers, late)]
            self.channels[name] = tuple(
                _stretch(layers, *size, shape, dtype, device) for layers, size in stretches if layers
            )

    def load(self, caches: Mapping[str, KVCache]) -> None:
        """Histories of at most ``shape``; what earlier ones leave behind them does not count."""
        for name, stretches in self.channels.items():
            done = 0
            for stretch in stretches:
                stretch.load(caches[name][done : done + len(stretch.layers)])
                done += len(stretch.layers)


def _stretch(
    layers: Sequence[HSTULayer], rows: int, longest: int, shape: Shape, dtype: torch.dtype, device: torch.device
) -> Stretch:
    config = layers[0].config

    def room(width: int) -> Tensor:
        return torch.zeros(len(layers), rows, config.num_heads, width, dtype=dtype, device=device)

    offsets = torch.zeros(shape.users + 1, dtype=torch.int64, device=device)
    layout = JaggedLayout(offsets, max_seq_len=longest, contextual_seq_len=shape.contextual)
    times = torch.zeros(rows, dtype=torch.int64, device=device) if config.time_bias else None
    keys, values = room(config.attention_dim), room(config.linear_dim)
    cache = tuple(LayerKV(k, v, layout, times) for k, v in zip(keys, values, strict=True))
    return Stretch(tuple(layers), cache)


def power_of_two(number: int, least: int) -> int:
    """The power of two, at least ``least`` (one, too), that is no smaller."""
    return max(least, 1 << max(number - 1, 0).bit_length())


def row_capacity(rows: int, most: int) -> int:
    """Candidates of a recorded micro-batch for ``rows`` of them: four sizes for each power of two, 64 at least."""
    step = max(64, power_of_two(rows, 64) // 8)
    return min(most, -(-rows // step) * step)
