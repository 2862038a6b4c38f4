"""Runs a file of cases in Triton's CPU interpreter, in a process of its own.

Triton reads TRITON_INTERPRET when kernels are defined, so that a process has either interpreted or compiled ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def passes_interpreted(file: str | Path, *, seconds: int = 500) -> None:
    """Fail unless all cases of ``file`` pass in so many ``seconds``, and none is skipped.

    ``file``: its name in the folder of this module, or its path.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)],
        capture_output=True,
        text=True,
        cwd=FOLDER.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
