"""The bias inside the Triton kernels; run by `test_layer_interpreter.py`, with TRITON_INTERPRET=1 from its start."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hstu_kernels import AttentionMask, JaggedLayout, RelativeBias, next_event_timestamps
from hstu_kernels.attention.triton import plan_triton
from hstu_kernels.attention.triton.launch import triton_attention
from hstu_kernels.attention.triton.rab import block_bias, own_span
from hstu_kernels.attention.triton.tiles import KernelShape, Tile, TileSet
from hstu_kernels.attention.triton.time_buckets import bucket_range, is_narrow
from hstu_kernels.bias import bucket_boundaries, time_buckets
from hstu_kernels.testing import AttentionCase, AttentionInputs, BiasKind, assert_within_budget, make_inputs

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_layer_interpreter.py"
torch.set_num_threads(1)

SMALL = TileSet(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 1))
FLAT = TileSet(Tile(16, 16, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 1))
YEAR = 31_536_000
SIDE = 16


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: JaggedLayout,
    mask: AttentionMask,
    *,
    alpha: float,
    scale: float,
    bias: RelativeBias | None,
) -> Tensor:
    tiles = SMALL if layout.max_seq_len % 2 else FLAT
    plan = plan_triton(layout, mask, bias, q.shape[0])
    return triton_attention(q, k, v, plan, alpha=alpha, scale=scale, bias=bias, tiles=tiles)


def with_times(case: AttentionCase, times: Tensor, row_times: Tensor | None = None) -> AttentionInputs:
    inputs = make_inputs(case, torch.float32)
    assert inputs.bias is not None
    return replace(inputs, bias=replace(inputs.bias, timestamps=times, row_timestamps=row_times))


def history(gap: int, rows: int) -> Tensor:
    return 1_600_000_000 + gap * torch.arange(rows)


LENGTHS = (71, 30)
ROWS = sum(LENGTHS)
RANDOM = torch.Generator().manual_seed(5)
TIMES = {
    "one a day": history(86_400, ROWS),
    "one a second": history(1, ROWS),
    "all at once": history(0, ROWS),
    "unsorted": torch.randint(0, 10 * YEAR, (ROWS,), generator=RANDOM),
    "nearly sorted": history(3600, ROWS) + torch.randint(-7200, 7200, (ROWS,), generator=RANDOM),
    "backwards": history(-86_400, ROWS),
    "steps of 8 years": history(8 * YEAR, ROWS),
    "steps of 70 years": history(70 * YEAR, ROWS),
    "times unknown at first": torch.where(torch.arange(ROWS) % LENGTHS[0] < 20, 0, history(86_400, ROWS)),
    "over the whole range": torch.randint(-(2**62), 2**62, (ROWS,), generator=RANDOM),
}


@pytest.mark.parametrize("num_buckets", [3, 150])
@pytest.mark.parametrize("name", TIMES)
def test_times_of_every_kind(name: str, num_buckets: int) -> None:
    targets = (6, 0) if num_buckets == 3 else None
    case = AttentionCase(
        name=name,
        lengths=LENGTHS,
        num_targets=targets,
        qk_dim=16,
        v_dim=16,
        num_buckets=num_buckets,
        bias=BiasKind.BOTH if num_buckets == 3 else BiasKind.TIME,
    )
    assert_within_budget(attention, with_times(case, TIMES[name]), signal=False)


def test_requests_long_after_the_history() -> None:
    case = AttentionCase(name="late", lengths=(72, 31), num_targets=(40, 3), qk_dim=16, v_dim=16, contextual_seq_len=2)
    layout = case.layout()
    times = history(600, 103)
    asked = next_event_timestamps(times, layout)
    late = layout.row_indices(103) >= layout.history_ends(103)
    asked = torch.where(late, asked + 10 * YEAR, asked)
    assert_within_budget(attention, with_times(case, times, asked), signal=False)


@pytest.mark.parametrize("mask", [AttentionMask(max_attn_len=9), AttentionMask(contextual_sees_history=True)], ids=str)
def test_sequences_longer_than_the_position_table(mask: AttentionMask) -> None:
    case = AttentionCase(
        name="long",
        lengths=(90, 33),
        num_targets=(5, 20),
        contextual_seq_len=2,
        mask=mask,
        bias=BiasKind.POSITION,
        qk_dim=16,
        v_dim=16,
        heads=2,
        table_reach=21,
    )
    assert_within_budget(attention, make_inputs(case, torch.float32), signal=False)


def test_without_products_the_bias_is_left() -> None:
    inputs = make_inputs(AttentionCase(name="alpha-0", lengths=(40, 7), qk_dim=16, v_dim=16), torch.float32)
    assert_within_budget(attention, replace(inputs, alpha=0.0), signal=False)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("reach", [None, 21])
def test_gradients_in_fixed_point(reach: int | None, deterministic: None) -> None:
    case = AttentionCase(
        name="exact", lengths=(71, 30), num_targets=(6, 0), bias=BiasKind.BOTH, qk_dim=16, v_dim=16, table_reach=reach
    )
    assert_within_budget(attention, make_inputs(case, torch.float32), signal=False)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e25, float("inf")])
def test_the_fixed_point_follows_the_size(size: float, deterministic: None) -> None:
    """Neither an overflow nor zeros; what is not finite stays so."""
    inputs = make_inputs(AttentionCase(name="size", lengths=(40, 7), qk_dim=16, v_dim=16), torch.float32)
    assert inputs.bias is not None and inputs.bias.pos_table is not None
    gradients = []
    for factor in (1.0, size):
        table = inputs.bias.pos_table.clone().requires_grad_()
        bias = replace(inputs.bias, pos_table=table)
        out = attention(
            inputs.q, inputs.k, inputs.v, inputs.layout, inputs.mask, alpha=inputs.alpha, scale=1.0, bias=bias
        )
        out.backward(inputs.grad_out * factor)
        assert table.grad is not None
        gradients.append(table.grad)
    one, found = gradients
    if math.isfinite(size):
        torch.testing.assert_close(found, one * size, rtol=1e-5, atol=1e-5 * size)
    else:
        assert not found.isfinite().any()


def test_tables_alone_may_ask_for_gradients() -> None:
    inputs = make_inputs(AttentionCase(name="tables", lengths=(40, 7), qk_dim=16, v_dim=16), torch.float32)
    assert inputs.bias is not None
    options = {"alpha": inputs.alpha, "scale": inputs.scale}
    gradients = []
    for frozen in (False, True):
        q, k, v = (x.clone().requires_grad_(not frozen) for x in (inputs.q, inputs.k, inputs.v))
        assert inputs.bias.pos_table is not None and inputs.bias.time_table is not None
        tables = [t.clone().requires_grad_() for t in (inputs.bias.pos_table, inputs.bias.time_table)]
        bias = replace(inputs.bias, pos_table=tables[0], time_table=tables[1])
        attention(q, k, v, inputs.layout, inputs.mask, **options, bias=bias).backward(inputs.grad_out)
        gradients.append([table.grad for table in tables])
    for whole, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(alone, whole)


@triton.jit
def _bias_of_a_block(
    out_ptr, road_ptr, row_times_ptr, key_times_ptr, time_ptr, bounds_ptr, SHAPE: tl.constexpr, KEYS_MOVE: tl.constexpr
):
    SIDE: tl.constexpr = SHAPE.block_m
    index = tl.arange(0, SIDE)
    row_times, key_times = tl.load(row_times_ptr + index), tl.load(key_times_ptr + index)
    row_low, row_high = own_span(row_times, SHAPE)
    key_low, key_high = own_span(key_times, SHAPE)
    _, more = bucket_range(row_low, row_high, key_low, key_high, SHAPE)
    narrow = is_narrow(row_low, row_high, key_low, key_high)
    tl.store(road_ptr, tl.where(more <= SHAPE.few_buckets, tl.minimum(more, 1), tl.where(narrow, 2, 3)))
    if KEYS_MOVE:
        rows, cols = index[:, None], index[None, :]
        own, moving_ptr = row_times, key_times_ptr
    else:
        rows, cols = index[None, :], index[:, None]
        own, moving_ptr = key_times, row_times_ptr
    rab = block_bias(
        0,
        0,
        own,
        moving_ptr,
        0,
        SIDE,
        SIDE,
        row_low,
        row_high,
        key_low,
        key_high,
        time_ptr,
        time_ptr,
        bounds_ptr,
        SHAPE,
        KEYS_MOVE,
    )
    tl.store(out_ptr + rows * SIDE + cols, rab)


def buckets_in_the_kernel(
    rows: Tensor, keys: Tensor, num_buckets: int, *, few: int = 3, shift: int = 0, keys_move: bool = True
) -> tuple[Tensor, int]:
    """``[SIDE, SIDE]`` buckets as a block finds them, and its road: one bucket, few, narrow or wide."""
    shape = KernelShape(
        heads=1,
        qk_dim=16,
        v_dim=16,
        block_qk=16,
        block_v=16,
        block_m=SIDE,
        block_n=SIDE,
        contextual=0,
        reach=-1,
        buckets=num_buckets,
        exact=True,
        descriptors=False,
        precision="ieee",
        few_buckets=few,
    )
    out, road = torch.full((SIDE, SIDE), float("nan")), torch.full((1,), -1, dtype=torch.int32)
    table = torch.arange(num_buckets + 1, dtype=torch.float32)
    bounds = bucket_boundaries(num_buckets) + shift
    _bias_of_a_block[(1,)](out, road, rows, keys, table, bounds, SHAPE=shape, KEYS_MOVE=keys_move)
    return out.int(), int(road)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Times of a block's rows and keys that lie about a threshold apart, spread little or much."""
    bounds = bucket_boundaries(140).tolist()
    apart = draw(st.sampled_from([0, 1, *bounds])) + draw(st.integers(-2, 2))
    widest = draw(st.sampled_from([0, 1, 3, 40, apart // 8, apart, 4 * apart]))
    base = draw(st.integers(-(2**40), 2**40))
    spread = st.lists(st.integers(0, min(max(widest, 0), 2**61)), min_size=SIDE, max_size=SIDE)
    keys = torch.tensor(draw(spread)) + base
    rows = torch.tensor(draw(spread)) + int(keys.max()) + apart
    return (keys, rows) if draw(st.booleans()) else (rows, keys)


@settings(max_examples=150, deadline=None)
@given(blocks(), st.sampled_from([1, 2, 30, 71, 72, 128]), st.sampled_from([0, 1, 3, 6]), st.booleans())
def test_buckets_of_a_block_equal_the_definition(
    block: tuple[Tensor, Tensor], num_buckets: int, few: int, keys_move: bool
) -> None:
    rows, keys = block
    found, _ = buckets_in_the_kernel(rows, keys, num_buckets, few=few, keys_move=keys_move)
    assert torch.equal(found, time_buckets(rows[:, None], keys[None, :], bucket_boundaries(num_buckets)))


ROADS = {"few": (20, 1), "narrow": (20, 2), "wide": (80, 3)}


@pytest.mark.parametrize("shift", [-1, 0, 1])
@pytest.mark.parametrize("road", ROADS)
def test_thresholds_one_off_are_found_out(road: str, shift: int) -> None:
    """Pairs exactly at a threshold, or just below it, on each road."""
    bucket, number = ROADS[road]
    bound = int(bucket_boundaries(128)[bucket])
    keys = torch.zeros(SIDE, dtype=torch.int64)
    rows = bound + torch.arange(SIDE) % 2 - 1
    if road != "few":
        # One row that asks before the keys were: the block's extremes say nothing.
        rows[0] = -5
    found, taken = buckets_in_the_kernel(rows, keys, 128, shift=shift)
    assert taken == number
    expected = time_buckets(rows[:, None], keys[None, :], bucket_boundaries(128))
    assert torch.equal(found, expected) == (shift == 0)
    assert expected.unique().numel() >= 2


def test_far_blocks_take_the_short_road() -> None:
    rows, keys = history(60, SIDE) + 40 * 86_400, history(60, SIDE)
    assert buckets_in_the_kernel(rows, keys, 128)[1] <= 1
    assert buckets_in_the_kernel(rows + 35 * YEAR, keys, 128)[1] == 2
