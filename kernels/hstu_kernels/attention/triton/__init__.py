"""Fused attention in Triton. This module imports torch alone; `launch` imports Triton when a call asks for it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import torch

from hstu_kernels.attention.triton.schedule import TritonPlan, plan_triton

__all__ = ["OLDEST_TRITON", "TritonPlan", "interpreting", "plan_triton", "triton_release"]

# Older ones compile no named tuple of constants, in which geometry and mask travel, and know no tensor descriptors.
OLDEST_TRITON = (3, 4)


# A compiler cannot trace the search; it may take the answer as it is.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def triton_release() -> tuple[int, int] | None:
    """Major and minor number of the Triton that ``import triton`` would find; ``None`` without one."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        major, minor = importlib.metadata.version("triton").split(".")[:2]
        return int(major), int(minor)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        # Builds under another name are those of nightly PyTorch.
        return OLDEST_TRITON


def interpreting() -> bool:
    """Whether Triton was asked to run kernels in its CPU interpreter, which it decides when kernels are defined."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
