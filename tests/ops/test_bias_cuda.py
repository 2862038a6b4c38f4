"""The tables' gradients on a GPU, where Hopper's warps add them up: borders of blocks, and the bits of a repeat."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from hstu_kernels import AttentionMask, hstu_attention
from hstu_kernels.testing import AttentionCase, BiasKind, assert_within_budget, make_inputs, run_attention

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
attention = functools.partial(hstu_attention, backend="triton")

CASES = [
    AttentionCase(name="plain", lengths=(333, 64, 0, 1, 130, 700)),
    AttentionCase(name="targets", lengths=(333, 64, 200), num_targets=(70, 64, 3)),
    AttentionCase(name="context", lengths=(333, 64, 200), contextual_seq_len=5, num_targets=(0, 10, 100)),
    AttentionCase(
        name="context sees", lengths=(300, 129), contextual_seq_len=5, mask=AttentionMask(contextual_sees_history=True)
    ),
    AttentionCase(name="beyond the table", lengths=(333, 128, 65), table_reach=100),
    AttentionCase(name="window", lengths=(500, 190), mask=AttentionMask(max_attn_len=70, full_attn_tail_len=9)),
    AttentionCase(name="few buckets", lengths=(400, 90), num_buckets=3),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_of_the_tables(case: AttentionCase, width: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    case = replace(case, bias=BiasKind.BOTH, heads=2, qk_dim=width, v_dim=width)
    assert_within_budget(attention, make_inputs(case, dtype, device="cuda"), signal=False)


@pytest.fixture(params=[False, True], ids=["usual", "deterministic"])
def deterministic(request: pytest.FixtureRequest) -> Iterator[bool]:
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("width", [64, 128])
def test_bits_repeat(width: int, deterministic: bool) -> None:
    """20 times beside other work on the device: all but the position table's gradient always, that one if asked for."""
    pytest.importorskip("triton", reason="Triton is not installed")
    case = AttentionCase(
        name="again",
        lengths=(1900, 333, 64, 0, 700),
        num_targets=(70, 3, 0, 0, 65),
        bias=BiasKind.BOTH,
        heads=4,
        qk_dim=width,
        v_dim=width,
    )
    inputs = make_inputs(case, torch.bfloat16, device="cuda")
    first = run_attention(attention, inputs)
    beside, load = torch.cuda.Stream(), torch.ones(1 << 24, device="cuda")
    for _ in range(19):
        with torch.cuda.stream(beside):
            for _ in range(8):
                load.sin_()
        for key, result in run_attention(attention, inputs).items():
            if key != "grad of pos_table" or deterministic:
                assert torch.equal(result, first[key]), key


@pytest.mark.parametrize("width", [64, 128])
def test_gradients_in_fixed_point(width: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    case = replace(CASES[1], bias=BiasKind.BOTH, heads=2, qk_dim=width, v_dim=width)
    inputs = make_inputs(case, torch.bfloat16, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        found = run_attention(attention, inputs)["grad of pos_table"]
    finally:
        torch.use_deterministic_algorithms(False)
    usual = run_attention(attention, inputs)["grad of pos_table"]
    torch.testing.assert_close(found, usual, rtol=1e-4, atol=1e-5 * usual.abs().max().item())
