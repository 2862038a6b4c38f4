"""The dense scoring paths with static geometry, for ``torch.export`` and AOTInductor.

Jagged geometry is data; an exported graph wants shapes. Servers of compiled graphs therefore pad to ``[B, N]``, and
lengths say what is real. Looked-up vectors come in, so that the tables may stay on another machine.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hstu_kernels import Backend
from hstu_kernels.bias import bucket_boundaries
from hstu_plugin.config import HSTUConfig, RowTime
from hstu_plugin.layer import HSTULayer
from hstu_plugin.losses import normalise
from hstu_plugin.ranker import HSTURanker
from hstu_plugin.retrieval import HSTURetrieval


class PaddedEncoder(nn.Module):
    """Embedding and encoder of a core model on padded rows; shares its weights. Memory is ``[B, H, W, W]`` a layer.

    Args:
        core: the trained model, on its device; taken in its evaluation mode.

    Raises:
        ValueError: the model truncates, so that its later layers see fewer rows: one width cannot hold both.
    """

    boundaries: Tensor

    def __init__(self, core: HSTURetrieval | HSTURanker) -> None:
        super().__init__()
        if core.config.truncates:
            raise ValueError(
                f"truncate_after_layers: expected 0 for padded scoring, got {core.config.truncate_after_layers}; score "
                "with the jagged model (torch.compile takes it), or with MFalconRanker and its cache"
            )
        self.embedding = core.embedding
        self.layers = nn.ModuleList(_in_pytorch(layer) for layer in core.encoder.first_layers)
        self.config: HSTUConfig = core.config
        buckets = core.config.num_time_buckets if core.config.time_bias else 0
        device = core.encoder.layers[0].uvqk.weight.device  # type: ignore[union-attr]
        assert isinstance(device, torch.device)
        # Graphs cannot hold tensors of two devices: the thresholds lie where the weights lie, and move with the scorer.
        self.register_buffer("boundaries", bucket_boundaries(buckets, device), persistent=False)

    def forward(
        self, x: Tensor, index: Tensor, ends: Tensor, real: Tensor, times: Tensor, asked_at: Tensor, contextual: int
    ) -> Tensor:
        """Rows ``[B, W, D]``; those that are not real hold anything.

        Args:
            x: ``[B, W, D]`` token vectors. real: ``[B, W]`` bool.
            index: ``[B or 1, W]`` int64 places inside the sequences, targets behind the histories.
            ends: ``[B]`` int64 rows before the first target, the ``contextual`` first ones among them.
            times, asked_at: ``[B, W]`` int64 seconds of the rows as keys, and from which they measure.
        """
        ends = ends[:, None]
        positions = index if index.shape[0] == 1 else torch.minimum(index, ends)
        x = x * self.config.embedding_dim**0.5
        if self.embedding.positions is not None:
            x = x + self.embedding.positions(positions.clamp(max=self.config.max_seq_len))
        visible = self.config.mask.visible(index[:, :, None], index[:, None, :], ends[:, :, None], contextual)
        visible = (visible & real[:, :, None] & real[:, None, :])[:, None]
        buckets = torch.bucketize((asked_at[:, :, None] - times[:, None, :]).abs(), self.boundaries, right=True)
        reach = self.config.max_seq_len - 1
        apart = (positions[:, None, :] - positions[:, :, None]).clamp(-reach, reach) + reach
        for layer in self.layers:
            assert isinstance(layer, HSTULayer)
            x = self._layer(layer, x, visible, buckets, apart)
        return x

    def row_times(self, times: Tensor, lengths: Tensor, last: Tensor) -> Tensor:
        """``[B, N]``: when rows of right-padded histories ask; ``last [B]`` is the time of the last real one."""
        if self.config.row_time is not RowTime.REQUEST:
            return times
        following = torch.cat([times[:, 1:], times[:, -1:]], dim=1)
        is_last = torch.arange(times.shape[1], device=times.device)[None, :] == lengths[:, None] - 1
        return torch.where(is_last, last[:, None], following)

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


def _in_pytorch(layer: HSTULayer) -> HSTULayer:
    """The same weights without our kernels, which an exported graph could not take along."""
    twin = copy(layer)
    twin.config = replace(layer.config, backend=Backend.EAGER, recompute=())
    return twin


class PaddedRetrievalScorer(nn.Module):
    """User vectors and candidate scores of an `HSTURetrieval` on right-padded histories; shares its weights.

    Equal to the jagged model to rounding.

    Args:
        core: the trained model; taken in its evaluation mode.
    """

    def __init__(self, core: HSTURetrieval) -> None:
        super().__init__()
        self.core = core.eval()
        self.config = core.config
        self.padded = PaddedEncoder(core)

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
        places = torch.arange(history.shape[1], device=history.device)[None, :]
        asked_at = self.padded.row_times(times, lengths, request_times)
        x = self.padded(history, places, lengths, places < lengths[:, None], times, asked_at, 0)
        last = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[2])
        users = x.gather(1, last).squeeze(1) * (lengths > 0)[:, None]
        similarity = self.core.retrieval.similarity
        users, items = normalise(users, similarity), normalise(candidates, similarity)
        return torch.einsum("bd,bmd->bm", users, items) / self.core.retrieval.temperature


class PaddedRankingScorer(nn.Module):
    """Scores of an `HSTURanker` for padded candidates behind right-padded histories; shares its weights.

    Equal to the jagged model to rounding. Tokens come in, as `RankingHead.tokens` makes them.

    Args:
        core: the trained model; taken in its evaluation mode.
        contextual: leading contextual rows of every history.
    """

    def __init__(self, core: HSTURanker, *, contextual: int = 0) -> None:
        super().__init__()
        if contextual < 0:
            raise ValueError(f"contextual: expected a number of rows >= 0, got {contextual}")
        self.core = core.eval()
        self.config, self.contextual = core.config, contextual
        self.padded = PaddedEncoder(core)

    def forward(
        self,
        history: Tensor,
        lengths: Tensor,
        candidates: Tensor,
        times: Tensor,
        candidate_times: Tensor,
        context: Tensor | None = None,
    ) -> Tensor:
        """``[B, M, num_tasks]``: logits of binary tasks, values of regressions; rows of padding hold anything.

        Args:
            history: ``[B, N, D]`` token vectors ``[contextual | events]``, the first ``lengths[b]`` rows are real.
            lengths: ``[B]`` int64 in ``[contextual, N]``.
            candidates: ``[B, M, D]`` token vectors.
            times: ``[B, N]`` int64 seconds, 0 for contextual rows; read by models with a time bias only.
            candidate_times: ``[B, M]`` int64 seconds at which each candidate is asked for.
            context: ``[B, context_width]``, where the model's head reads one (`RankingHead.context`).

        Raises:
            ValueError: the context is missing, or the model has none.
        """
        if (self.core.context_width > 0) != (context is not None):
            wanted = f"[B, {self.core.context_width}]" if self.core.context_width else "None, as the model has none"
            raise ValueError(f"context: expected {wanted}, got {None if context is None else tuple(context.shape)}")
        width, asked = history.shape[1], candidates.shape[1]
        places = torch.arange(width, device=history.device)[None, :].expand(history.shape[0], -1)
        behind = lengths[:, None] + torch.arange(asked, device=history.device)
        real = torch.cat([places < lengths[:, None], torch.ones_like(behind, dtype=torch.bool)], dim=1)
        # History never depends on targets: its last row measures from its own time.
        own = times.gather(1, (lengths - 1).clamp(min=0)[:, None]).squeeze(1)
        rows: Tensor = self.padded(
            torch.cat([history, candidates], dim=1),
            torch.cat([places, behind], dim=1),
            lengths,
            real,
            torch.cat([times, candidate_times], dim=1),
            torch.cat([self.padded.row_times(times, lengths, own), candidate_times], dim=1),
            self.contextual,
        )
        shown = rows[:, width:]
        if context is not None:
            shown = torch.cat([shown, context[:, None].expand(-1, asked, -1)], dim=2)
        scores: Tensor = self.core.head(shown)
        return scores


def export_scorer(
    scorer: PaddedRetrievalScorer | PaddedRankingScorer, *, history_len: int, num_candidates: int
) -> torch.export.ExportedProgram:
    """The graph of ``scorer`` for any batch size, with fixed history and candidate widths.

    Save it with ``torch.export.save``, or compile it with ``torch._inductor.aoti_compile_and_package``.
    """
    dim, batch = scorer.config.embedding_dim, 2
    weight = scorer.core.encoder.layers[0].uvqk.weight  # type: ignore[union-attr]
    assert isinstance(weight, Tensor)
    device = weight.device
    asked = (batch, num_candidates) if isinstance(scorer, PaddedRankingScorer) else (batch,)
    example: tuple[Tensor, ...] = (
        torch.zeros(batch, history_len, dim, device=device, dtype=weight.dtype),
        torch.full((batch,), history_len, dtype=torch.int64, device=device),
        torch.zeros(batch, num_candidates, dim, device=device, dtype=weight.dtype),
        torch.zeros(batch, history_len, dtype=torch.int64, device=device),
        torch.zeros(asked, dtype=torch.int64, device=device),
    )
    if isinstance(scorer, PaddedRankingScorer) and scorer.core.context_width:
        example += (torch.zeros(batch, scorer.core.context_width, device=device, dtype=weight.dtype),)
    users = torch.export.Dim("users", min=1)
    return torch.export.export(scorer, example, dynamic_shapes=tuple({0: users} for _ in example))
