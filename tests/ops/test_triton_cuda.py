"""The named cases through the Triton kernels on a GPU, by the budget rule."""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import pytest
import torch

from hstu_kernels import AttentionMask, hstu_attention, hstu_target_attention
from hstu_kernels.attention.triton import plan_triton, schedule
from hstu_kernels.attention.triton.tiles import Tile, TileSet, tile_set
from hstu_kernels.testing import (
    ATTENTION_CASES,
    AttentionCase,
    AttentionInputs,
    BiasKind,
    assert_within_budget,
    make_inputs,
    poisoned_empty,
    run_attention,
    split_targets,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that this PyTorch can use"),
]

attention = functools.partial(hstu_attention, backend="triton")
eager = functools.partial(hstu_attention, backend="eager")
# Without a bias, and with one under several masks; widths that fill a power of two and one that does not.
FLOAT32_CASES = {"empty-sequences": 16, "no-bias": 64, "window-prefix": 50, "contextual": 32, "targets-window": 64}


def wide(case: AttentionCase) -> AttentionCase:
    """``case`` with heads of at least 16 columns, as the kernels want them."""
    return replace(case, qk_dim=max(16, 4 * case.qk_dim), v_dim=max(16, 4 * case.v_dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_stays_in_the_budget(case: AttentionCase, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    assert_within_budget(attention, make_inputs(wide(case), dtype, device="cuda"), signal=False)


@pytest.mark.parametrize(("precision", "heads"), [("highest", 64), ("highest", 128), ("high", 64)], ids=str)
def test_float32_follows_the_precision_of_pytorch(precision: str, heads: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    case = replace(ATTENTION_CASES[1], qk_dim=heads, v_dim=heads)
    inputs = make_inputs(case, torch.float32, device="cuda")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        got = run_attention(attention, inputs)
    finally:
        torch.set_float32_matmul_precision(before)
    for name, expected in run_attention(eager, inputs.to(torch.float64)).items():
        error = float((got[name].double() - expected).norm() / expected.norm())
        # tf32 keeps 11 bits of a factor, float32 24, two tf32 numbers 22.
        assert error < (2e-6 if precision == "highest" else 1e-2), name
        assert precision == "highest" or name != "out" or error > 1e-5


@pytest.mark.parametrize("case", [case for case in ATTENTION_CASES if case.name in FLOAT32_CASES], ids=str)
def test_float32_stays_in_the_budget(case: AttentionCase) -> None:
    """Beside the oracle in float32: three tf32 products are as good as one of float32."""
    pytest.importorskip("triton", reason="Triton is not installed")
    width = FLOAT32_CASES[case.name]
    case = replace(case, qk_dim=width, v_dim=width)
    draws = [make_inputs(case, torch.float32, seed=seed, device="cuda") for seed in range(3)]
    assert_within_budget(attention, draws, signal=False)


@pytest.mark.parametrize(
    ("of_q", "of_k", "of_v", "of_grad"),
    [(1e15, 1e-15, 1e-20, 1e20), (1e-25, 1e25, 1e18, 1e-18), (1e-30, 1e30, 1e-30, 1e3), (1e4, 1e4, 1e10, 1e10)],
    ids=str,
)
def test_float32_holds_from_tiny_to_large_numbers(of_q: float, of_k: float, of_v: float, of_grad: float) -> None:
    """By the budget rule: the second of two tf32 numbers is small, not lost."""
    pytest.importorskip("triton", reason="Triton is not installed")
    case = AttentionCase(name="magnitudes", lengths=(200, 0, 77), heads=2, qk_dim=64, v_dim=64)
    unit = make_inputs(case, torch.float32, device="cuda")
    inputs = replace(unit, q=unit.q * of_q, k=unit.k * of_k, v=unit.v * of_v, grad_out=unit.grad_out * of_grad)
    assert_within_budget(attention, inputs, signal=False)


def test_float32_of_denormals_stays_near_zero() -> None:
    """They may count as 0: the result is off by no more than that."""
    pytest.importorskip("triton", reason="Triton is not installed")
    case = AttentionCase(name="denormals", lengths=(130, 64), heads=2, qk_dim=64, v_dim=64)
    unit = make_inputs(case, torch.float32, device="cuda")
    inputs = replace(unit, v=unit.v * 1e-39)
    got, exact = (run_attention(f, x)["out"] for f, x in ((attention, inputs), (eager, inputs.to(torch.float64))))
    # Three products for each of 130 keys, each lost below the least normal number.
    lost = 3 * 130 * inputs.scale * torch.finfo(torch.float32).tiny
    assert float((got.double() - exact).abs().max()) <= lost


@pytest.mark.parametrize("special", [float("inf"), float("nan")], ids=str)
def test_float32_keeps_what_is_no_number(special: float) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    case = AttentionCase(name="special", lengths=(130, 64), heads=2, qk_dim=64, v_dim=64)
    inputs = make_inputs(case, torch.float32, device="cuda")
    v = inputs.v.clone()
    v[100, 1, 7] = special
    out = run_attention(attention, replace(inputs, v=v))["out"]
    assert not bool(out[100:130, 1, 7].isfinite().any())
    assert bool(out[130:].isfinite().all()) and bool(out[:, 0].isfinite().all())


@pytest.mark.parametrize("micro_batch_size", [None, 3], ids=lambda n: f"micro-batch-{n or 'all'}")
@pytest.mark.parametrize("case", [c for c in ATTENTION_CASES if c.num_targets is not None], ids=str)
def test_cached_targets_stay_in_the_budget(case: AttentionCase, micro_batch_size: int | None) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    inputs = make_inputs(wide(case), torch.float64, device="cuda")
    low = inputs.to(torch.bfloat16)
    options = {"alpha": inputs.alpha, "scale": inputs.scale}
    pairs = zip(split_targets(inputs, micro_batch_size), split_targets(low, micro_batch_size), strict=True)
    for exact, part in pairs:
        rest = (part.layout, inputs.mask)

        def attend(part=part, rest=rest, backend="triton"):  # type: ignore[no-untyped-def]
            return hstu_target_attention(
                part.q, part.k, part.v, part.cache, *rest, **options, bias=part.bias, backend=backend
            )

        expected = attend(exact, backend="reference")
        if not expected.numel():
            continue
        budget = float((attend(backend="eager").double() - expected).abs().max())
        with poisoned_empty():
            got = attend()
        assert float((got.double() - expected).abs().max()) <= 2 * budget + 1e-12


@pytest.mark.parametrize("one_time", [False, True], ids=["own-times", "one-time"])
def test_cached_targets_of_long_histories(one_time: bool) -> None:
    """Histories of several stretches, and of none and one beside them."""
    pytest.importorskip("triton", reason="Triton is not installed")
    case = AttentionCase(
        name="long", lengths=(5000, 90, 2100, 40), num_targets=(200, 0, 40, 40), heads=2, qk_dim=64, v_dim=64
    )
    inputs = make_inputs(case, torch.float64, device="cuda")
    if one_time:
        assert inputs.bias is not None and inputs.bias.timestamps is not None
        total = inputs.q.shape[0]
        times = torch.full_like(inputs.bias.timestamps, int(inputs.bias.timestamps.max()))
        targets = inputs.layout.row_indices(total) >= inputs.layout.history_ends(total)
        times = torch.where(targets, times, inputs.bias.timestamps)
        inputs = replace(inputs, bias=replace(inputs.bias, timestamps=times))
    (exact,), (part,) = split_targets(inputs), split_targets(inputs.to(torch.bfloat16))

    def attend(part=part, backend="triton"):  # type: ignore[no-untyped-def]
        rest = {"alpha": inputs.alpha, "scale": inputs.scale, "bias": part.bias, "backend": backend}
        return hstu_target_attention(part.q, part.k, part.v, part.cache, part.layout, inputs.mask, **rest)

    expected = attend(exact, backend="reference")
    budget = float((attend(backend="eager").double() - expected).abs().max())
    with poisoned_empty():
        got = attend()
    assert float((got.double() - expected).abs().max()) <= 2 * budget + 1e-12


@pytest.mark.parametrize("bias", [BiasKind.NONE, BiasKind.BOTH], ids=lambda b: b.value)
@pytest.mark.parametrize("width", [64, 128])
def test_tiles_of_64_and_of_128_targets_have_the_same_bits(bias: BiasKind, width: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from hstu_kernels.attention.triton.target_launch import triton_target_attention

    case = AttentionCase(
        name="shared",
        lengths=(5000, 90, 2100, 40, 6400),
        num_targets=(300, 0, 40, 40, 129),
        bias=bias,
        heads=2,
        qk_dim=width,
        v_dim=width,
    )
    inputs = make_inputs(case, torch.bfloat16, device="cuda")
    (part,) = split_targets(inputs)
    options = {"alpha": inputs.alpha, "scale": inputs.scale, "bias": part.bias}
    first, second = (
        triton_target_attention(part.q, part.k, part.v, part.cache, part.layout, inputs.mask, **options, tile=tile)
        for tile in (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3))
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["targets", "no-bias"])
def test_nothing_waits_for_the_device(name: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    inputs = make_inputs(
        wide(next(case for case in ATTENTION_CASES if case.name == name)), torch.bfloat16, device="cuda"
    )
    arguments = (inputs.q, inputs.k, inputs.v, inputs.layout, inputs.mask)
    options = {"alpha": inputs.alpha, "scale": inputs.scale, "bias": inputs.bias}
    attention(*arguments, **options)
    plan = plan_triton(inputs.layout, inputs.mask, inputs.bias, inputs.q.shape[0])
    plan.query_work(64, 64)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = plan_triton(inputs.layout, inputs.mask, None, inputs.q.shape[0])
        lists = again.query_work(64, 64), again.key_work(64, 64)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(lists[0], plan.query_work(64, 64))
    assert torch.equal(lists[1], plan.key_work(64, 64))


ROWS, YEAR = 400, 31_536_000
TIMES = {
    "all at once": torch.zeros(ROWS, dtype=torch.int64),
    "one a day": 86_400 * torch.arange(ROWS),
    "steps of 70 years": 70 * YEAR * torch.arange(ROWS),
    "unsorted": torch.randint(0, 10 * YEAR, (ROWS,), generator=torch.Generator().manual_seed(1)),
    "over the whole range": torch.randint(-(2**62), 2**62, (ROWS,), generator=torch.Generator().manual_seed(2)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", TIMES)
def test_times_of_every_kind(name: str, dtype: torch.dtype) -> None:
    """Each way to a time bucket: one for a block, few, looked up in 32 and in 64 bits."""
    pytest.importorskip("triton", reason="Triton is not installed")
    case = AttentionCase(
        name=name, lengths=(250, 150), num_targets=(20, 0), heads=2, qk_dim=64, v_dim=64, num_buckets=150
    )
    draws = []
    for seed in range(8):
        inputs = make_inputs(case, dtype, seed=seed, device="cuda")
        assert inputs.bias is not None
        draws.append(replace(inputs, bias=replace(inputs.bias, timestamps=TIMES[name].cuda())))
    # Together: with all events at once the gradient of the time table is one number, 1e5 terms that cancel.
    assert_within_budget(attention, draws, signal=False)


MASKS = {
    "causal": AttentionMask(),
    "prefix": AttentionMask(max_attn_len=200, global_prefix_len=90),
    "tail": AttentionMask(max_attn_len=200, full_attn_tail_len=90),
}


def semi_local(mask: AttentionMask, bias: BiasKind = BiasKind.NONE, width: int = 128) -> AttentionInputs:
    """Sequences of more than one piece, one of them with targets."""
    case = AttentionCase(
        name="semi-local",
        lengths=(1700, 3, 777, 1024),
        num_targets=(70, 0, 0, 0),
        mask=mask,
        bias=bias,
        heads=2,
        qk_dim=width,
        v_dim=width,
    )
    return make_inputs(case, torch.bfloat16, device="cuda")


def attend(inputs: AttentionInputs, tiles: TileSet) -> dict[str, torch.Tensor]:
    from hstu_kernels.attention.triton.launch import triton_attention

    def call(q, k, v, layout, mask, *, alpha, scale, bias):  # type: ignore[no-untyped-def]
        plan = plan_triton(layout, mask, bias, q.shape[0])
        return triton_attention(q, k, v, plan, alpha=alpha, scale=scale, bias=bias, tiles=tiles)

    return run_attention(call, inputs)


@pytest.mark.parametrize("bias", [BiasKind.NONE, BiasKind.BOTH], ids=lambda b: b.value)
@pytest.mark.parametrize("name", ["prefix", "tail"])
def test_long_tiles_in_pieces(name: str, bias: BiasKind, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(schedule, "PIECE_ROWS", 512)
    inputs = semi_local(MASKS[name], bias)
    plan = plan_triton(inputs.layout, inputs.mask, None, inputs.q.shape[0])
    assert plan.pieces("query", 64)[1] + plan.pieces("key", 64)[1] > 0
    assert_within_budget(attention, inputs, signal=False)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", MASKS)
def test_the_rows_of_a_tile_are_never_a_number(name: str, width: int) -> None:
    """Blocks of the other side come in one order: how many rows a program owns, and where they stay, changes no bit."""
    pytest.importorskip("triton", reason="Triton is not installed")
    inputs = semi_local(MASKS[name], width=width)
    results = [
        attend(inputs, TileSet(first, first, second, Tile(first.block_m, 64, first.num_warps, 1)))
        for first, second in (
            (Tile(64, 64, 4, 3), Tile(32, 64, 4, 3)),
            (Tile(128, 64, 8, 3), Tile(32, 128, 8, 3)),
            (Tile(128, 64, 8, 3, 1), Tile(32, 64, 4, 3, 1)),
            (Tile(64, 64, 4, 2, 2), Tile(32, 128, 8, 3, 2)),
        )
    ]
    for other in results[1:]:
        for key, result in results[0].items():
            assert torch.equal(other[key], result), key


@pytest.mark.parametrize("by", [1, 2, 8])
@pytest.mark.parametrize("width", [64, 128])
def test_where_operands_lie_is_never_a_number(width: int, by: int) -> None:
    """Pairs of columns come as words, where they can: rows may begin anywhere."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from hstu_kernels.attention.triton.launch import triton_backward, triton_forward

    inputs = semi_local(MASKS["prefix"], width=width)
    plan = plan_triton(inputs.layout, inputs.mask, None, inputs.q.shape[0])
    grad = torch.randn_like(inputs.v)

    def moved(x: torch.Tensor) -> torch.Tensor:
        wide = torch.full((x.shape[0], x[0].numel() + by + 1), torch.nan, dtype=x.dtype, device=x.device)
        view = wide[:, by : by + x[0].numel()].unflatten(1, x.shape[1:])
        return view.copy_(x)

    arguments = (None, None, plan, inputs.alpha, inputs.scale, None)
    operands = [x.detach() for x in (inputs.q, inputs.k, inputs.v)]
    expected, got = (
        [triton_forward(*xs, *arguments), *triton_backward(g, *xs, *arguments, (True, True, True, False, False))[:3]]
        for xs, g in ((operands, grad), ([moved(x) for x in operands], moved(grad)))
    )
    for name, one, other in zip(("out", "dq", "dk", "dv"), expected, got, strict=True):
        assert one is not None and other is not None
        assert torch.equal(one, other), name


def test_a_call_repeats_its_bits() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    inputs = semi_local(MASKS["causal"])
    first, second = (run_attention(attention, inputs) for _ in range(2))
    for key, result in first.items():
        assert torch.equal(second[key], result), key


NO_PIECES = {
    "causal": (AttentionMask(), 0),
    "window": (AttentionMask(max_attn_len=100, window_targets=True), 0),
    "context": (AttentionMask(contextual_sees_history=True), 5),
}
BY_LENGTH = [
    *((name, torch.bfloat16, (width, width)) for name in NO_PIECES for width in (64, 128)),
    *(("causal", torch.float16, (width, width)) for width in (64, 128)),
    ("causal", torch.bfloat16, (16, 128)),
    ("causal", torch.bfloat16, (32, 16)),
]


@pytest.mark.parametrize(("name", "dtype", "widths"), BY_LENGTH, ids=str)
def test_the_tile_of_long_batches_gives_the_same_bits(name: str, dtype: torch.dtype, widths: tuple[int, int]) -> None:
    """Random lengths and targets; were there one different bit, no tile could be chosen by length."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from hstu_kernels.attention.triton.launch import triton_attention

    mask, contextual = NO_PIECES[name]
    short, long = (tile_set(*widths, dtype, biased=False, longest=longest) for longest in (0, 1 << 20))
    assert short.forward != long.forward
    rng = random.Random(f"{name}{widths}")
    for seed in range(6):
        lengths = tuple(rng.choice((0, 5 + rng.randrange(70), 64 * rng.randrange(1, 9), 900)) for _ in range(9))
        targets = tuple(rng.randrange(length - contextual + 1) if length else 0 for length in lengths)
        case = AttentionCase(
            name=name,
            lengths=lengths,
            num_targets=targets if seed % 2 else None,
            contextual_seq_len=contextual,
            mask=mask,
            bias=BiasKind.NONE,
            heads=3,
            qk_dim=widths[0],
            v_dim=widths[1],
        )
        inputs = make_inputs(case, dtype, seed=seed, device="cuda")
        plan = plan_triton(inputs.layout, mask, None, inputs.q.shape[0])
        numbers = {"alpha": inputs.alpha, "scale": inputs.scale, "bias": None}
        first, second = (
            triton_attention(inputs.q, inputs.k, inputs.v, plan, **numbers, tiles=tiles) for tiles in (short, long)
        )
        assert torch.equal(first, second), (lengths, targets)


@pytest.mark.parametrize("width", [64, 128])
def test_a_long_neighbour_changes_no_bit(width: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    case = AttentionCase(
        name="alone", lengths=(777,), bias=BiasKind.NONE, heads=2, qk_dim=width, v_dim=width, num_targets=(30,)
    )
    alone = make_inputs(case, torch.bfloat16, device="cuda")
    together = make_inputs(replace(case, lengths=(777, 9000), num_targets=(30, 0)), torch.bfloat16, device="cuda")
    for x in ("q", "k", "v", "grad_out"):
        getattr(together, x)[:777] = getattr(alone, x)
    together = replace(together, alpha=alone.alpha, scale=alone.scale)
    expected = run_attention(attention, alone)
    for key, result in run_attention(attention, together).items():
        assert torch.equal(result[:777], expected[key]), key
