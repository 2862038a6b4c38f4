"""hstu_attention: the oracle against plain loops, every backend against the oracle, and the operator's invariants."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hstu_kernels import AttentionMask, Backend, JaggedLayout, RelativeBias, hstu_attention, plan_attention
from hstu_kernels.testing import (
    ATTENTION_CASES,
    AttentionCase,
    AttentionInputs,
    BiasKind,
    assert_equals_oracle,
    assert_within_budget,
    make_inputs,
    make_timestamps,
    poisoned_empty,
    run_attention,
)

from .loops import loop_attention

BACKENDS = [Backend.REFERENCE, Backend.EAGER]
# Everything that is not the oracle itself.
FAST_BACKENDS = [Backend.EAGER]
# Maxima over one row are too noisy for the budget rule; "many-short" and "odd-lengths" hold rows of length 1.
LOW_PRECISION_CASES = [case for case in ATTENTION_CASES if case.total_rows != 1] + [
    AttentionCase(name="three-buckets-length-1000", lengths=(1000,), num_buckets=3),
]
EXTRA_CASES = [
    AttentionCase(name="two-blocks-exactly", lengths=(256, 128, 129), mask=AttentionMask(max_attn_len=100)),
    AttentionCase(
        name="window-of-one-and-tail-across-blocks",
        lengths=(200, 190, 131),
        mask=AttentionMask(max_attn_len=1, full_attn_tail_len=70),
        num_targets=(3, 40, 0),
        contextual_seq_len=4,
    ),
]


def backend_of(backend: Backend) -> functools.partial[Tensor]:
    return functools.partial(hstu_attention, backend=backend)


def attend(inputs: AttentionInputs, backend: Backend) -> Tensor:
    return hstu_attention(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.layout,
        inputs.mask,
        alpha=inputs.alpha,
        scale=inputs.scale,
        bias=inputs.bias,
        backend=backend,
    )


def close(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=0, atol=1e-12)


# The oracle against loops.

TINY_GEOMETRY = {
    "history": {"lengths": (6, 1, 0, 4)},
    "targets": {"lengths": (7, 3, 0, 2), "num_targets": (3, 0, 0, 2)},
    "contextual": {"lengths": (7, 2, 0), "contextual_seq_len": 2},
    "contextual-targets": {"lengths": (8, 3, 0), "num_targets": (2, 1, 0), "contextual_seq_len": 2},
}
TINY_MASKS = {
    "causal": AttentionMask(),
    "window": AttentionMask(max_attn_len=1),
    "prefix": AttentionMask(max_attn_len=1, global_prefix_len=1),
    "tail": AttentionMask(max_attn_len=1, full_attn_tail_len=2),
    "window-targets": AttentionMask(max_attn_len=2, window_targets=True),
    "sees-history": AttentionMask(max_attn_len=1, contextual_sees_history=True),
    "all": AttentionMask(
        max_attn_len=1, global_prefix_len=1, full_attn_tail_len=1, window_targets=True, contextual_sees_history=True
    ),
}


@pytest.mark.parametrize("bias", BiasKind, ids=str)
@pytest.mark.parametrize("mask", TINY_MASKS.values(), ids=TINY_MASKS.keys())
@pytest.mark.parametrize("geometry", TINY_GEOMETRY.values(), ids=TINY_GEOMETRY.keys())
def test_oracle_equals_loops(geometry: dict[str, object], mask: AttentionMask, bias: BiasKind) -> None:
    case = AttentionCase(name="tiny", heads=2, qk_dim=2, v_dim=3, mask=mask, bias=bias, table_reach=4, **geometry)  # type: ignore[arg-type]
    inputs = make_inputs(case)
    got = attend(inputs, Backend.REFERENCE)
    assert float(got.abs().max()) > 0.1
    assert close(got, loop_attention(inputs))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_given_row_timestamps_are_used(backend: Backend) -> None:
    case = AttentionCase(name="tiny", lengths=(6, 3), num_targets=(2, 0), bias=BiasKind.TIME)
    inputs = make_inputs(case)
    assert inputs.bias is not None
    assert inputs.bias.timestamps is not None
    asked = inputs.bias.timestamps + torch.tensor([0, 5, 90, 3600, 7, 10**6, 1, 86400, 0])
    at_other_times = replace(inputs, bias=replace(inputs.bias, row_timestamps=asked))
    assert close(attend(at_other_times, backend), loop_attention(at_other_times))
    assert not close(attend(at_other_times, backend), attend(inputs, backend))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_alpha_multiplies_the_dot_product_and_scale_the_silu(backend: Backend) -> None:
    """One row, one key, by hand: SiLU(0.5 * 6 + 2 + 1) * 0.25 * 4."""
    q = torch.tensor([[[3.0]]], dtype=torch.float64)
    k, v = torch.tensor([[[2.0]]], dtype=torch.float64), torch.tensor([[[4.0]]], dtype=torch.float64)
    bias = RelativeBias(
        torch.tensor([2.0], dtype=torch.float64),
        torch.tensor([1.0, -9.0], dtype=torch.float64),
        torch.tensor([1_700_000_000]),
    )
    layout = JaggedLayout.from_lengths(torch.tensor([1]))
    out = hstu_attention(q, k, v, layout, AttentionMask(), alpha=0.5, scale=0.25, bias=bias, backend=backend)
    logit = torch.tensor(6.0, dtype=torch.float64)
    assert float(out) == pytest.approx(float(logit * torch.sigmoid(logit) * 0.25 * 4), abs=1e-14)


# Gradients.


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("mask", ["causal", "tail", "all"])
@pytest.mark.parametrize("lengths", [(4, 0, 5), (5, 4)], ids=["history", "contextual-targets"])
def test_gradcheck(lengths: tuple[int, ...], mask: str, backend: Backend) -> None:
    case = AttentionCase(
        name="tiny",
        lengths=lengths,
        heads=2,
        qk_dim=1,
        v_dim=2,
        mask=TINY_MASKS[mask],
        num_buckets=9,
        table_reach=3,
        num_targets=(2, 1) if len(lengths) == 2 else None,
        contextual_seq_len=1 if len(lengths) == 2 else 0,
    )
    inputs = make_inputs(case)
    bias = inputs.bias
    assert bias is not None
    assert bias.pos_table is not None
    assert bias.time_table is not None

    def call(q: Tensor, k: Tensor, v: Tensor, pos_table: Tensor, time_table: Tensor) -> Tensor:
        tables = replace(bias, pos_table=pos_table, time_table=time_table)
        return attend(replace(inputs, q=q, k=k, v=v, bias=tables), backend)

    leaves = [t.clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v, bias.pos_table, bias.time_table)]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=False)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_gradient_is_asked_for_one_argument_at_a_time(backend: Backend) -> None:
    inputs = make_inputs(AttentionCase(name="tiny", lengths=(6, 3), heads=2))
    everything = run_attention(backend_of(backend), inputs)
    for name in ("q", "k", "v"):
        leaf = getattr(inputs, name).clone().requires_grad_()
        (grad,) = torch.autograd.grad(attend(replace(inputs, **{name: leaf}), backend), leaf, inputs.grad_out)
        assert close(grad, everything[f"grad of {name}"])


# Every backend against the oracle.


@pytest.mark.parametrize("backend", FAST_BACKENDS, ids=str)
@pytest.mark.parametrize("case", [*ATTENTION_CASES, *EXTRA_CASES], ids=str)
def test_equals_oracle_in_fp64(case: AttentionCase, backend: Backend) -> None:
    inputs = make_inputs(case)
    with poisoned_empty():
        assert_equals_oracle(backend_of(backend), inputs)


@pytest.mark.parametrize("backend", FAST_BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LOW_PRECISION_CASES, ids=str)
def test_low_precision_stays_in_the_budget(case: AttentionCase, dtype: torch.dtype, backend: Backend) -> None:
    inputs = make_inputs(case, dtype)
    with poisoned_empty():
        assert_within_budget(backend_of(backend), inputs)


@st.composite
def random_cases(draw: st.DrawFn) -> AttentionCase:
    contextual = draw(st.integers(0, 3))
    with_targets = draw(st.booleans())
    lengths, targets = [], []
    for _ in range(draw(st.integers(0, 5))):
        empty = draw(st.integers(0, 5)) == 0
        history = 0 if empty else contextual + draw(st.integers(0, 150) if draw(st.booleans()) else st.integers(0, 6))
        asked = 0 if empty or not with_targets else draw(st.integers(0, 40))
        lengths.append(history + asked)
        targets.append(asked)
    return AttentionCase(
        name="random",
        lengths=tuple(lengths),
        num_targets=tuple(targets) if with_targets else None,
        contextual_seq_len=contextual,
        heads=draw(st.integers(1, 3)),
        qk_dim=draw(st.integers(1, 5)),
        v_dim=draw(st.integers(1, 5)),
        bias=draw(st.sampled_from(BiasKind)),
        num_buckets=draw(st.integers(1, 60)),
        table_reach=draw(st.integers(1, 160)),
        mask=AttentionMask(
            max_attn_len=draw(st.integers(0, 30)),
            global_prefix_len=draw(st.integers(0, 8)),
            full_attn_tail_len=draw(st.integers(0, 12)),
            window_targets=draw(st.booleans()),
            contextual_sees_history=draw(st.booleans()),
        ),
    )


@pytest.mark.parametrize("backend", FAST_BACKENDS, ids=str)
@settings(max_examples=40, deadline=None)
@given(case=random_cases(), seed=st.integers(0, 2**20))
def test_random_layouts_equal_oracle(case: AttentionCase, seed: int, backend: Backend) -> None:
    inputs = make_inputs(case, seed=seed)
    with poisoned_empty():
        assert_equals_oracle(backend_of(backend), inputs)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_non_contiguous_inputs(backend: Backend) -> None:
    inputs = make_inputs(AttentionCase(name="strided", lengths=(40, 9), heads=3, qk_dim=4, v_dim=6))
    expected = run_attention(backend_of(backend), inputs)

    def spread(x: Tensor) -> Tensor:
        """The same numbers, heads first in memory and every second element of a wider tensor."""
        wide = torch.full((x.shape[1], x.shape[0], 2 * x.shape[2]), float("nan"), dtype=x.dtype)
        wide[:, :, ::2] = x.transpose(0, 1)
        return wide[:, :, ::2].transpose(0, 1)

    def strided(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> Tensor:
        q, k, v = spread(q), spread(k), spread(v)
        assert not q.is_contiguous()
        return hstu_attention(q, k, v, *args, backend=backend, **kwargs)  # type: ignore[arg-type]

    got = run_attention(strided, replace(inputs, grad_out=spread(inputs.grad_out)))
    for name, value in expected.items():
        assert close(got[name], value), name


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_views_of_one_projection(backend: Backend) -> None:
    """Q, K and V as the layer makes them: slices of one tensor, which gets one gradient."""
    layout = JaggedLayout.from_lengths(torch.tensor([5, 0, 3]))
    mixed = torch.randn(8, 2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def grad(separate: bool, which: Backend) -> Tensor:
        leaf = mixed.clone().requires_grad_()
        parts = leaf.split([4, 4, 4], dim=-1)
        q, k, v = (p.contiguous() for p in parts) if separate else parts
        out = hstu_attention(q, k, v, layout, AttentionMask(), alpha=0.5, scale=0.3, backend=which)
        (result,) = torch.autograd.grad(out.square().sum(), leaf)
        return result

    assert close(grad(False, backend), grad(True, Backend.REFERENCE))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_broadcast_gradient(backend: Backend) -> None:
    """The gradient of a plain sum has stride 0."""
    inputs = make_inputs(AttentionCase(name="sum", lengths=(9, 4), heads=2))
    leaf = inputs.v.clone().requires_grad_()
    (got,) = torch.autograd.grad(attend(replace(inputs, v=leaf), backend).sum(), leaf)
    ones = replace(inputs, grad_out=torch.ones_like(inputs.grad_out))
    assert close(got, run_attention(backend_of(Backend.REFERENCE), ones)["grad of v"])


def test_auto_on_cpu_is_eager() -> None:
    inputs = make_inputs(AttentionCase(name="auto", lengths=(40, 9)))
    assert torch.equal(attend(inputs, Backend.AUTO), attend(inputs, Backend.EAGER))


def test_inputs_are_not_changed() -> None:
    inputs = make_inputs(AttentionCase(name="pure", lengths=(40, 9), heads=2, mask=AttentionMask(max_attn_len=3)))
    again = make_inputs(AttentionCase(name="pure", lengths=(40, 9), heads=2, mask=AttentionMask(max_attn_len=3)))
    run_attention(backend_of(Backend.EAGER), inputs)
    assert inputs.bias is not None
    assert again.bias is not None
    for got, expected in ((inputs.q, again.q), (inputs.v, again.v), (inputs.grad_out, again.grad_out)):
        assert torch.equal(got, expected)
    assert inputs.bias.time_table is not None
    assert again.bias.time_table is not None
    assert torch.equal(inputs.bias.time_table, again.bias.time_table)


# A plan made once.


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_one_plan_serves_many_layers(backend: Backend) -> None:
    case = AttentionCase(name="plan", lengths=(40, 9, 0), num_targets=(4, 0, 0), heads=2)
    inputs, other = make_inputs(case, seed=0), make_inputs(case, seed=1)
    assert inputs.bias is not None
    assert other.bias is not None
    plan = plan_attention(inputs.layout, inputs.mask, bias=inputs.bias, total_rows=49, backend=backend)
    # Another layer: other weights and other tables over the same times.
    tables = replace(other.bias, timestamps=inputs.bias.timestamps)
    for layer in (inputs, replace(other, layout=inputs.layout, bias=tables)):
        planned = run_attention(functools.partial(hstu_attention, backend=backend, plan=plan), layer)
        direct = run_attention(backend_of(backend), layer)
        for name, value in direct.items():
            assert torch.equal(planned[name], value), name


def test_a_plan_without_bias_does_not_drop_the_time_term() -> None:
    """Even a table of one bucket counts: the plan must be refused or the term be added."""
    inputs = make_inputs(AttentionCase(name="plan", lengths=(5,), bias=BiasKind.NONE))
    bias = RelativeBias(None, torch.ones(1, dtype=torch.float64), make_timestamps(inputs.layout, 5))
    plan = plan_attention(inputs.layout, inputs.mask, total_rows=5)
    with_bias = replace(inputs, bias=bias)
    try:
        got = run_attention(functools.partial(hstu_attention, plan=plan), with_bias)["out"]
    except ValueError as error:
        assert "plan" in str(error)  # noqa: PT017
    else:
        assert close(got, attend(with_bias, Backend.REFERENCE))


# Invariants.

INVARIANT_MASKS = {
    "causal": AttentionMask(),
    "window": AttentionMask(max_attn_len=5),
    "semi-local": AttentionMask(max_attn_len=5, global_prefix_len=2, full_attn_tail_len=3),
    "window-targets": AttentionMask(max_attn_len=5, global_prefix_len=2, full_attn_tail_len=3, window_targets=True),
    "sees-history": AttentionMask(max_attn_len=5, contextual_sees_history=True),
}
any_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
any_mask = pytest.mark.parametrize("mask", INVARIANT_MASKS.values(), ids=INVARIANT_MASKS.keys())


def mixed_case(mask: AttentionMask) -> AttentionCase:
    return AttentionCase(
        name="mixed",
        lengths=(40, 12, 0, 37, 150),
        num_targets=(6, 0, 0, 20, 7),
        contextual_seq_len=2,
        heads=2,
        mask=mask,
    )


@any_backend
@any_mask
def test_raising_max_seq_len_changes_nothing_bitwise(mask: AttentionMask, backend: Backend) -> None:
    inputs = make_inputs(mixed_case(mask), torch.float32)
    expected = run_attention(backend_of(backend), inputs)
    for bound in (151, 1000, 2**20):
        got = run_attention(backend_of(backend), replace(inputs, layout=replace(inputs.layout, max_seq_len=bound)))
        for name, value in expected.items():
            assert torch.equal(got[name], value), (name, bound)


@any_backend
@any_mask
def test_a_sequence_alone_equals_itself_in_a_batch(mask: AttentionMask, backend: Backend) -> None:
    case = mixed_case(mask)
    inputs = make_inputs(case)
    assert inputs.bias is not None
    assert inputs.bias.timestamps is not None
    together = attend(inputs, backend)
    offsets = inputs.layout.seq_offsets.tolist()
    assert case.num_targets is not None
    for b, targets in enumerate(case.num_targets):
        rows = slice(offsets[b], offsets[b + 1])
        alone = replace(
            inputs,
            q=inputs.q[rows],
            k=inputs.k[rows],
            v=inputs.v[rows],
            layout=JaggedLayout.from_lengths(
                torch.tensor([case.lengths[b]]), num_targets=torch.tensor([targets]), contextual_seq_len=2
            ),
            bias=replace(inputs.bias, timestamps=inputs.bias.timestamps[rows]),
        )
        assert close(attend(alone, backend), together[rows]), b


@any_backend
@any_mask
def test_permuting_candidates_permutes_outputs(mask: AttentionMask, backend: Backend) -> None:
    case = mixed_case(mask)
    inputs = make_inputs(case)
    bias = inputs.bias
    assert bias is not None
    assert bias.timestamps is not None
    assert case.num_targets is not None
    order = torch.arange(case.total_rows)
    generator = torch.Generator().manual_seed(1)
    for end, targets in zip(inputs.layout.seq_offsets[1:].tolist(), case.num_targets, strict=True):
        order[end - targets : end] = end - targets + torch.randperm(targets, generator=generator)
    assert not torch.equal(order, torch.arange(case.total_rows))
    # Candidates may carry request times of their own.
    times = bias.timestamps + torch.where(order != torch.arange(case.total_rows), torch.arange(case.total_rows), 0)
    inputs = replace(inputs, bias=replace(bias, timestamps=times))
    moved = replace(
        inputs, q=inputs.q[order], k=inputs.k[order], v=inputs.v[order], bias=replace(bias, timestamps=times[order])
    )
    assert close(attend(moved, backend), attend(inputs, backend)[order])


@any_backend
@any_mask
def test_history_never_depends_on_targets(mask: AttentionMask, backend: Backend) -> None:
    inputs = make_inputs(mixed_case(mask))
    bias = inputs.bias
    assert bias is not None
    assert bias.timestamps is not None
    rows = inputs.layout.row_indices(inputs.q.shape[0])
    ends = torch.repeat_interleave(inputs.layout.history_lengths, inputs.layout.seq_lengths)
    history = rows < ends
    other = make_inputs(mixed_case(mask), seed=7)
    keep = history[:, None, None]
    changed = replace(
        inputs,
        q=torch.where(keep, inputs.q, other.q),
        k=torch.where(keep, inputs.k, other.k),
        v=torch.where(keep, inputs.v, other.v),
        bias=replace(bias, timestamps=torch.where(history, bias.timestamps, bias.timestamps + 12_345_678)),
    )
    without = replace(
        inputs,
        q=inputs.q[history],
        k=inputs.k[history],
        v=inputs.v[history],
        layout=inputs.layout.without_targets(),
        bias=replace(bias, timestamps=bias.timestamps[history]),
    )
    expected = attend(inputs, backend)
    assert torch.equal(attend(changed, backend)[history], expected[history])
    assert not close(attend(changed, backend), expected)
    assert close(attend(without, backend), expected[history])


@any_backend
@any_mask
def test_zero_targets_equal_no_targets(mask: AttentionMask, backend: Backend) -> None:
    case = AttentionCase(name="none", lengths=(40, 12, 0, 150), contextual_seq_len=2, heads=2, mask=mask)
    inputs = make_inputs(case)
    zeros = replace(inputs.layout, num_targets=torch.zeros(4, dtype=torch.int64))
    expected = run_attention(backend_of(backend), inputs)
    for name, value in run_attention(backend_of(backend), replace(inputs, layout=zeros)).items():
        assert close(value, expected[name]), name


# The helpers of these tests.


def test_timestamps_are_realistic() -> None:
    layout = JaggedLayout.from_lengths(
        torch.tensor([300, 0, 5]), num_targets=torch.tensor([3, 0, 0]), contextual_seq_len=2
    )
    times = make_timestamps(layout, 305)
    assert times.dtype == torch.int64
    assert 1_500_000_000 < int(times.min()) <= int(times.max()) < 2_500_000_000
    gaps = times[1:297] - times[:296]
    assert bool((gaps >= 0).all())
    assert 5 < int((gaps == 0).sum()) < 100
    assert int((gaps > 3600).sum()) > 5
    assert times[297:300].unique().numel() == 1


def test_poisoned_memory_is_nan_and_heals() -> None:
    like = torch.zeros(3)
    with poisoned_empty():
        made = (torch.empty(2), torch.empty_like(like), like.new_empty(3), torch.empty_strided((2,), (1,)))
        assert all(bool(t.isnan().all()) for t in made)
        assert torch.empty(2, dtype=torch.int64).dtype == torch.int64
    assert torch.empty.__name__ == "empty"
