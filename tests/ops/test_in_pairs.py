"""Which operands may come to registers in words of two columns."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")


def matrix(columns: int) -> torch.Tensor:
    return torch.zeros(5, columns, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("place", "columns", "expected"), [(0, 64, True), (2, 66, True), (1, 66, False), (0, 65, False)]
)
def test_rows_begin_at_words(place: int, columns: int, expected: bool) -> None:
    from hstu_kernels.attention.triton.arguments import in_pairs

    view = matrix(columns)[:, place : place + 64].unflatten(1, (4, 16))
    assert in_pairs((view, None)) is expected
    assert in_pairs((matrix(64).unflatten(1, (4, 16)), view)) is expected


def test_heads_begin_at_words() -> None:
    from hstu_kernels.attention.triton.arguments import in_pairs

    heads = matrix(68).as_strided((5, 4, 16), (68, 17, 1))
    assert not in_pairs((heads,))
