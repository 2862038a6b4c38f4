"""The forward that is for Hopper alone, on such a GPU: fp64 budget, bits, neighbours, races."""

from __future__ import annotations

import functools
import itertools
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hstu_kernels import AttentionMask, JaggedLayout, hstu_attention
from hstu_kernels.attention.triton import TritonPlan
from hstu_kernels.testing import AttentionCase, BiasKind, assert_within_budget, make_inputs
from tests.ops import hopper_cases
from tests.ops.hopper_cases import (
    LENGTHS,
    NEIGHBOURS,
    count_launches,
    planned,
    random_lengths,
    random_rows,
    spoil_every_other,
)

pytestmark = hopper_cases.MARKS


@pytest.fixture(autouse=True)
def short_batches_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of any length take the kernel."""
    from hstu_kernels.attention.triton import hopper_launch as hopper

    tiles = {width: tuple(replace(tile, least=0) for tile in of_width) for width, of_width in hopper.TILES.items()}
    monkeypatch.setattr(hopper, "TILES", tiles)
    monkeypatch.setattr(hopper, "LEAST_TURNS", 0)


def ours(
    x: tuple[Tensor, ...], plan: TritonPlan, out: Tensor | None = None, programs: int | None = None, tile: int = 0
) -> Tensor:
    """By this kernel, with the tile of that index; a call that it does not take fails."""
    from hstu_kernels.attention.triton.hopper_launch import TILES, HopperForward

    q, k, v = x
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device) if out is None else out
    kernel = HopperForward(q, plan, TILES[128][tile], 128**-0.5, 0.01, programs)
    assert kernel.launch((q, k, v), out, direct=False)
    return out


def theirs(x: tuple[Tensor, ...], plan: TritonPlan) -> Tensor:
    """By the kernel that runs everywhere."""
    from hstu_kernels.attention.triton.launch import triton_forward
    from hstu_kernels.attention.triton.tiles import tile_set

    q, k, v = x
    tiles = tile_set(128, 128, q.dtype, biased=False)
    return triton_forward(q, k, v, None, None, plan, 128**-0.5, 0.01, tiles)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stays_in_the_budget_and_is_what_a_call_runs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from hstu_kernels.attention.triton.hopper_launch import HopperForward

    launches = count_launches(HopperForward, monkeypatch)
    case = AttentionCase(name="hopper", lengths=LENGTHS, bias=BiasKind.NONE, heads=2, qk_dim=128, v_dim=128)
    attention = functools.partial(hstu_attention, backend="triton")
    assert_within_budget(attention, make_inputs(case, dtype, device="cuda"), signal=False)
    assert launches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gives_the_bits_of_the_other_kernel(dtype: torch.dtype) -> None:
    """Were there one different bit, no kernel could be chosen by length."""
    rng = random.Random(str(dtype))
    for seed in range(8):
        lengths = random_lengths(rng)
        x, plan = random_rows(sum(lengths), 2, dtype, seed), planned(lengths)
        expected = theirs(x, plan)
        for tile, programs in itertools.product(range(3), (None, 1, 7, 10_000)):
            assert torch.equal(ours(x, plan, programs=programs, tile=tile), expected), (lengths, programs, tile)


def test_a_call_repeats_its_bits_whatever_ran_before() -> None:
    """Twenty rounds with other inputs between them: a slot that is read too early holds the others' rows."""
    plan, other = planned((3000, 77, 0, 1025, 512)), planned((4096, 4096))
    x = random_rows(4614, 2, torch.bfloat16, 0)
    y = random_rows(8192, 2, torch.bfloat16, 1)
    first, second = ours(x, plan), ours(y, other)
    assert torch.equal(first, theirs(x, plan))
    for turn in range(20):
        assert torch.equal(ours(x, plan, tile=turn % 3), first)
        assert torch.equal(ours(y, other, tile=turn % 3), second)
        scaled = (x[0], x[1], x[2] * 2)
        assert torch.equal(ours(scaled, plan), first * 2)


@pytest.mark.parametrize("tile", [0, 1, 2])
def test_no_number_of_a_neighbour_is_seen(tile: int) -> None:
    x, plan = random_rows(sum(NEIGHBOURS), 2, torch.bfloat16, 3), planned(NEIGHBOURS)
    clean = ours(x, plan, tile=tile)
    kept = spoil_every_other(x, NEIGHBOURS)
    got = ours(x, plan, tile=tile)
    for rows in kept:
        assert torch.equal(got[rows], clean[rows])


@pytest.mark.parametrize("tile", [0, 1, 2])
def test_rows_of_no_sequence_are_not_written(tile: int) -> None:
    lengths = (0, 100, 65, 0, 129)
    rows = sum(lengths)
    room = torch.full((rows + 300, 2, 128), 7.0, dtype=torch.bfloat16, device="cuda")
    ours(random_rows(rows, 2, torch.bfloat16, 4), planned(lengths), room[100 : 100 + rows], tile=tile)
    assert bool((room[:100] == 7).all() and (room[100 + rows :] == 7).all())


def test_a_neighbour_changes_no_bit() -> None:
    x = random_rows(9777, 2, torch.bfloat16, 5)
    alone = ours(tuple(t[:777] for t in x), planned((777,)))
    assert torch.equal(ours(x, planned((777, 9000)))[:777], alone)


def test_columns_of_one_matrix_and_other_rows_of_heads() -> None:
    """q, k and v as the layer leaves them: columns of one wide matrix."""
    plan, wide = planned((500, 3, 260)), random_rows(763, 6, torch.bfloat16, 6)[0]
    x = tuple(wide.unflatten(1, (3, 2)).unbind(1))
    assert torch.equal(ours(x, plan), ours(tuple(t.contiguous() for t in x), plan))


def test_compiled_programs_and_graphs_give_the_same_bits() -> None:
    """A compiled program knows no bound on the lengths, whatever the rows: it takes the other kernel."""
    lengths = (4700, 0, 300)
    layout = JaggedLayout.from_lengths(torch.tensor(lengths, device="cuda"))
    x = random_rows(5000, 2, torch.bfloat16, 7)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return hstu_attention(q, k, v, layout, AttentionMask(), alpha=0.1, scale=0.01, backend="triton")

    expected = attend(*x)
    assert torch.equal(torch.compile(attend, fullgraph=True, backend="eager")(*x), expected)
    plan = planned(lengths)
    warm = ours(x, plan)
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(warm)
    with torch.cuda.graph(graph):
        ours(x, plan, out)
    out.zero_()
    graph.replay()
    assert torch.equal(out, warm)
