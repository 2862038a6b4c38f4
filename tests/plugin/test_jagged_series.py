"""Jagged series joined, merged by time and compressed, against loops over users."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from hstu_kernels import JaggedLayout
from hstu_plugin.jagged_series import compress_runs, concatenate, keep_rows, merge_by_time
from hstu_plugin.sequence import JaggedSequence


def make(lengths: list[int], *, seed: int, first: int = 0) -> JaggedSequence:
    """Values are numbers from ``first``; times rise with many ties."""
    draw = random.Random(seed)
    times = [t for n in lengths for t in sorted(draw.randrange(6) for _ in range(n))]
    layout = JaggedLayout.from_lengths(torch.tensor(lengths))
    values = torch.arange(first, first + sum(lengths))
    return JaggedSequence(values, layout, torch.tensor(times, dtype=torch.int64))


def per_user(seq: JaggedSequence) -> list[list[tuple[int, int]]]:
    assert seq.timestamps is not None
    rows = list(zip(seq.values.tolist(), seq.timestamps.tolist(), strict=True))
    offsets = seq.layout.seq_offsets.tolist()
    return [rows[a:b] for a, b in itertools.pairwise(offsets)]


@pytest.mark.parametrize("seed", range(5))
def test_merging_equals_a_stable_sort_of_each_user(seed: int) -> None:
    parts = [
        make([3, 0, 5, 2], seed=seed),
        make([4, 1, 0, 7], seed=seed + 9, first=100),
        make([0, 0, 2, 1], seed=1, first=200),
    ]
    merged, places = merge_by_time(parts)
    users = zip(*map(per_user, parts), strict=True)
    expected = [sorted((row for own in rows for row in own), key=lambda row: row[1]) for rows in users]
    assert per_user(merged) == expected
    assert all(torch.equal(merged.values[place], part.values) for part, place in zip(parts, places, strict=True))


def test_concatenating_puts_part_behind_part() -> None:
    parts = [make([2, 0, 1], seed=0), make([1, 2, 0], seed=1, first=100)]
    joined, places = concatenate(parts)
    assert joined.values.tolist() == [0, 1, 100, 101, 102, 2]
    assert [p.tolist() for p in places] == [[0, 1, 5], [2, 3, 4]]
    assert joined.layout.seq_lengths.tolist() == [3, 2, 1]
    untimed, _ = concatenate([JaggedSequence(p.values, p.layout) for p in parts])
    assert untimed.timestamps is None and torch.equal(untimed.values, joined.values)


def test_compression_keeps_the_first_of_each_run_of_each_user() -> None:
    layout = JaggedLayout.from_lengths(torch.tensor([5, 0, 3, 1]))
    values = torch.tensor([4, 4, 2, 2, 4, 4, 4, 1, 1])
    kept = compress_runs(values, layout)
    assert kept.tolist() == [True, False, True, False, True, True, False, True, True]
    short = keep_rows(JaggedSequence(values, layout, torch.arange(9)), kept)
    assert short.values.tolist() == [4, 2, 4, 4, 1, 1]
    assert short.layout.seq_lengths.tolist() == [3, 0, 2, 1]
    assert short.timestamps is not None and short.timestamps.tolist() == [0, 2, 4, 5, 7, 8]


def test_one_user_with_one_event_and_no_users_at_all() -> None:
    one = JaggedSequence(torch.tensor([3]), JaggedLayout.from_lengths(torch.tensor([1])), torch.tensor([0]))
    assert compress_runs(one.values, one.layout).tolist() == [True]
    none = make([], seed=0)
    assert merge_by_time([none, none])[0].values.numel() == 0


def test_what_does_not_fit_is_named() -> None:
    a, b = make([1, 2], seed=0), make([1], seed=0)
    with pytest.raises(ValueError, match=r"parts\[1\]: expected 2 users"):
        concatenate([a, b])
    with pytest.raises(ValueError, match=r"parts\[1\]: expected timestamps to merge by"):
        merge_by_time([a, JaggedSequence(a.values, a.layout)])
    with pytest.raises(ValueError, match="timestamps in all parts or in none"):
        concatenate([a, JaggedSequence(a.values, a.layout)])
    with pytest.raises(ValueError, match="expected at least one"):
        concatenate([])
    context = JaggedSequence(
        a.values, JaggedLayout.from_lengths(torch.tensor([1, 2]), contextual_seq_len=1), a.timestamps
    )
    with pytest.raises(ValueError, match=r"parts\[0\]: expected rows without contextual rows"):
        concatenate([context])
    with pytest.raises(ValueError, match=r"kept: expected \[3\] bool"):
        keep_rows(a, torch.ones(3))
    with pytest.raises(ValueError, match=r"values: expected \[L\]"):
        compress_runs(torch.zeros(3, 2), a.layout)
