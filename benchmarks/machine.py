"""What a row says about where it was taken: device, releases, commit, and the ceilings measured in the same run."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.timing import time_calls
from hstu_plugin._versions import runtime_versions, source_commit


@dataclass(frozen=True, slots=True)
class Ceilings:
    """``matmul_tflops``: a large bf16 product; ``copy_tbs``: a large device copy, bytes read plus bytes written."""

    matmul_tflops: float
    copy_tbs: float


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def provenance(device: torch.device, commit: str | None = None) -> dict[str, str]:
    """The columns every row begins with; ``commit`` for copies of the source without its history."""
    versions = runtime_versions()
    return {
        "taken_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit or source_commit() or "unknown",
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": versions.get("triton", ""),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "",
    }


def measure_ceilings(device: torch.device, *, seconds: float = 0.3) -> Ceilings:
    """Measure both ceilings; on a CPU at sizes that take milliseconds."""
    on_gpu = device.type == "cuda"
    width, size = (8192, 2**30) if on_gpu else (256, 2**22)
    # Random operands: products of zeros draw less power and run faster than real data.
    left, right = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = time_calls([lambda: torch.mm(left, right)], device, seconds=seconds)

    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)], device, seconds=seconds)
    return Ceilings(2 * width**3 / product.p50 / 1e9, 2 * size / copy.p50 / 1e9)
