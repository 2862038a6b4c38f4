"""Ranking as sequential transduction: candidates behind a history, scored for several tasks at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hstu_kernels import JaggedLayout
from hstu_plugin.config import HSTUConfig
from hstu_plugin.embedding import SequenceEmbedding
from hstu_plugin.encoder import HSTUEncoder, KVCache
from hstu_plugin.ranking_config import RankingConfig, TaskKind
from hstu_plugin.sequence import JaggedSequence


class MultiTaskHead(nn.Module):
    """``[R, D]`` rows to ``[R, num_tasks]``: norm, hidden layers shared by the tasks, one output for each."""

    def __init__(self, width: int, ranking: RankingConfig) -> None:
        super().__init__()
        self.ranking = ranking
        blocks: list[nn.Module] = [nn.LayerNorm(width)]
        for hidden in ranking.head_dims:
            blocks += [nn.Linear(width, hidden), nn.SiLU(), nn.Dropout(ranking.head_dropout)]
            width = hidden
        self.hidden = nn.Sequential(*blocks)
        self.output = nn.Linear(width, len(ranking.tasks))

    def forward(self, rows: Tensor) -> Tensor:
        """Logits of binary tasks and values of regressions, ``[R, num_tasks]``."""
        scores: Tensor = self.output(self.hidden(rows))
        return scores

    def predictions(self, scores: Tensor) -> Tensor:
        """`forward`'s result with probabilities in place of logits; any leading shape."""
        binary = [task.kind is TaskKind.BINARY for task in self.ranking.tasks]
        return torch.where(torch.tensor(binary, device=scores.device), scores.sigmoid(), scores)

    def start_from(self, means: Tensor) -> None:
        """Let an untrained head predict ``means [num_tasks]``: the labels' means, shares for binary tasks."""
        if means.shape != (len(self.ranking.tasks),):
            raise ValueError(f"means: expected [{len(self.ranking.tasks)}], got {tuple(means.shape)}")
        binary = torch.tensor([task.kind is TaskKind.BINARY for task in self.ranking.tasks])
        means = means.detach().cpu().double()
        with torch.no_grad():
            # A share of 0 or 1 would start at an infinite logit.
            self.output.bias.copy_(torch.where(binary, means.clamp(1e-6, 1 - 1e-6).logit(), means))


class HSTURanker(nn.Module):
    """Encoder and multi-task head over token vectors; `hstu_plugin.ranking_embedding` makes the tokens.

    Every candidate is scored as if it stood alone behind the history, so scores do not depend on the other candidates
    of a call. `forward` over ``[contextual | history | targets]`` equals `prefill` of the history and `decode` of any
    part of the targets. Holds no state of a request.

    With ``context_width > 0`` the head reads a vector about the user beside the encoded candidate, such as the user's
    features (``context [B, context_width]`` of `forward`, `score_rows` and `decode`), which otherwise reach a candidate
    through attention alone.
    """

    def __init__(self, config: HSTUConfig, ranking: RankingConfig, context_width: int = 0) -> None:
        super().__init__()
        self.context_width = context_width
        self.config = config
        self.ranking = ranking
        self.embedding = SequenceEmbedding(config)
        self.encoder = HSTUEncoder(config)
        self.head = MultiTaskHead(config.embedding_dim + context_width, ranking)

    def forward(self, seq: JaggedSequence, context: Tensor | None = None) -> Tensor:
        """Scores ``[total_targets, num_tasks]``: logits of binary tasks, values of regressions.

        Args:
            seq: ``[contextual | history | targets]`` token vectors ``[L, D]``, ``layout.num_targets`` given; timestamps
                (a target's is its request time) where the config has a time bias.
            context: ``[B, context_width]``, where the ranker has one.

        Raises:
            ValueError: the layout has no targets, or the context does not fit.
        """
        if seq.layout.num_targets is None:
            raise ValueError("seq: expected a layout with num_targets, got one without; add candidates first")
        rows: JaggedSequence = self.encoder(self.embedding(seq))
        targets = rows.targets()
        return self._scores(targets.values, context, targets.layout)

    def score_rows(self, seq: JaggedSequence, rows: Tensor, context: Tensor | None = None) -> Tensor:
        """Scores at history rows: generative training over interleaved tokens (HSTU, section 2.2).

        Args:
            seq: ``[contextual | history]`` token vectors ``[L, D]``.
            rows: ``[R]`` int64, the item rows whose actions are to be predicted.
            context: as in `forward`.

        Returns:
            ``[R, num_tasks]``.

        Raises:
            ValueError: the mask would show a row the action it has to predict, or the encoder drops history rows.
        """
        if self.config.mask.contextual_sees_history and seq.layout.contextual_seq_len > 0:
            raise ValueError(
                "mask.contextual_sees_history: expected False for training inside the history, got True; contextual "
                "rows see the whole history and every row sees them, so that from the second layer on a row knows the "
                "action it has to predict. Train on candidates behind the history instead (forward)"
            )
        encoded: JaggedSequence = self.encoder(self.embedding(seq))
        if encoded.values.shape[0] != seq.values.shape[0]:
            raise ValueError(
                f"seq: the encoder keeps {encoded.values.shape[0]} of {seq.values.shape[0]} rows (attention "
                "truncation), so history rows cannot be scored; train on candidates behind the history instead"
            )
        chosen = encoded.values[rows]
        if self.context_width == 0 and context is None:
            return self._scores(chosen, None, None)
        return self._scores(chosen, context, None, seq.layout.sequence_ids(seq.values.shape[0])[rows])

    def prefill(self, history: JaggedSequence) -> KVCache:
        """Keys and values of ``[contextual | history]`` token vectors, for any number of `decode` calls."""
        return self.encoder.prefill(self.embedding(history))[1]

    def decode(self, targets: JaggedSequence, cache: KVCache, context: Tensor | None = None) -> Tensor:
        """Scores ``[T, num_tasks]`` of candidates against cached histories; equals `forward` over both.

        Args:
            targets: token vectors ``[T, D]``, one sequence of candidates, empty or not, for each user of the cache, in
                the same order; request times as timestamps where the config has a time bias.
            cache: from `prefill`.
            context: as in `forward`.
        """
        return self._scores(self.encoder.decode(self.place(targets, cache), cache).values, context, targets.layout)

    def place(self, targets: JaggedSequence, cache: KVCache) -> JaggedSequence:
        """The encoder's input for candidates: every one stands at its own history's end."""
        ends = cache[0].layout.seq_lengths
        if ends.numel() != targets.layout.batch_size:
            raise ValueError(f"cache: expected {targets.layout.batch_size} sequences as targets, got {ends.numel()}")
        places = torch.repeat_interleave(ends, targets.layout.seq_lengths, output_size=targets.values.shape[0])
        placed: JaggedSequence = self.embedding(targets, places)
        return placed

    def _scores(
        self, rows: Tensor, context: Tensor | None, layout: JaggedLayout | None, users: Tensor | None = None
    ) -> Tensor:
        if (self.context_width > 0) != (context is not None):
            expected = f"[B, {self.context_width}]" if self.context_width else "None, as the ranker has none"
            raise ValueError(f"context: expected {expected}, got {None if context is None else tuple(context.shape)}")
        if context is not None:
            if users is None:
                assert layout is not None
                users = layout.sequence_ids(rows.shape[0])
            rows = torch.cat([rows, context[users]], 1)
        scores: Tensor = self.head(rows)
        return scores
