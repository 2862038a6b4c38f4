"""RelativeBias: buckets against 60-digit arithmetic, tables against loops, the time at which a row asks by hand."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_kernels import JaggedLayout, RelativeBias, next_event_timestamps
from hstu_kernels.bias import bucket_boundaries, position_index, time_buckets

from .loops import exact_bucket

LARGEST_CHECKED = 10**12  # 31,000 years in seconds


def buckets_of(seconds: list[int], num_buckets: int) -> list[int]:
    keys = torch.tensor(seconds, dtype=torch.int64)
    return time_buckets(torch.zeros(1, dtype=torch.int64), keys, bucket_boundaries(num_buckets)).tolist()


@pytest.mark.parametrize("num_buckets", [1, 2, 5, 90, 128, 200])
def test_buckets_on_both_sides_of_every_boundary(num_buckets: int) -> None:
    seconds = {0, 1, 2, 3}
    for bucket in range(1, num_buckets + 2):
        edge = int((Decimal("0.301") * bucket).exp())
        seconds |= {edge + shift for shift in (-2, -1, 0, 1, 2) if 0 <= edge + shift <= LARGEST_CHECKED}
    chosen = sorted(seconds)
    assert buckets_of(chosen, num_buckets) == [exact_bucket(x, num_buckets) for x in chosen]


def test_all_small_differences() -> None:
    seconds = list(range(3000))
    assert buckets_of(seconds, 128) == [exact_bucket(x, 128) for x in seconds]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, LARGEST_CHECKED), st.integers(0, 160))
def test_buckets_equal_the_formula(seconds: int, num_buckets: int) -> None:
    assert buckets_of([seconds], num_buckets) == [exact_bucket(seconds, num_buckets)]


def test_known_buckets() -> None:
    minute, hour, day, year = 60, 3600, 86400, 31536000
    assert buckets_of([0, 1, 2, minute, hour, day, year], 128) == [0, 0, 2, 13, 27, 37, 57]


@pytest.mark.parametrize("num_buckets", [0, 1, 3])
def test_far_differences_take_the_last_bucket(num_buckets: int) -> None:
    assert buckets_of([10**9, 2**62], num_buckets) == [num_buckets, num_buckets]


def test_boundaries_are_sorted_and_fit_int64() -> None:
    bounds = bucket_boundaries(300)
    assert bounds.dtype == torch.int64
    assert bounds.shape == (300,)
    assert bool((bounds[1:] >= bounds[:-1]).all())
    assert bool((bounds > 0).all())


def test_boundaries_beyond_all_time_are_near_the_formula() -> None:
    for bucket, bound in enumerate(bucket_boundaries(145).tolist(), start=1):
        edge = (Decimal("0.301") * bucket).exp()
        assert abs(Decimal(bound) - edge) <= 1 + edge * Decimal("1e-12"), bucket


def test_buckets_ignore_the_sign() -> None:
    bounds = bucket_boundaries(128)
    now, keys = torch.tensor([1_700_000_000]), torch.tensor([1_700_000_000 - 77, 1_700_000_000 + 77])
    assert time_buckets(now, keys, bounds).tolist() == [exact_bucket(77, 128)] * 2


def test_buckets_keep_single_seconds_of_large_timestamps() -> None:
    """In float32 these times would be 128 s apart or equal."""
    bounds = bucket_boundaries(128)
    now = torch.tensor([1_700_000_003])
    keys = now - torch.tensor([1, 2, 3, 4])
    assert time_buckets(now, keys, bounds).tolist() == [exact_bucket(x, 128) for x in (1, 2, 3, 4)] == [0, 2, 3, 4]


@pytest.mark.parametrize("reach", [1, 4, 50])
@pytest.mark.parametrize("num_buckets", [0, 2, 128])
def test_dense_equals_loops(reach: int, num_buckets: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pos = torch.randn(2 * reach - 1, generator=generator, dtype=torch.float64)
    time = torch.randn(num_buckets + 1, generator=generator, dtype=torch.float64)
    row_positions, key_positions = torch.tensor([0, 3, 7]), torch.tensor([0, 1, 6, 7, 12])
    row_times = 1_600_000_000 + torch.tensor([5, 10_000, 777_777])
    key_times = 1_600_000_000 + torch.tensor([5, 4, 9_000, 800_000, 10**8])
    got = RelativeBias(pos, time, key_times).dense(row_positions, key_positions, row_times, key_times)
    assert got.shape == (3, 5)
    for i in range(3):
        for j in range(5):
            distance = int(key_positions[j] - row_positions[i])
            distance = max(1 - reach, min(reach - 1, distance))
            bucket = exact_bucket(abs(int(row_times[i] - key_times[j])), num_buckets)
            assert float(got[i, j]) == float(pos[distance + reach - 1] + time[bucket]), (i, j)


def test_dense_with_one_table_or_none() -> None:
    places = torch.arange(3)
    times = torch.tensor([0, 10, 100])
    pos, time = torch.arange(5.0), torch.arange(20.0)
    by_place = RelativeBias(pos).dense(places, places, None, None)
    assert by_place.tolist() == [[2, 3, 4], [1, 2, 3], [0, 1, 2]]
    by_time = RelativeBias(None, time, times).dense(places, places, times, times)
    assert by_time.tolist() == [[float(exact_bucket(abs(a - b), 19)) for b in (0, 10, 100)] for a in (0, 10, 100)]
    assert RelativeBias().dense(places, places, None, None).tolist() == [[0.0] * 3] * 3


def test_position_index_clamps_at_both_ends() -> None:
    table = torch.zeros(5)
    rows, keys = torch.tensor([[0], [9]]), torch.tensor([[0, 1, 2, 9]])
    assert position_index(rows, keys, table).tolist() == [[2, 3, 4, 4], [0, 0, 0, 2]]


def test_rows_ask_at_the_next_event() -> None:
    layout = JaggedLayout.from_lengths(torch.tensor([4, 0, 1, 2]))
    times = torch.tensor([10, 20, 30, 40, 7, 50, 60])
    assert next_event_timestamps(times, layout).tolist() == [20, 30, 40, 40, 7, 60, 60]


def test_targets_ask_at_their_own_time_and_history_does_not_see_it() -> None:
    layout = JaggedLayout.from_lengths(torch.tensor([5, 3]), num_targets=torch.tensor([2, 3]))
    times = torch.tensor([10, 20, 30, 99, 98, 71, 72, 73])
    assert next_event_timestamps(times, layout).tolist() == [20, 30, 30, 99, 98, 71, 72, 73]


def test_contextual_rows_ask_like_history_rows() -> None:
    layout = JaggedLayout.from_lengths(
        torch.tensor([4, 0, 2]), num_targets=torch.tensor([1, 0, 0]), contextual_seq_len=2
    )
    times = torch.tensor([10, 10, 15, 90, 3, 3])
    assert next_event_timestamps(times, layout).tolist() == [10, 15, 15, 90, 3, 3]


def test_next_event_of_nothing() -> None:
    layout = JaggedLayout.from_lengths(torch.tensor([0, 0]))
    assert next_event_timestamps(torch.tensor([], dtype=torch.int64), layout).tolist() == []


TABLE, TIMES = torch.zeros(5), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pos_table", {"pos_table": torch.zeros(4)}),
        ("pos_table", {"pos_table": torch.zeros(3, 3)}),
        ("time_table", {"time_table": torch.zeros(2, 2), "timestamps": TIMES}),
        ("time_table", {"time_table": torch.zeros(0), "timestamps": TIMES}),
        ("timestamps", {"time_table": TABLE}),
        ("timestamps", {"time_table": TABLE, "timestamps": TIMES.float()}),
        ("timestamps", {"time_table": TABLE, "timestamps": TIMES.int()}),
        ("timestamps", {"time_table": TABLE, "timestamps": TIMES[None]}),
        ("row_timestamps", {"time_table": TABLE, "timestamps": TIMES, "row_timestamps": TIMES.double()}),
    ],
    ids=[
        "even-positions",
        "2d-positions",
        "2d-times",
        "no-buckets",
        "no-timestamps",
        "float-timestamps",
        "int32-timestamps",
        "2d-timestamps",
        "float-row-timestamps",
    ],
)
def test_construction_refuses(name: str, arguments: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected|^{name}: needed"):
        RelativeBias(**arguments)


def test_num_buckets() -> None:
    assert RelativeBias(None, torch.zeros(129), TIMES).num_buckets == 128
    assert RelativeBias(torch.zeros(3)).num_buckets == 0
