"""The encoder on padded rows ``[B, W, D]``, with static geometry, for graphs that ``torch.export`` takes."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hstu_kernels import Backend
from hstu_kernels.bias import bucket_boundaries
from hstu_plugin.config import HSTUConfig, RowTime
from hstu_plugin.layer import HSTULayer
from hstu_plugin.ranker import HSTURanker
from hstu_plugin.retrieval import HSTURetrieval
from hstu_plugin.ultra.mixture import Transducer


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """What is known of the rows of ``[contextual | history, padded | targets]``.

    Attributes:
        index: ``[B or 1, W]`` int64 places inside the sequences, targets behind the histories.
        ends: ``[B]`` int64 rows before the first target, the ``contextual`` first ones among them.
        real: ``[B, W]`` bool; rows that are not hold anything.
        times, asked_at: ``[B, W]`` int64 seconds of the rows as keys, and from which they measure.
        contextual, targets: numbers of leading and of trailing rows of that kind, of every user.
    """

    index: Tensor
    ends: Tensor
    real: Tensor
    times: Tensor
    asked_at: Tensor
    contextual: int = 0
    targets: int = 0


class PaddedEncoder(nn.Module):
    """Embedding and encoder of a core model on padded rows; shares its weights. Memory is ``[B, H, W, W]`` a layer.

    Args:
        core: the trained model, or a channel of a mixture, on its device; taken in its evaluation mode.
    """

    boundaries: Tensor

    def __init__(self, core: HSTURetrieval | HSTURanker | Transducer) -> None:
        super().__init__()
        self.embedding = core.embedding
        self.layers = nn.ModuleList(_in_pytorch(layer) for layer in core.encoder.first_layers)
        self.last_layers = nn.ModuleList(_in_pytorch(layer) for layer in core.encoder.last_layers)
        self.config: HSTUConfig = core.config
        buckets = core.config.num_time_buckets if core.config.time_bias else 0
        weight = core.encoder.first_layers[0].uvqk.weight
        # Graphs cannot hold tensors of two devices: the thresholds lie where the weights lie, and move with the scorer.
        self.register_buffer("boundaries", bucket_boundaries(buckets, weight.device), persistent=False)

    def forward(self, x: Tensor, rows: PaddedRows) -> tuple[Tensor, Tensor]:
        """Encode token vectors ``x [B, W, D]``.

        Returns:
            ``[B, W', D]`` rows, as many as came in without truncation; targets are the last ones. ``[B]``: the rows
            of each user before its first target.
        """
        x = x * self.config.embedding_dim**0.5
        if self.embedding.positions is not None:
            x = x + self.embedding.positions(_positions(rows).clamp(max=self.config.max_seq_len))
        x = self._stack(self.layers, x, rows)
        if self.config.truncates:
            x, rows = self._truncate(x, rows)
            x = self._stack(self.last_layers, x, rows)
        return x, rows.ends

    def row_times(self, times: Tensor, lengths: Tensor, last: Tensor) -> Tensor:
        """``[B, N]``: when rows of right-padded histories ask; ``last [B]`` is the time of the last real one."""
        if self.config.row_time is not RowTime.REQUEST:
            return times
        following = torch.cat([times[:, 1:], times[:, -1:]], dim=1)
        is_last = torch.arange(times.shape[1], device=times.device)[None, :] == lengths[:, None] - 1
        return torch.where(is_last, last[:, None], following)

    def _truncate(self, x: Tensor, rows: PaddedRows) -> tuple[Tensor, PaddedRows]:
        """As `JaggedSequence.keep_recent`: contextual rows, the latest ``truncate_to`` others, and the targets."""
        first, width = rows.contextual, x.shape[1] - rows.targets
        kept = min(first + self.config.truncate_to, width)
        slots = torch.arange(kept, device=x.device)[None, :]
        moved = (rows.ends - (kept - first)).clamp(min=first)[:, None] - first
        behind = torch.arange(width, x.shape[1], device=x.device)[None, :].expand(x.shape[0], -1)
        taken = torch.cat([torch.where(slots < first, slots, slots + moved), behind], dim=1)
        ends = rows.ends.clamp(max=kept)
        targets = torch.arange(rows.targets, device=x.device)[None, :]
        index = torch.cat([slots.expand(x.shape[0], -1), ends[:, None] + targets], dim=1)
        real, times, asked_at = (part.gather(1, taken) for part in (rows.real, rows.times, rows.asked_at))
        x = x.gather(1, taken[..., None].expand(-1, -1, x.shape[2]))
        return x, replace(rows, index=index, ends=ends, real=real, times=times, asked_at=asked_at)

    def _stack(self, layers: nn.ModuleList, x: Tensor, rows: PaddedRows) -> Tensor:
        index, positions = rows.index, _positions(rows)
        visible = self.config.mask.visible(
            index[:, :, None], index[:, None, :], rows.ends[:, None, None], rows.contextual
        )
        visible = (visible & rows.real[:, :, None] & rows.real[:, None, :])[:, None]
        since = (rows.asked_at[:, :, None] - rows.times[:, None, :]).abs()
        buckets = torch.bucketize(since, self.boundaries, right=True)
        reach = self.config.max_seq_len - 1
        apart = (positions[:, None, :] - positions[:, :, None]).clamp(-reach, reach) + reach
        for layer in layers:
            assert isinstance(layer, HSTULayer)
            x = self._layer(layer, x, visible, buckets, apart)
        return x

    def _layer(self, layer: HSTULayer, x: Tensor, visible: Tensor, buckets: Tensor, apart: Tensor) -> Tensor:
        batch, width = x.shape[0], x.shape[1]
        u, v, q, k = layer._project(x.flatten(0, 1))
        v, q, k = (part.reshape(batch, width, *part.shape[1:]) for part in (v, q, k))
        logits = self.config.alpha * torch.einsum("bihd,bjhd->bhij", q, k)
        if layer.pos_table is not None:
            logits = logits + layer.pos_table[apart][:, None]
        if layer.time_table is not None:
            logits = logits + layer.time_table[buckets][:, None]
        weights = torch.where(visible, F.silu(logits) * self.config.attn_scale, 0.0)
        attended = torch.einsum("bhij,bjhd->bihd", weights, v)
        return layer._gate(x.flatten(0, 1), u, attended.flatten(0, 1)).reshape(x.shape)


def _positions(rows: PaddedRows) -> Tensor:
    """Targets all stand where the history ends; without any, one row serves all users."""
    return torch.minimum(rows.index, rows.ends[:, None]) if rows.targets else rows.index


def _in_pytorch(layer: HSTULayer) -> HSTULayer:
    """The same weights without our kernels, which an exported graph could not take along."""
    twin = copy(layer)
    twin.config = replace(layer.config, backend=Backend.EAGER, recompute=())
    return twin
