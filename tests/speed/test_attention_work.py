"""What the attention benchmark counts, and which batches it measures."""

from __future__ import annotations

import pytest
import torch

from benchmarks.attention.cases import CASES, GROUPS, Work, choose, jagged_lengths, tiny, visible_pairs
from hstu_kernels.testing import ATTENTION_CASES, AttentionCase


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_pairs_are_those_of_the_definition(case: AttentionCase) -> None:
    layout = case.layout()
    count = 0
    for length, history in zip(layout.seq_lengths.tolist(), layout.history_lengths.tolist(), strict=True):
        index = torch.arange(length)
        count += int(case.mask.visible(index[:, None], index[None, :], history, case.contextual_seq_len).sum())
    assert visible_pairs(layout, case.mask) == count


def test_causal_work_follows_the_convention_and_the_exact_count() -> None:
    case = next(case for case in CASES if case.name == "4x16384x4x128-full")
    work = Work.of(case, case.layout(torch.device("cpu")))
    assert work.pairs == 4 * 16384 * 16385 // 2
    assert work.convention == 2 * 4 * 16384**2 / 2 * 4 * 256
    assert work.exact == 2 * work.pairs * 4 * 256


def test_sparse_work_is_exact() -> None:
    case = next(case for case in CASES if case.name == "4x16384-tail")
    work = Work.of(case, case.layout(torch.device("cpu")))
    assert work.convention == work.exact < 4 * 16384 * 4 * 2 * 256 * (256 + 256 + 2)


def test_jagged_lengths_keep_the_mean_and_repeat() -> None:
    for count, longest, share in ((16, 4096, 0.65), (8, 16384, 0.53), (128, 512, 0.65), (32, 4096, 0.4)):
        lengths = jagged_lengths(count, longest, share)
        assert lengths == jagged_lengths(count, longest, share)
        assert len(set(lengths)) > 1
        assert max(lengths) <= longest
        assert min(lengths) >= 1
        assert abs(sum(lengths) / count / longest - share) < 0.03


def test_cases_have_names_of_their_own_and_every_group_has_some() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(choose((group,), None) for group in GROUPS)
    assert {case.group for case in choose(("biased", "targets"), None)} == {"biased", "targets"}
    assert [case.name for case in choose((), "4x65536-prefix")] == ["4x65536-prefix"]


def test_candidates_stand_behind_histories_of_1024_to_4096() -> None:
    case = choose(("targets",), None)[0]
    histories = [length - 1024 for length in case.lengths]
    assert len(histories) == 32
    assert min(histories) >= 1024
    assert max(histories) <= 4096


def test_tiny_cases_keep_the_structure() -> None:
    for case in CASES:
        small = tiny(case)
        assert small.total_rows < 150
        assert small.dense == case.dense
        assert (small.num_targets is None) == (case.num_targets is None)
        assert bool(small.mask.global_prefix_len) == bool(case.mask.global_prefix_len)
        small.layout(torch.device("cpu")).check_rows("tiny", small.total_rows)
