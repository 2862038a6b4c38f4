"""The attention kernels in Triton's CPU interpreter: the cases of `interpreted_*.py`."""

from __future__ import annotations

import pytest

from hstu_kernels.attention.triton import OLDEST_TRITON, triton_release
from tests.ops.interpreter import passes_interpreted

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    (triton_release() or OLDEST_TRITON) < OLDEST_TRITON, reason="the kernels need Triton 3.4"
)


@pytest.mark.parametrize(
    "file", ["interpreted_schedule.py", "interpreted_pieces.py", "interpreted_targets.py", "interpreted_triton.py"]
)
def test_kernels_in_the_interpreter(file: str) -> None:
    passes_interpreted(file)
