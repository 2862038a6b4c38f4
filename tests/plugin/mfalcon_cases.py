"""Rankers of every kind and batches for them, shared by the tests of cached scoring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hstu_kernels import AttentionMask, JaggedLayout
from hstu_plugin.config import HSTUConfig
from hstu_plugin.ranker import HSTURanker
from hstu_plugin.ranking_config import RankingConfig, TaskConfig
from hstu_plugin.ranking_embedding import with_targets
from hstu_plugin.sequence import JaggedSequence
from hstu_plugin.ultra.mixture import MixtureConfig, MixtureRanker

WIDTH, CONTEXT = 8, 2
RANKING = RankingConfig(tasks=(TaskConfig(name="click"), TaskConfig(name="share")), head_dims=(6,))
Ranker = HSTURanker | MixtureRanker
Histories = JaggedSequence | Mapping[str, JaggedSequence]

WINDOW = AttentionMask(max_attn_len=3)
TAIL = AttentionMask(max_attn_len=3, full_attn_tail_len=4)
TRUNCATION = {"truncate_after_layers": 1, "truncate_to": 5}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-time": {"time_bias": False},
    "event-time": {"row_time": "event"},
    "no-bias": {"time_bias": False, "position_bias": False, "position_embedding": False},
    "production": {"variant": "production"},
    "ultra": {"variant": "ultra", "mask": TAIL},
    "window": {"mask": WINDOW},
    "semi-local-prefix": {"mask": AttentionMask(max_attn_len=3, global_prefix_len=2)},
    "semi-local-tail": {"mask": TAIL},
    "window-targets": {"mask": AttentionMask(max_attn_len=3, full_attn_tail_len=2, window_targets=True)},
    "truncated": TRUNCATION,
    "truncated-event-time": {**TRUNCATION, "row_time": "event"},
    "truncated-window": {**TRUNCATION, "mask": WINDOW},
    "truncated-semi-local-tail": {**TRUNCATION, "mask": TAIL},
    "truncated-semi-local-prefix": {**TRUNCATION, "mask": AttentionMask(max_attn_len=3, global_prefix_len=2)},
    "truncated-twice": {"num_layers": 4, "truncate_after_layers": 2, "truncate_to": 3, "mask": TAIL},
}
CHANNELS = {"watch": "truncated-semi-local-tail", "buy": "window"}
MIXTURE = "mixture"


def make_config(kind: str, **options: Any) -> HSTUConfig:
    config = {"embedding_dim": WIDTH, "num_heads": 2, "num_layers": 3, "max_seq_len": 24, "dropout": 0.2}
    return HSTUConfig(**{**config, **KINDS[kind], **options})


def make_ranker(kind: str, **options: Any) -> Ranker:
    """In double precision and evaluation mode, with weights of unit scale."""
    torch.manual_seed(0)
    if kind == MIXTURE:
        channels = {name: make_config(channel, **options) for name, channel in CHANNELS.items()}
        return ready(MixtureRanker(MixtureConfig(channels=channels), RANKING))
    return ready(HSTURanker(make_config(kind, **options), RANKING))


def ready(module: Any) -> Any:
    assert isinstance(module, nn.Module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.6)
    return module.double().eval()


def make_sequence(lengths: Sequence[int], *, contextual: int = 0, begin: int = 0, seed: int = 0) -> JaggedSequence:
    """Token vectors, seconds to days apart, the first one ``begin`` days after some day."""
    total = sum(lengths)
    generator = torch.Generator().manual_seed(seed)
    layout = JaggedLayout.from_lengths(torch.tensor(lengths, dtype=torch.int64), contextual_seq_len=contextual)
    gaps = torch.exp(torch.rand(total, generator=generator, dtype=torch.float64) * 12).long()
    times = 1_600_000_000 + 86_400 * begin + gaps.cumsum(0)
    return JaggedSequence(torch.randn(total, WIDTH, dtype=torch.float64, generator=generator), layout, times)


def rows_of(seq: JaggedSequence, first: Sequence[int], last: Sequence[int], *, contextual: int = 0) -> JaggedSequence:
    """Rows ``[first, last)`` of each user."""
    index = seq.layout.row_indices(seq.values.shape[0])
    repeats = seq.layout.seq_lengths
    kept = (index >= torch.tensor(first).repeat_interleave(repeats)) & (
        index < torch.tensor(last).repeat_interleave(repeats)
    )
    lengths = torch.tensor([b - a for a, b in zip(first, last, strict=True)])
    layout = JaggedLayout.from_lengths(lengths, contextual_seq_len=contextual)
    return JaggedSequence(seq.values[kept], layout, None if seq.timestamps is None else seq.timestamps[kept])


def each(histories: Histories, change: Callable[[JaggedSequence], JaggedSequence]) -> Histories:
    """``change`` of the one sequence, or of every channel's."""
    if isinstance(histories, JaggedSequence):
        return change(histories)
    return {name: change(seq) for name, seq in histories.items()}


def make_histories(kind: str, lengths: Sequence[int], *, contextual: int = CONTEXT) -> Histories:
    """For a mixture, channels of different lengths around the same contextual rows."""
    one = make_sequence(lengths, contextual=contextual)
    if kind != MIXTURE:
        return one
    shorter = [contextual + (n - contextual) // 2 if n else 0 for n in lengths]
    other = make_sequence(shorter, contextual=contextual, seed=7)
    return {"watch": one, "buy": other}


def full_scores(ranker: Ranker, histories: Histories, candidates: JaggedSequence) -> Tensor:
    """One forward pass over histories and candidates."""
    with torch.no_grad():
        if isinstance(histories, JaggedSequence):
            assert isinstance(ranker, HSTURanker)
            scores: Tensor = ranker(with_targets(histories, candidates))
        else:
            scores = ranker(histories, candidates)
    return scores


def same(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-10, atol=1e-10)
