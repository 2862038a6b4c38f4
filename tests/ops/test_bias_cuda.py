"""The tables' gradients on a GPU, where Hopper's warps add them up: borders of blocks, and the bits of a repeat."""

from __future__ import annotations

import functools
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


def test_the_time_table_repeats_its_bits() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    case = AttentionCase(name="again", lengths=(900, 333, 64), bias=BiasKind.TIME, heads=2, qk_dim=64, v_dim=64)
    inputs = make_inputs(case, torch.bfloat16, device="cuda")
    first, second = (run_attention(attention, inputs) for _ in range(2))
    for key, result in first.items():
        assert torch.equal(second[key], result), key
