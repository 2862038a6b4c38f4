"""Scoring by CUDA graphs: all layers and the head of a micro-batch in one launch.

A graph is recorded once for a number of candidates, of users and of history rows, each rounded up, and replayed for
every micro-batch that fits. Lengths are read on the device, so that a replay serves any histories within its buffers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hstu_kernels import JaggedLayout
from hstu_kernels.attention.static import users_of_rows
from hstu_kernels.attention.triton.schedule import device_boundaries
from hstu_plugin.encoder import KVCache
from hstu_plugin.graph_buffers import HistoryBuffers, Shape, Transducers, row_capacity
from hstu_plugin.sequence import JaggedSequence

# The longest unused go first; a service sees far fewer sizes.
_MOST_SHAPES, _MOST_GRAPHS = 16, 64


class GraphScorer:
    """A ranker's layers and head over fixed buffers.

    Args:
        transducers: by channel. head: over their rows, side by side.
        micro_batch_size: candidates of one call, at most.
        capture: record CUDA graphs. Without, the same code runs step by step, on any device.
    """

    def __init__(self, transducers: Transducers, head: nn.Module, *, micro_batch_size: int, capture: bool) -> None:
        self._transducers, self._head = transducers, head
        self._most, self._capture = micro_batch_size, capture
        self._weight = next(head.parameters())
        self._buffers: OrderedDict[Shape, HistoryBuffers] = OrderedDict()
        self._steps: OrderedDict[tuple[Shape, int], _Step] = OrderedDict()
        # One pool for all graphs: they run one after another, and results are copied out.
        self._pool: Any = torch.cuda.graph_pool_handle() if capture else None

    @torch.no_grad()
    def score(
        self, caches: Mapping[str, KVCache], targets: JaggedSequence, counts: Sequence[int], *, loaded: bool = False
    ) -> Tensor:
        """Scores ``[T, num_tasks]`` of one micro-batch.

        Args:
            caches: of its users, by channel.
            targets: its candidates; the layout is not read.
            counts: candidates of each user.
            loaded: the call before had the same caches.
        """
        shape = Shape.of({name: caches[name] for name in self._transducers})
        dtype, device = self._weight.dtype, self._weight.device
        if shape not in self._buffers:
            self._buffers[shape] = HistoryBuffers(self._transducers, shape, dtype, device)
            loaded = False
        self._buffers.move_to_end(shape)
        buffers = self._buffers[shape]
        if not loaded:
            buffers.load(caches)
        key = (shape, row_capacity(targets.values.shape[0], self._most))
        if key not in self._steps:
            self._steps[key] = _Step(self._transducers, self._head, buffers, key[1], self._pool)
        self._steps.move_to_end(key)
        self._forget()
        return self._steps[key](targets, counts)

    def _forget(self) -> None:
        while len(self._buffers) > _MOST_SHAPES:
            shape, _ = self._buffers.popitem(last=False)
            for key in [key for key in self._steps if key[0] == shape]:
                del self._steps[key]
        while len(self._steps) > _MOST_GRAPHS:
            self._steps.popitem(last=False)


class _Step:
    """One micro-batch of ``capacity`` candidates against ``buffers``, recorded where there is a ``pool``."""

    def __init__(
        self,
        transducers: Transducers,
        head: nn.Module,
        buffers: HistoryBuffers,
        capacity: int,
        pool: Any,
    ) -> None:
        self._transducers, self._head, self._buffers = transducers, head, buffers
        weight = next(head.parameters())
        width = next(iter(transducers.values())).config.embedding_dim
        self._rows = torch.zeros(capacity, width, dtype=weight.dtype, device=weight.device)
        self._asked_at = torch.zeros(capacity, dtype=torch.int64, device=weight.device)
        offsets = torch.zeros(buffers.shape.users + 1, dtype=torch.int64, device=weight.device)
        self._layout = JaggedLayout(offsets, max_seq_len=capacity)
        # Held: a graph knows their addresses alone, and the cache that has them may let go.
        self._held = [
            device_boundaries(t.config.num_time_buckets, weight.device)
            for t in transducers.values()
            if t.config.time_bias
        ]
        self._graph: torch.cuda.CUDAGraph | None = None
        if pool is not None:
            self._record(pool)

    def __call__(self, targets: JaggedSequence, counts: Sequence[int]) -> Tensor:
        rows = targets.values.shape[0]
        offsets = [0]
        for count in counts:
            offsets.append(offsets[-1] + count)
        offsets += [rows] * (self._layout.seq_offsets.numel() - len(offsets))
        self._layout.seq_offsets.copy_(torch.tensor(offsets), non_blocking=True)
        self._rows[:rows].copy_(targets.values)
        if targets.timestamps is not None:
            self._asked_at[:rows].copy_(targets.timestamps)
        if self._graph is None:
            return self._forward()[:rows]
        self._graph.replay()
        return self._out[:rows].clone()

    def _forward(self) -> Tensor:
        places = torch.arange(self._rows.shape[0], device=self._rows.device)
        users = users_of_rows(self._layout, places).clamp(max=self._layout.batch_size - 1)
        rows = []
        for name, transducer in self._transducers.items():
            stretches = self._buffers.channels[name]
            ends = stretches[0].layout.seq_lengths[users]
            x = transducer.embedding(JaggedSequence(self._rows, self._layout), ends).values
            for stretch in stretches:
                for layer, kv in zip(stretch.layers, stretch.cache, strict=True):
                    x = layer.decode_static(x, self._layout, self._asked_at, kv)
            rows.append(x)
        scores: Tensor = self._head(torch.cat(rows, dim=-1) if len(rows) > 1 else rows[0])
        return scores

    def _record(self, pool: Any) -> None:
        side = torch.cuda.Stream(self._rows.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._rows.device))
        with torch.cuda.stream(side):
            # Libraries allocate their workspaces in the first runs, which a graph may not hold.
            for _ in range(2):
                self._forward()
        torch.cuda.current_stream(self._rows.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on allocating and copying meanwhile, such as those that fetch the next requests.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._out = self._forward()
        self._graph = graph
