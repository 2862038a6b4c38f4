"""The named cases through the Triton kernels on a GPU, by the budget rule."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from hstu_kernels import hstu_attention
from hstu_kernels.testing import ATTENTION_CASES, AttentionCase, assert_within_budget, make_inputs

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that this PyTorch can use"),
]

attention = functools.partial(hstu_attention, backend="triton")


def wide(case: AttentionCase) -> AttentionCase:
    """``case`` with heads of at least 16 columns, as the kernels want them."""
    return replace(case, qk_dim=max(16, 4 * case.qk_dim), v_dim=max(16, 4 * case.v_dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_stays_in_the_budget(case: AttentionCase, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    assert_within_budget(attention, make_inputs(wide(case), dtype, device="cuda"), signal=False)
