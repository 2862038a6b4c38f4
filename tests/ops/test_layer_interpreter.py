"""The bias and the rest of the layer in Triton's CPU interpreter; a file of its own, for another process."""

from __future__ import annotations

import pytest

from hstu_kernels.attention.triton import OLDEST_TRITON, triton_release
from tests.ops.interpreter import passes_interpreted

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    (triton_release() or OLDEST_TRITON) < OLDEST_TRITON, reason="the kernels need Triton 3.4"
)


@pytest.mark.parametrize("file", ["interpreted_bias.py", "interpreted_layer.py", "interpreted_layer_operator.py"])
def test_layers_in_the_interpreter(file: str) -> None:
    passes_interpreted(file)
