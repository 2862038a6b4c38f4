"""What a warp's assembly adds up and looks up, run lane by lane without a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from hstu_kernels.attention.triton.assembly import add_by_bucket, add_by_threshold, add_diagonals, diagonal_look_up
from tests.ops.lanes import ORIGIN, Fault, Lanes, Warp, share

ROWS, WARPS = 64, 4
BASE = 300
COLUMNS = [16, 32, 64]


def random(*shape: int) -> Lanes:
    return np.random.default_rng(7).standard_normal(shape)


def distances(columns: int, step: int = 1) -> Lanes:
    return BASE + step * (np.arange(columns)[None, :] - np.arange(ROWS)[:, None])


def everywhere(value: int, columns: int) -> list[Lanes]:
    return [np.full(32, value)] * (columns // 2)


def strip(tile: Lanes, warp: int) -> Lanes:
    return tile[16 * warp : 16 * warp + 16]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("last", [BASE + 40, 1000])
def test_sums_of_diagonals(columns: int, last: int) -> None:
    grad, index, sums = random(ROWS, columns), distances(columns), np.zeros(1001)
    for warp in range(WARPS):
        arguments = share(grad, warp), share(index, warp), everywhere(ORIGIN, columns), everywhere(last, columns)
        Warp(sums, warp).run(add_diagonals(columns // 2), columns // 8, *arguments)
    expected = np.zeros(1001)
    np.add.at(expected, np.minimum(index, last), grad)
    np.testing.assert_allclose(sums, expected, atol=1e-12)


def test_every_logit_reaches_its_diagonal() -> None:
    text = add_diagonals(32)
    for row, column in [(0, 0), (15, 0), (0, 63), (15, 63), (7, 8), (8, 7), (9, 31)]:
        grad, index, sums = np.zeros((ROWS, 64)), distances(64), np.zeros(1000)
        grad[row, column] = 1.0
        Warp(sums, 0).run(text, 8, share(grad, 0), share(index, 0), everywhere(ORIGIN, 64), everywhere(999, 64))
        assert sums.sum() == sums[BASE + column - row] == 1.0


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("step", [1, -1])
def test_entries_by_diagonal(columns: int, step: int) -> None:
    table, index = random(1000), distances(columns, step)
    elements = columns // 2
    for warp in range(WARPS):
        registers = Warp(table, warp).run(
            diagonal_look_up(elements, step), elements, share(index, warp), everywhere(ORIGIN, columns)
        )
        for element, expected in enumerate(share(table[index], warp)):
            np.testing.assert_array_equal(registers[f"${element}"], expected)


@pytest.mark.parametrize("last", [BASE - 20, BASE + 25, 999])
@pytest.mark.parametrize("base", [BASE, 10])
def test_entries_beyond_the_ends_of_a_table_are_its_last_ones(base: int, last: int) -> None:
    table, index = random(1000), distances(64) - BASE + base
    for warp in range(WARPS):
        arguments = share(index, warp), everywhere(ORIGIN, 64), everywhere(last, 64)
        registers = Warp(table, warp).run(diagonal_look_up(32, 1, bounded=True), 32, *arguments)
        for element, expected in enumerate(share(table[np.clip(index, 0, last)], warp)):
            np.testing.assert_array_equal(registers[f"${element}"], expected)


@pytest.mark.parametrize("change", ["turned", "columns apart", "rows apart"])
def test_other_places_of_elements_are_a_fault(change: str) -> None:
    """Were a compiler to lay a block out in another way, nothing may be added or read."""
    index = {
        "turned": BASE + np.arange(ROWS)[:, None] - np.arange(64)[None, :],
        "columns apart": BASE + 2 * np.arange(64)[None, :] - np.arange(ROWS)[:, None],
        "rows apart": BASE + np.arange(64)[None, :] - 2 * np.arange(ROWS)[:, None],
    }[change]
    memory, grad = np.zeros(1000), random(ROWS, 64)
    with pytest.raises(Fault):
        Warp(memory, 1).run(
            add_diagonals(32), 8, share(grad, 1), share(index, 1), everywhere(ORIGIN, 64), everywhere(999, 64)
        )
    assert not memory.any()
    if change != "rows apart":
        # Rows of other lanes do not matter to a look-up, which goes by each lane's own index.
        with pytest.raises(Fault):
            Warp(memory, 1).run(diagonal_look_up(32, 1), 32, share(index, 1), everywhere(ORIGIN, 64))
        bounded = diagonal_look_up(32, 1, bounded=True)
        with pytest.raises(Fault):
            Warp(memory, 1).run(bounded, 32, share(index, 1), everywhere(ORIGIN, 64), everywhere(999, 64))


@pytest.mark.parametrize("more", [0, 1, 3])
def test_sums_by_threshold(more: int) -> None:
    rng = np.random.default_rng(more)
    grad = random(ROWS, 64)
    row, key = rng.integers(0, 50, (ROWS, 1)) + 0 * rng.integers(0, 1, (1, 64)), rng.integers(0, 50, (1, 64))
    key = key + 0 * row
    bounds = sorted(rng.integers(-30, 30, more).tolist())
    sums, expected = np.zeros(WARPS * (more + 2)), np.zeros(WARPS * (more + 2))
    for warp in range(WARPS):
        compared = (share(row, warp), share(key, warp), *(everywhere(b, 64) for b in bounds)) if more else ()
        arguments = share(grad, warp), *compared, everywhere(ORIGIN, 64)
        Warp(sums, warp).run(add_by_threshold(32, more), 8, *arguments)
        kind = sum((strip(row - key, warp) >= bound).astype(int) for bound in bounds) + np.zeros((16, 64), int)
        for place in range(more + 1):
            expected[place * WARPS + warp] = strip(grad, warp)[kind == place].sum()
    np.testing.assert_allclose(sums, expected, atol=1e-12)


@pytest.mark.parametrize(("lowest", "highest"), [(0, 0), (5, 8), (3, 12), (0, 40), (17, 128)])
@pytest.mark.parametrize("columns", [32, 64])
def test_sums_by_bucket(columns: int, lowest: int, highest: int) -> None:
    rng = np.random.default_rng(highest)
    grad, bucket = random(ROWS, columns), rng.integers(lowest, highest + 1, (ROWS, columns))
    # One warp meets fewer buckets than the others.
    bucket[:16] = np.minimum(bucket[:16], lowest + 1)
    # Another only every fifth of them.
    bucket[16:32] -= (bucket[16:32] - lowest) % 5
    sums, expected = np.zeros((129, WARPS)), np.zeros((129, WARPS))
    for warp in range(WARPS):
        arguments = share(grad, warp), share(bucket, warp), everywhere(ORIGIN, columns)
        Warp(sums.reshape(-1), warp).run(add_by_bucket(columns // 2), columns // 8, *arguments)
        np.add.at(expected[:, warp], strip(bucket, warp), strip(grad, warp))
    np.testing.assert_allclose(sums, expected, atol=1e-12)


def test_diagonals_in_fixed_point() -> None:
    grad, index, sums = random(ROWS, 64), distances(64), np.zeros(1001, np.int64)
    factor = 2.0**40
    for warp in range(WARPS):
        arguments = share(grad, warp), share(index, warp), everywhere(ORIGIN, 64), everywhere(1000, 64)
        Warp(sums, warp).run(add_diagonals(32, exact=True), 8, *arguments, [np.full(32, factor)] * 32)
    expected = np.zeros(1001)
    np.add.at(expected, index, grad)
    np.testing.assert_allclose(sums / factor, expected, atol=1e-10)
