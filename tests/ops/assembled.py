"""What the assembler says of a compiled kernel."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """Registers and bytes of stack of a thread, as the assembler says."""
    # Not above: tests are skipped, not refused, where it is not installed.
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not os.access(tool, os.X_OK):
        pytest.skip("this Triton ships no cuobjdump")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    listing = subprocess.run(
        [str(tool), "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", listing)}
