"""Counts of visible pairs against masks written out."""

from __future__ import annotations

import itertools

import pytest
import torch

from hstu_kernels import AttentionMask, JaggedLayout, visible_pairs
from hstu_kernels.testing import ATTENTION_CASES, AttentionCase


def counted(mask: AttentionMask, layout: JaggedLayout) -> list[int]:
    counts = []
    for length, end in zip(layout.seq_lengths.tolist(), layout.history_lengths.tolist(), strict=True):
        rows = torch.arange(length)
        counts.append(int(mask.visible(rows[:, None], rows[None, :], end, layout.contextual_seq_len).sum()))
    return counts


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_named_cases(case: AttentionCase) -> None:
    assert visible_pairs(case.mask, case.layout()).tolist() == counted(case.mask, case.layout())


MASKS = [
    AttentionMask(
        max_attn_len=w, global_prefix_len=g, full_attn_tail_len=t, window_targets=wt, contextual_sees_history=c
    )
    for w, g, t, wt, c in itertools.product((0, 1, 3, 50), (0, 2, 40), (0, 2, 40), (False, True), (False, True))
]


@pytest.mark.parametrize("contextual", [0, 1, 3])
def test_every_combination(contextual: int) -> None:
    pairs = [(0, 0)] + [(h, t) for h in (contextual, contextual + 1, 4, 7, 20) for t in (0, 1, 5) if h + t]
    layout = JaggedLayout.from_lengths(
        torch.tensor([h + t for h, t in pairs]),
        num_targets=torch.tensor([t for _, t in pairs]),
        contextual_seq_len=contextual,
    )
    for mask in MASKS:
        assert visible_pairs(mask, layout).tolist() == counted(mask, layout), mask
