"""The Triton kernels in Triton's CPU interpreter: the cases of `interpreted_*.py`, in processes of their own.

Triton reads TRITON_INTERPRET when kernels are defined, so that a process has either interpreted or compiled ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hstu_kernels.attention.triton import OLDEST_TRITON, triton_release

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    (triton_release() or OLDEST_TRITON) < OLDEST_TRITON, reason="the kernels need Triton 3.4"
)

FOLDER = Path(__file__).parent


@pytest.mark.parametrize(
    "file",
    [
        "interpreted_schedule.py",
        "interpreted_pieces.py",
        "interpreted_triton.py",
        "interpreted_bias.py",
        "interpreted_layer.py",
        "interpreted_layer_operator.py",
    ],
)
def test_kernels_in_the_interpreter(file: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)],
        capture_output=True,
        text=True,
        cwd=FOLDER.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
