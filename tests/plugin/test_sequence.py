"""JaggedSequence: doors in, cuts, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_kernels import JaggedLayout
from hstu_plugin.sequence import JaggedSequence


def example() -> JaggedSequence:
    """Two users and an empty one: [c c h h h t t], [], [c c h t]."""
    layout = JaggedLayout.from_lengths(
        torch.tensor([7, 0, 4]), num_targets=torch.tensor([2, 0, 1]), contextual_seq_len=2, max_seq_len=9
    )
    return JaggedSequence(torch.arange(11.0)[:, None].repeat(1, 2), layout, 1_700_000_000 + torch.arange(11))


def rows_of(seq: JaggedSequence) -> list[int]:
    """Which rows of `example` are left; values and times must agree."""
    rows = seq.values[:, 0].long()
    assert seq.timestamps is not None
    assert torch.equal(seq.timestamps - 1_700_000_000, rows)
    seq.layout.check_rows("values", rows.numel())
    return rows.tolist()


def test_history() -> None:
    history = example().history()
    assert rows_of(history) == [0, 1, 2, 3, 4, 7, 8, 9]
    assert history.layout.seq_lengths.tolist() == [5, 0, 3]
    assert history.layout.num_targets is None
    assert history.layout.contextual_seq_len == 2


def test_targets() -> None:
    targets = example().targets()
    assert rows_of(targets) == [5, 6, 10]
    assert targets.layout.seq_lengths.tolist() == [2, 0, 1]
    assert targets.layout.num_targets is None
    assert targets.layout.contextual_seq_len == 0


def test_a_sequence_without_targets() -> None:
    history = example().history()
    assert history.history() is history
    assert rows_of(history.targets()) == []
    assert history.targets().layout.seq_lengths.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("most", "rows", "lengths"),
    [
        (0, [0, 1, 5, 6, 7, 8, 10], [4, 0, 3]),
        (1, [0, 1, 4, 5, 6, 7, 8, 9, 10], [5, 0, 4]),
        (2, [0, 1, 3, 4, 5, 6, 7, 8, 9, 10], [6, 0, 4]),
        (3, list(range(11)), [7, 0, 4]),
        (99, list(range(11)), [7, 0, 4]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_keep_recent(most: int, rows: list[int], lengths: list[int]) -> None:
    kept = example().keep_recent(most)
    assert rows_of(kept) == rows
    assert kept.layout.seq_lengths.tolist() == lengths
    assert kept.layout.num_targets is not None
    assert kept.layout.num_targets.tolist() == [2, 0, 1]
    assert kept.layout.contextual_seq_len == 2


def test_last_history_rows() -> None:
    rows = example().last_history_rows()
    assert rows[[0, 2]].tolist() == [4, 9]


def test_with_values_keeps_the_rest() -> None:
    seq = example()
    other = seq.with_values(torch.zeros(11, 5))
    assert other.layout is seq.layout
    assert other.timestamps is seq.timestamps
    assert other.values.shape == (11, 5)


def test_from_padded_by_hand() -> None:
    ids = torch.tensor([[5, 6, 0], [0, 0, 0], [7, 8, 9]])
    times = torch.tensor([[50, 60, 0], [0, 0, 0], [70, 80, 90]])
    seq = JaggedSequence.from_padded(ids, torch.tensor([2, 0, 3]), times)
    assert seq.values.tolist() == [5, 6, 7, 8, 9]
    assert seq.layout.seq_offsets.tolist() == [0, 2, 2, 5]
    assert seq.layout.max_seq_len == 3
    assert seq.timestamps is not None
    assert seq.timestamps.tolist() == [50, 60, 70, 80, 90]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 6).flatmap(lambda width: st.lists(st.integers(0, width), max_size=5).map(lambda x: (width, x))))
def test_from_padded_matches_loops(arguments: tuple[int, list[int]]) -> None:
    width, lengths = arguments
    values = torch.arange(len(lengths) * width * 2).view(len(lengths), width, 2)
    seq = JaggedSequence.from_padded(values, torch.tensor(lengths, dtype=torch.int32))
    expected = [values[b, n].tolist() for b, length in enumerate(lengths) for n in range(length)]
    assert seq.values.tolist() == expected
    assert seq.layout.seq_lengths.tolist() == lengths


def test_gradients_flow_through_every_cut() -> None:
    seq = example()
    values = seq.values.clone().requires_grad_()
    cut = seq.with_values(values).keep_recent(1)
    (cut.history().values.sum() + 10 * cut.targets().values.sum()).backward()
    assert values.grad is not None
    assert values.grad[:, 0].tolist() == [1, 1, 0, 0, 1, 10, 10, 1, 1, 1, 10]


VALUES, LENGTHS = torch.zeros(2, 3, 4), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("seq_lengths", (VALUES, torch.tensor([1, 2, 3]))),
        ("seq_lengths", (VALUES, torch.tensor([[1, 2]]))),
        ("seq_lengths", (torch.zeros(2), LENGTHS)),
        ("seq_lengths", (VALUES, torch.tensor([1, 4]))),
        ("seq_lengths", (VALUES, torch.tensor([-1, 2]))),
        ("timestamps", (VALUES, LENGTHS, torch.zeros(2, 4, dtype=torch.int64))),
        ("timestamps", (VALUES, LENGTHS, torch.zeros(3, 3, dtype=torch.int64))),
    ],
    ids=["other-batch", "2d", "1d-values", "too-long", "negative", "times-of-other-width", "times-of-other-batch"],
)
def test_from_padded_refuses(name: str, arguments: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        JaggedSequence.from_padded(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32], ids=str)
def test_timestamps_are_int64(dtype: torch.dtype) -> None:
    layout = JaggedLayout.from_lengths(torch.tensor([3]))
    with pytest.raises(TypeError, match=r"^timestamps: expected int64"):
        JaggedSequence(torch.zeros(3, 2), layout, torch.zeros(3, dtype=dtype))
    with pytest.raises(TypeError, match=r"^timestamps: expected int64"):
        JaggedSequence.from_padded(VALUES, LENGTHS, torch.zeros(2, 3, dtype=dtype))


def test_timestamps_of_other_rows_are_refused() -> None:
    layout = JaggedLayout.from_lengths(torch.tensor([3]))
    with pytest.raises(ValueError, match=r"^timestamps: expected one for each of 3"):
        JaggedSequence(torch.zeros(3, 2), layout, torch.zeros(4, dtype=torch.int64))


def test_negative_truncation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^max_history: expected"):
        example().keep_recent(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_padded_lengths_that_are_no_integers(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"^seq_lengths: expected integers, got {dtype}"):
        JaggedSequence.from_padded(torch.zeros(2, 3, 4), torch.tensor([1, 0]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32], ids=str)
def test_padded_lengths_of_any_integer_dtype(dtype: torch.dtype) -> None:
    seq = JaggedSequence.from_padded(torch.arange(6).view(2, 3), torch.tensor([1, 3], dtype=dtype))
    assert seq.values.tolist() == [0, 3, 4, 5]
    assert seq.layout.seq_lengths.tolist() == [1, 3]
