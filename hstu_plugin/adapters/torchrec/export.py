"""The dense scoring paths with static geometry, for ``torch.export`` and AOTInductor.

Jagged geometry is data; an exported graph wants shapes. Servers of compiled graphs therefore pad to ``[B, N]``, and
lengths say what is real. Looked-up vectors come in, so that the tables may stay on another machine.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hstu_plugin.adapters.torchrec.padded import PaddedEncoder, PaddedRows
from hstu_plugin.losses import normalise
from hstu_plugin.ranker import HSTURanker
from hstu_plugin.retrieval import HSTURetrieval
from hstu_plugin.ultra.mixture import MixtureRanker


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
        x, ends = self.padded(history, PaddedRows(places, lengths, places < lengths[:, None], times, asked_at))
        last = (ends - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[2])
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
        asked = candidates.shape[1]
        shown = _candidate_rows(self.padded, self.contextual, history, lengths, candidates, times, candidate_times)
        if context is not None:
            shown = torch.cat([shown, context[:, None].expand(-1, asked, -1)], dim=2)
        scores: Tensor = self.core.head(shown)
        return scores


class PaddedMixtureScorer(nn.Module):
    """Scores of a `MixtureRanker` for padded candidates behind each channel's right-padded histories.

    Shares its weights. Equal to the jagged model to rounding. Channels stand in the order of the model's config.

    Args:
        core: the trained model; taken in its evaluation mode.
        contextual: leading contextual rows of every channel's history.
    """

    def __init__(self, core: MixtureRanker, *, contextual: int = 0) -> None:
        super().__init__()
        if contextual < 0:
            raise ValueError(f"contextual: expected a number of rows >= 0, got {contextual}")
        self.core, self.contextual = core.eval(), contextual
        self.config = next(iter(core.config.channels.values()))
        self.padded = nn.ModuleList(PaddedEncoder(one) for one in core.mixture.transducers().values())

    def forward(
        self, histories: Tensor, lengths: Tensor, candidates: Tensor, times: Tensor, candidate_times: Tensor
    ) -> Tensor:
        """``[B, M, num_tasks]`` as `PaddedRankingScorer`.

        Args:
            histories: ``[B, C, N, D]`` token vectors of the ``C`` channels.
            lengths: ``[B, C]`` int64 in ``[contextual, N]``.
            candidates: ``[B, M, D]`` token vectors, the same for all channels.
            times: ``[B, C, N]`` int64 seconds, 0 for contextual rows.
            candidate_times: ``[B, M]`` int64 seconds at which each candidate is asked for.
        """
        shown = [
            _candidate_rows(
                padded, self.contextual, histories[:, c], lengths[:, c], candidates, times[:, c], candidate_times
            )
            for c, padded in enumerate(self.padded)
        ]
        scores: Tensor = self.core.head(torch.cat(shown, dim=2))
        return scores


def _candidate_rows(
    padded: nn.Module,
    contextual: int,
    history: Tensor,
    lengths: Tensor,
    candidates: Tensor,
    times: Tensor,
    candidate_times: Tensor,
) -> Tensor:
    """``[B, M, D]``: the encoded candidates of one transducer."""
    assert isinstance(padded, PaddedEncoder)
    asked = candidates.shape[1]
    places = torch.arange(history.shape[1], device=history.device)[None, :].expand(history.shape[0], -1)
    behind = lengths[:, None] + torch.arange(asked, device=history.device)
    # History never depends on targets: its last row measures from its own time.
    own = times.gather(1, (lengths - 1).clamp(min=0)[:, None]).squeeze(1)
    rows = PaddedRows(
        index=torch.cat([places, behind], dim=1),
        ends=lengths,
        real=torch.cat([places < lengths[:, None], torch.ones_like(behind, dtype=torch.bool)], dim=1),
        times=torch.cat([times, candidate_times], dim=1),
        asked_at=torch.cat([padded.row_times(times, lengths, own), candidate_times], dim=1),
        contextual=contextual,
        targets=asked,
    )
    encoded: Tensor = padded(torch.cat([history, candidates], dim=1), rows)[0]
    return encoded[:, encoded.shape[1] - asked :]


Scorer = PaddedRetrievalScorer | PaddedRankingScorer | PaddedMixtureScorer


def export_scorer(scorer: Scorer, *, history_len: int, num_candidates: int) -> torch.export.ExportedProgram:
    """The graph of ``scorer`` for any batch size, with fixed history and candidate widths.

    Save it with ``torch.export.save``, or compile it with `compile_scorer`.
    """
    dim, batch = scorer.config.embedding_dim, 2
    weight = next(scorer.core.parameters())
    device, dtype = weight.device, weight.dtype
    channels = (len(scorer.padded),) if isinstance(scorer, PaddedMixtureScorer) else ()
    asked = (batch,) if isinstance(scorer, PaddedRetrievalScorer) else (batch, num_candidates)
    example: tuple[Tensor, ...] = (
        torch.zeros(batch, *channels, history_len, dim, device=device, dtype=dtype),
        torch.full((batch, *channels), history_len, dtype=torch.int64, device=device),
        torch.zeros(batch, num_candidates, dim, device=device, dtype=dtype),
        torch.zeros(batch, *channels, history_len, dtype=torch.int64, device=device),
        torch.zeros(asked, dtype=torch.int64, device=device),
    )
    if isinstance(scorer, PaddedRankingScorer) and scorer.core.context_width:
        example += (torch.zeros(batch, scorer.core.context_width, device=device, dtype=dtype),)
    users = torch.export.Dim("users", min=1)
    return torch.export.export(scorer, example, dynamic_shapes=tuple({0: users} for _ in example))
