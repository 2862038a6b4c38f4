"""JaggedLayout: offsets, positions, targets, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_kernels import JaggedLayout


def lengths_of(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_offsets_and_lengths_by_hand() -> None:
    layout = JaggedLayout.from_lengths(lengths_of(3, 0, 2), num_targets=lengths_of(1, 0, 2))
    assert layout.seq_offsets.tolist() == [0, 3, 3, 5]
    assert layout.batch_size == 3
    assert layout.max_seq_len == 3
    assert layout.seq_lengths.tolist() == [3, 0, 2]
    assert layout.history_lengths.tolist() == [2, 0, 0]


def test_rows_by_hand() -> None:
    layout = JaggedLayout.from_lengths(lengths_of(4, 0, 3), num_targets=lengths_of(2, 0, 3))
    assert layout.sequence_ids(7).tolist() == [0, 0, 0, 0, 2, 2, 2]
    assert layout.row_indices(7).tolist() == [0, 1, 2, 3, 0, 1, 2]
    # All targets stand at the history end: 2 in the first sequence, 0 in the last.
    assert layout.positions(7).tolist() == [0, 1, 2, 2, 0, 0, 0]


def test_positions_without_targets_are_row_indices() -> None:
    layout = JaggedLayout.from_lengths(lengths_of(2, 3))
    assert layout.positions(5).tolist() == [0, 1, 0, 1, 2]


def test_without_targets_keeps_context_and_bound() -> None:
    layout = JaggedLayout.from_lengths(
        lengths_of(5, 0, 4), num_targets=lengths_of(2, 0, 1), contextual_seq_len=1, max_seq_len=17
    )
    history = layout.without_targets()
    assert history.seq_offsets.tolist() == [0, 3, 3, 6]
    assert history.num_targets is None
    assert history.contextual_seq_len == 1
    assert history.max_seq_len == 17


def test_without_targets_of_a_layout_without_any_is_itself() -> None:
    layout = JaggedLayout.from_lengths(lengths_of(5, 1))
    assert layout.without_targets() is layout


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
def test_from_lengths_takes_any_integer_dtype(dtype: torch.dtype) -> None:
    layout = JaggedLayout.from_lengths(torch.tensor([2, 1], dtype=dtype))
    assert layout.seq_offsets.dtype == torch.int64
    assert layout.seq_offsets.tolist() == [0, 2, 3]


def test_empty_batch() -> None:
    layout = JaggedLayout.from_lengths(lengths_of())
    assert layout.batch_size == 0
    assert layout.max_seq_len == 0
    assert layout.row_indices(0).tolist() == []
    assert layout.sequence_ids(0).tolist() == []
    layout.check_rows("q", 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6))
def test_rows_match_loops(parts: list[tuple[int, int]]) -> None:
    lengths = lengths_of(*(history + targets for history, targets in parts))
    layout = JaggedLayout.from_lengths(lengths, num_targets=lengths_of(*(targets for _, targets in parts)))
    ids, indices, positions = [], [], []
    for sequence, (history, targets) in enumerate(parts):
        ids += [sequence] * (history + targets)
        indices += list(range(history + targets))
        positions += [*range(history), *[history] * targets]
    total = len(ids)
    layout.check_rows("q", total)
    assert layout.sequence_ids(total).tolist() == ids
    assert layout.row_indices(total).tolist() == indices
    assert layout.positions(total).tolist() == positions


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("seq_offsets", lambda: JaggedLayout(torch.tensor([0, 1], dtype=torch.int32), 1)),
        ("seq_offsets", lambda: JaggedLayout(torch.tensor([[0, 1]]), 1)),
        ("seq_offsets", lambda: JaggedLayout(torch.tensor([], dtype=torch.int64), 1)),
        ("num_targets", lambda: JaggedLayout(torch.tensor([0, 1]), 1, torch.tensor([1.0]))),
        ("num_targets", lambda: JaggedLayout(torch.tensor([0, 1]), 1, torch.tensor([1, 0]))),
        ("max_seq_len", lambda: JaggedLayout(torch.tensor([0, 1]), -1)),
        ("contextual_seq_len", lambda: JaggedLayout(torch.tensor([0, 1]), 1, None, -1)),
    ],
    ids=["int32-offsets", "2d-offsets", "no-offsets", "float-targets", "two-targets-for-one", "bound", "context"],
)
def test_construction_refuses(name: str, make: object) -> None:
    with pytest.raises(ValueError, match=name):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "layout", "rows"),
    [
        ("seq_offsets", JaggedLayout(torch.tensor([1, 3]), 3), 3),
        ("seq_offsets", JaggedLayout(torch.tensor([0, 3, 2, 4]), 3), 4),
        ("keys", JaggedLayout(torch.tensor([0, 3]), 3), 4),
        ("keys", JaggedLayout(torch.tensor([0]), 3), 1),
        ("max_seq_len", JaggedLayout(torch.tensor([0, 3]), 2), 3),
        ("num_targets", JaggedLayout(torch.tensor([0, 3]), 3, torch.tensor([-1])), 3),
        ("num_targets", JaggedLayout(torch.tensor([0, 3]), 3, torch.tensor([4])), 3),
        ("num_targets", JaggedLayout(torch.tensor([0, 0, 5]), 5, torch.tensor([2, 1])), 5),
        ("contextual_seq_len", JaggedLayout(torch.tensor([0, 3, 4]), 3, None, 2), 4),
        ("contextual_seq_len", JaggedLayout(torch.tensor([0, 3]), 3, torch.tensor([2]), 2), 3),
    ],
    ids=[
        "not-from-zero",
        "decreasing",
        "more-rows",
        "rows-for-an-empty-batch",
        "bound-too-small",
        "negative-targets",
        "more-targets-than-rows",
        "targets-in-an-empty-sequence",
        "short-of-context",
        "targets-leave-too-little-context",
    ],
)
def test_check_rows_refuses(name: str, layout: JaggedLayout, rows: int) -> None:
    with pytest.raises(ValueError, match=name):
        layout.check_rows("keys", rows)


def test_check_rows_allows_empty_sequences_without_context() -> None:
    JaggedLayout.from_lengths(lengths_of(0, 3, 0), contextual_seq_len=2).check_rows("q", 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.complex64], ids=str)
def test_lengths_that_are_no_integers(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"^seq_lengths: expected integers, got {dtype}"):
        JaggedLayout.from_lengths(lengths_of(1, 1).to(dtype))
