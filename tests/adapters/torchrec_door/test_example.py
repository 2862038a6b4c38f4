"""The documented example runs, learns, and the swap is a handful of lines."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from .training import ROOT, environment

SCRIPT = ROOT / "examples" / "torchrec_two_tower.py"


def test_the_swap_is_a_handful_of_lines() -> None:
    marked = [line for line in SCRIPT.read_text(encoding="utf-8").splitlines() if "# HSTU:" in line]
    assert 1 <= len(marked) <= 7


@pytest.mark.slow
def test_both_towers_learn() -> None:
    last = {}
    for tower in ("mlp", "hstu"):
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "--tower", tower, "--steps", "120"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        first, last[tower] = map(float, re.findall(r"(\d+\.\d+) at", done.stdout))
        assert last[tower] < 0.9 * first, done.stdout
    # The order of the items decides, and only one tower sees it.
    assert last["hstu"] < last["mlp"]
