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
    listing = _asked("cuobjdump", kernel, folder, "--dump-resource-usage")
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", listing)}


def waits_for_products(kernel: Any, folder: Path) -> int:
    """How often the machine code waits for a product of a group of warps.

    Where the assembler cannot keep products in flight it waits for each, and says so nowhere else: results are right.
    """
    return _asked("nvdisasm", kernel, folder, "-c").count("WARPGROUP.DEPBAR")


def _asked(name: str, kernel: Any, folder: Path, option: str) -> str:
    """What a tool of the assembler says of a kernel."""
    # Not above: tests are skipped, not refused, where it is not installed.
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not os.access(tool, os.X_OK):
        pytest.skip(f"this Triton ships no {name}")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    return subprocess.run(
        [str(tool), option, str(cubin)], capture_output=True, text=True, check=True, timeout=60
    ).stdout
