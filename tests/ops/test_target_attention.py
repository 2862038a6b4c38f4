"""hstu_target_attention: cached candidates equal the target rows of the full attention, however they are split."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hstu_kernels import AttentionMask, Backend, JaggedLayout, LayerKV, hstu_attention, hstu_target_attention
from hstu_kernels.testing import (
    ATTENTION_CASES,
    AttentionCase,
    AttentionInputs,
    BiasKind,
    make_inputs,
    poisoned_empty,
    split_targets,
)

BACKENDS = [Backend.REFERENCE, Backend.EAGER]
CASES = [case for case in ATTENTION_CASES if case.num_targets is not None] + [
    AttentionCase(name=f"bias-{kind}", lengths=(30, 7, 2), num_targets=(8, 0, 2), heads=2, bias=kind, table_reach=12)
    for kind in BiasKind
]
any_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)


def full(inputs: AttentionInputs) -> Tensor:
    return hstu_attention(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.layout,
        inputs.mask,
        alpha=inputs.alpha,
        scale=inputs.scale,
        bias=inputs.bias,
        backend=Backend.REFERENCE,
    )


def cached(inputs: AttentionInputs, backend: Backend, micro_batch_size: int | None) -> tuple[Tensor, Tensor]:
    """Rows of the targets in the full tensors, and their outputs, micro-batch by micro-batch."""
    rows, outputs = [], []
    for part in split_targets(inputs, micro_batch_size):
        rows.append(part.rows)
        outputs.append(
            hstu_target_attention(
                part.q,
                part.k,
                part.v,
                part.cache,
                part.layout,
                inputs.mask,
                alpha=inputs.alpha,
                scale=inputs.scale,
                bias=part.bias,
                backend=backend,
            )
        )
    return torch.cat(rows), torch.cat(outputs)


@any_backend
@pytest.mark.parametrize("micro_batch_size", [1, 3, 7, None], ids=lambda n: f"micro-batch-{n or 'all'}")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_full_attention(case: AttentionCase, micro_batch_size: int | None, backend: Backend) -> None:
    inputs = make_inputs(case)
    with poisoned_empty():
        rows, got = cached(inputs, backend, micro_batch_size)
    assert case.num_targets is not None
    assert rows.numel() == sum(case.num_targets)
    expected = full(inputs)[rows]
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)


@any_backend
def test_candidates_may_ask_at_different_times(backend: Backend) -> None:
    inputs = make_inputs(AttentionCase(name="times", lengths=(20, 9), num_targets=(6, 3), heads=2))
    assert inputs.bias is not None
    assert inputs.bias.timestamps is not None
    times = inputs.bias.timestamps + torch.arange(29) ** 3 * (inputs.layout.positions(29) >= 6)
    inputs = replace(inputs, bias=replace(inputs.bias, timestamps=times))
    rows, got = cached(inputs, backend, 2)
    assert torch.allclose(got, full(inputs)[rows], rtol=0, atol=1e-12)


@any_backend
def test_permuting_candidates_permutes_outputs(backend: Backend) -> None:
    inputs = make_inputs(AttentionCase(name="order", lengths=(30,), num_targets=(9,), heads=2))
    (part,) = split_targets(inputs)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    options = {"alpha": inputs.alpha, "scale": inputs.scale, "backend": backend}

    def score(chosen: Tensor) -> Tensor:
        assert part.bias is not None
        assert part.bias.row_timestamps is not None
        asked = part.bias.row_timestamps + torch.arange(9) * 1000
        bias = replace(part.bias, row_timestamps=asked[chosen])
        return hstu_target_attention(
            part.q[chosen], part.k[chosen], part.v[chosen], part.cache, part.layout, inputs.mask, bias=bias, **options
        )  # type: ignore[arg-type]

    assert torch.allclose(score(order), score(torch.arange(9))[order], rtol=0, atol=1e-12)


@any_backend
def test_cache_is_left_alone(backend: Backend) -> None:
    inputs = make_inputs(AttentionCase(name="cache", lengths=(30, 4), num_targets=(9, 1), heads=2))
    (part,) = split_targets(inputs)
    before = part.cache.k.clone(), part.cache.v.clone()
    cached(inputs, backend, None)
    assert torch.equal(part.cache.k, before[0])
    assert torch.equal(part.cache.v, before[1])


@any_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_in_the_budget(dtype: torch.dtype, backend: Backend) -> None:
    case = AttentionCase(name="low", lengths=(111, 63, 40), num_targets=(20, 5, 33), heads=2, qk_dim=16, v_dim=16)
    inputs = make_inputs(case, dtype)
    rows, got = cached(inputs, backend, 8)
    truth = full(inputs.to(torch.float64))[rows]
    largest = float(truth.abs().max())
    budget = 2 * float((full(inputs)[rows].double() - truth).abs().max()) + torch.finfo(dtype).eps * largest
    assert got.dtype == dtype
    assert largest > 10 * budget
    assert float((got.double() - truth).abs().max()) <= budget


@any_backend
@pytest.mark.parametrize(
    "mask", [AttentionMask(), AttentionMask(max_attn_len=2, window_targets=True)], ids=["full", "window"]
)
def test_gradients_reach_cache_tables_and_targets(mask: AttentionMask, backend: Backend) -> None:
    inputs = make_inputs(
        AttentionCase(
            name="grad",
            lengths=(7, 3),
            num_targets=(3, 1),
            qk_dim=2,
            v_dim=2,
            mask=mask,
            # Each entry of a table costs two evaluations.
            table_reach=5,
            num_buckets=9,
        )
    )
    (part,) = split_targets(inputs)
    bias = part.bias
    assert bias is not None

    def call(q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, pos: Tensor, time: Tensor) -> Tensor:
        return hstu_target_attention(
            q,
            k,
            v,
            replace(part.cache, k=cache_k, v=cache_v),
            part.layout,
            mask,
            alpha=inputs.alpha,
            scale=inputs.scale,
            bias=replace(bias, pos_table=pos, time_table=time),
            backend=backend,
        )

    leaves = (part.q, part.k, part.v, part.cache.k, part.cache.v, bias.pos_table, bias.time_table)
    assert torch.autograd.gradcheck(call, [t.clone().requires_grad_() for t in leaves if t is not None])


@any_backend
def test_no_users(backend: Backend) -> None:
    nobody = JaggedLayout.from_lengths(torch.tensor([], dtype=torch.int64))
    x = torch.zeros(0, 2, 3)
    out = hstu_target_attention(
        x, x, x, LayerKV(x, x, nobody), nobody, AttentionMask(), alpha=1, scale=1, backend=backend
    )
    assert out.shape == (0, 2, 3)
