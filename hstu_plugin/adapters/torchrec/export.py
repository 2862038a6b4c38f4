"""The dense scoring path with static geometry, for ``torch.export`` and AOTInductor.

Jagged geometry is data; an exported graph wants shapes. Servers of compiled graphs therefore pad to ``[B, N]``, and
lengths say what is real. Looked-up vectors come in, so that the tables may stay on another machine.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hstu_kernels.bias import bucket_boundaries
from hstu_plugin.config import RowTime
from hstu_plugin.layer import HSTULayer
from hstu_plugin.losses import normalise
from hstu_plugin.retrieval import HSTURetrieval


class PaddedRetrievalScorer(nn.Module):
    """User vectors and candidate scores of an `HSTURetrieval` on right-padded histories; shares its weights.

    Equal to the jagged model to rounding. Memory is ``[B, H, N, N]`` per layer.

    Args:
        core: the trained model; taken in its evaluation mode.
    """

    boundaries: Tensor

    def __init__(self, core: HSTURetrieval) -> None:
        super().__init__()
        self.core = core.eval()
        self.config = core.config
        buckets = core.config.num_time_buckets if core.config.time_bias else 0
        self.register_buffer("boundaries", bucket_boundaries(buckets), persistent=False)

    def forward(
        self, history: Tensor, lengths: Tensor, candidates: Tensor, times: Tensor, request_times: Tensor
    ) -> Tensor:
        """Scores ``[B, M]``.

        Args:
            history: ``[B, N, D]`` looked-up vectors, the first ``lengths[b]`` rows of ``b`` are real.
            lengths: ``[B]`` int64 in ``[0, N]``.
            candidates: ``[B, M, D]`` looked-up vectors.
            times: ``[B, N]`` int64 seconds; read by models with a time bias only.
            request_times: ``[B]`` int64 seconds at which the scores are asked for.
        """
        width = history.shape[1]
        places = torch.arange(width, device=history.device)
        x = history * self.config.embedding_dim**0.5
        if self.core.embedding.positions is not None:
            x = x + self.core.embedding.positions(places.clamp(max=self.config.max_seq_len))
        visible = self.config.mask.visible(places[None, :, None], places[None, None, :], lengths[:, None, None], 0)
        real = places[None, :] < lengths[:, None]
        visible = (visible & real[:, :, None] & real[:, None, :])[:, None]
        buckets = self._buckets(times, request_times, lengths, places)
        for layer in self.core.encoder.layers:
            assert isinstance(layer, HSTULayer)
            x = self._layer(layer, x, visible, buckets)
        last = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[2])
        users = x.gather(1, last).squeeze(1) * (lengths > 0)[:, None]
        similarity = self.core.retrieval.similarity
        users, items = normalise(users, similarity), normalise(candidates, similarity)
        return torch.einsum("bd,bmd->bm", users, items) / self.core.retrieval.temperature

    def _buckets(self, times: Tensor, request_times: Tensor, lengths: Tensor, places: Tensor) -> Tensor:
        """``[B, N, N]`` bucket of each row and key; the rows ask when the next event, or the request, comes."""
        following = times
        if self.config.row_time is RowTime.REQUEST:
            following = torch.cat([times[:, 1:], times[:, -1:]], dim=1)
            is_last = places[None, :] == lengths[:, None] - 1
            following = torch.where(is_last, request_times[:, None], following)
        apart = (following[:, :, None] - times[:, None, :]).abs()
        return torch.bucketize(apart, self.boundaries, right=True)

    def _layer(self, layer: HSTULayer, x: Tensor, visible: Tensor, buckets: Tensor) -> Tensor:
        batch, width = x.shape[0], x.shape[1]
        u, v, q, k = layer._project(x.flatten(0, 1))
        v, q, k = (part.reshape(batch, width, *part.shape[1:]) for part in (v, q, k))
        logits = self.config.alpha * torch.einsum("bihd,bjhd->bhij", q, k)
        if layer.pos_table is not None:
            places = torch.arange(width, device=x.device)
            reach = self.config.max_seq_len - 1
            apart = (places[None, :] - places[:, None]).clamp(-reach, reach) + reach
            logits = logits + layer.pos_table[apart]
        if layer.time_table is not None:
            logits = logits + layer.time_table[buckets][:, None]
        weights = torch.where(visible, F.silu(logits) * self.config.attn_scale, 0.0)
        attended = torch.einsum("bhij,bjhd->bihd", weights, v)
        return layer._gate(x.flatten(0, 1), u, attended.flatten(0, 1)).reshape(x.shape)


def export_scorer(
    scorer: PaddedRetrievalScorer, *, history_len: int, num_candidates: int
) -> torch.export.ExportedProgram:
    """The graph of ``scorer`` for any batch size, with fixed history and candidate widths.

    Save it with ``torch.export.save``, or compile it with ``torch._inductor.aoti_compile_and_package``.
    """
    dim, batch = scorer.config.embedding_dim, 2
    weight = scorer.core.encoder.layers[0].uvqk.weight  # type: ignore[union-attr]
    assert isinstance(weight, Tensor)
    example = (
        torch.zeros(batch, history_len, dim, device=weight.device, dtype=weight.dtype),
        torch.zeros(batch, dtype=torch.int64, device=weight.device),
        torch.zeros(batch, num_candidates, dim, device=weight.device, dtype=weight.dtype),
        torch.zeros(batch, history_len, dtype=torch.int64, device=weight.device),
        torch.zeros(batch, dtype=torch.int64, device=weight.device),
    )
    users = torch.export.Dim("users", min=1)
    return torch.export.export(scorer, example, dynamic_shapes=tuple({0: users} for _ in example))
