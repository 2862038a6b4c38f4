"""The forward with a bias of positions for Hopper alone, on such a GPU: fp64 budget, bits, neighbours, races."""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hstu_kernels import RelativeBias, hstu_attention
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

REACH = 1000


@pytest.fixture(autouse=True)
def short_batches_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of any length take the kernel."""
    from hstu_kernels.attention.triton import hopper_biased_launch as biased
    from hstu_kernels.attention.triton import hopper_launch as hopper

    monkeypatch.setattr(hopper, "LEAST_TURNS", 0)
    monkeypatch.setattr(biased, "LEAST", 0)


def bias_of(reach: int = REACH) -> RelativeBias:
    return RelativeBias(torch.randn(2 * reach - 1, generator=torch.Generator("cuda").manual_seed(1), device="cuda"))


def ours(
    x: tuple[Tensor, ...],
    plan: TritonPlan,
    bias: RelativeBias,
    out: Tensor | None = None,
    programs: int | None = None,
) -> Tensor:
    """By this kernel; a call that it does not take fails."""
    from hstu_kernels.attention.triton.calls import divide
    from hstu_kernels.attention.triton.hopper_biased_launch import HopperBiased

    q, k, v = x
    pos, _ = divide(bias.pos_table, None, 128**-0.5)
    assert pos is not None
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device) if out is None else out
    kernel = HopperBiased(q, pos, plan, 128**-0.5, 0.01, programs)
    assert kernel.launch((q, k, v), pos, out, direct=False)
    return out


def theirs(x: tuple[Tensor, ...], plan: TritonPlan, bias: RelativeBias) -> Tensor:
    """By the kernel that runs everywhere."""
    from hstu_kernels.attention.triton.launch import triton_forward
    from hstu_kernels.attention.triton.tiles import tile_set

    # Tiles of the caller's, not those of the kind: the other kernel.
    tiles = replace(tile_set(128, 128, x[0].dtype, biased=True))
    return triton_forward(*x, bias.pos_table, None, plan, 128**-0.5, 0.01, tiles)


@pytest.mark.parametrize("kind", [BiasKind.POSITION, BiasKind.TIME, BiasKind.BOTH])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stays_in_the_budget_and_is_what_a_call_runs(
    dtype: torch.dtype, kind: BiasKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With positions alone; calls with times run the other kernel."""
    from hstu_kernels.attention.triton.hopper_biased_launch import HopperBiased

    launches = count_launches(HopperBiased, monkeypatch)
    case = AttentionCase(name="hopper", lengths=LENGTHS, bias=kind, heads=2, qk_dim=128, v_dim=128)
    attention = functools.partial(hstu_attention, backend="triton")
    assert_within_budget(attention, make_inputs(case, dtype, device="cuda"), signal=False)
    assert bool(launches) is (kind is BiasKind.POSITION)


@pytest.mark.parametrize("reach", [1, 2, 64, 100, REACH, 5000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gives_the_bits_of_the_other_kernel(dtype: torch.dtype, reach: int) -> None:
    """Were there one different bit, no kernel could be chosen by length."""
    rng, bias = random.Random(reach), bias_of(reach)
    for seed in range(4):
        lengths = LENGTHS if seed == 0 else random_lengths(rng)
        x, plan = random_rows(sum(lengths), 2, dtype, seed), planned(lengths, bias)
        expected = theirs(x, plan, bias)
        for programs in (None, 1, 7, 10_000):
            assert torch.equal(ours(x, plan, bias, programs=programs), expected), (lengths, programs)


def test_a_call_repeats_its_bits_whatever_ran_before() -> None:
    """Twenty rounds with other inputs between them: a slot that is read too early holds the others' rows."""
    lengths, others = (3000, 77, 0, 1025, 512), (4096, 4096)
    bias, other_bias = bias_of(), bias_of(100)
    plan, other = planned(lengths, bias), planned(others, other_bias)
    x = random_rows(4614, 2, torch.bfloat16, 0)
    y = random_rows(8192, 2, torch.bfloat16, 1)
    first, second = ours(x, plan, bias), ours(y, other, other_bias)
    assert torch.equal(first, theirs(x, plan, bias))
    assert torch.equal(second, theirs(y, other, other_bias))
    for _ in range(20):
        assert torch.equal(ours(x, plan, bias), first)
        assert torch.equal(ours(y, other, other_bias), second)
        assert torch.equal(ours((x[0], x[1], x[2] * 2), plan, bias), first * 2)


def test_no_number_of_a_neighbour_is_seen() -> None:
    bias = bias_of()
    x, plan = random_rows(sum(NEIGHBOURS), 2, torch.bfloat16, 3), planned(NEIGHBOURS, bias)
    clean = ours(x, plan, bias)
    kept = spoil_every_other(x, NEIGHBOURS)
    got = ours(x, plan, bias)
    for rows in kept:
        assert torch.equal(got[rows], clean[rows])


def test_rows_of_no_sequence_are_not_written() -> None:
    lengths = (0, 100, 65, 0, 129)
    rows, bias = sum(lengths), bias_of()
    room = torch.full((rows + 300, 2, 128), 7.0, dtype=torch.bfloat16, device="cuda")
    ours(random_rows(rows, 2, torch.bfloat16, 4), planned(lengths, bias), bias, room[100 : 100 + rows])
    assert bool((room[:100] == 7).all() and (room[100 + rows :] == 7).all())


def test_graphs_and_columns_of_one_matrix_give_the_same_bits() -> None:
    """q, k and v as the layer leaves them: columns of one wide matrix."""
    lengths = (4700, 0, 300)
    bias = bias_of()
    plan, wide = planned(lengths, bias), random_rows(5000, 6, torch.bfloat16, 6)[0]
    x = tuple(wide.unflatten(1, (3, 2)).unbind(1))
    expected = theirs(tuple(t.contiguous() for t in x), plan, bias)
    warm = ours(x, plan, bias)
    assert torch.equal(warm, expected)
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(warm)
    with torch.cuda.graph(graph):
        ours(x, plan, bias, out)
    out.zero_()
    graph.replay()
    assert torch.equal(out, warm)
