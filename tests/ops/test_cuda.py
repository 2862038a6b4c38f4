"""The named cases on a GPU: the same rules as on the CPU, and both devices agree."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from hstu_kernels import hstu_attention
from hstu_kernels.testing import (
    ATTENTION_CASES,
    AttentionCase,
    assert_equals_oracle,
    assert_within_budget,
    make_inputs,
    run_attention,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that this PyTorch can use"),
]

eager = functools.partial(hstu_attention, backend="eager")
cases = pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)


@cases
def test_equals_oracle_in_fp64(case: AttentionCase) -> None:
    assert_equals_oracle(eager, make_inputs(case, torch.float64, device="cuda"))


@cases
def test_bfloat16_stays_in_the_budget(case: AttentionCase) -> None:
    # Not float32: there both sides are the library's matrix products, whose last bits depend on the kernel it picks
    # for a shape; that the algorithm is right in every bit that matters is what fp64 shows.
    if case.total_rows:
        assert_within_budget(eager, make_inputs(case, torch.bfloat16, device="cuda"), signal=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@cases
def test_triton_stays_in_the_budget(case: AttentionCase, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    widths = {"qk_dim": max(16, 4 * case.qk_dim), "v_dim": max(16, 4 * case.v_dim)}
    inputs = make_inputs(replace(case, **widths), dtype, device="cuda")
    assert_within_budget(functools.partial(hstu_attention, backend="triton"), inputs, signal=False)


@cases
def test_devices_agree(case: AttentionCase) -> None:
    on_cpu = run_attention(eager, make_inputs(case, torch.float64))
    on_gpu = run_attention(eager, make_inputs(case, torch.float64, device="cuda"))
    for name, expected in on_cpu.items():
        torch.testing.assert_close(on_gpu[name].cpu(), expected, rtol=1e-11, atol=1e-11, msg=name)
