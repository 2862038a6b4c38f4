"""Fused attention in Triton. This module imports torch alone; `launch` imports Triton when a call asks for it."""

from __future__ import annotations

import importlib.util
import os

import torch

from hstu_kernels.attention.triton.schedule import TritonPlan, plan_triton

__all__ = ["TritonPlan", "interpreting", "plan_triton", "triton_installed"]


# A compiler cannot trace the search; it may take the answer as it is.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def triton_installed() -> bool:
    """Whether ``import triton`` would find a package."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton was asked to run kernels in its CPU interpreter, which it decides when kernels are defined."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
