"""Which backend serves tensors of a kind, decided once for each kind."""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
import warnings
from pathlib import Path

import torch
from torch import Tensor

from hstu_kernels.attention.triton import OLDEST_TRITON, interpreting, triton_release
from hstu_kernels.backend import Backend, CallFacts, resolve_backend


def choose_backend(
    requested: Backend | str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    widths: tuple[int | None, int | None] = (None, None),
) -> Backend:
    """`resolve_backend` for tensors on ``device``.

    Args:
        dtype: of what is multiplied, where it is known. widths: ``Dqk`` and ``Dv`` of attention.

    Raises:
        UnsupportedBackend: as `resolve_backend`.
    """
    # Only here does it matter what float32 products may be made of, and it may change at any time.
    exact = dtype == torch.float32 and requested == Backend.AUTO and _exact_products()
    # A compiler traces the decision itself; otherwise it is made once for each kind of call.
    decide = _decide if torch.compiler.is_compiling() else _decided
    return decide(requested, device.type, dtype, *widths, exact)


def product_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What rows ``x`` are multiplied in by weights of ``dtype``; under autocast its own, as in PyTorch's operators."""
    # There is no autocast for "meta", on which models are traced.
    if x.is_meta or torch.float64 in (x.dtype, dtype):
        return dtype
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return dtype


def _exact_products() -> bool:
    # A compiler does not trace the question; "highest" is PyTorch's default.
    return torch.compiler.is_compiling() or torch.get_float32_matmul_precision() == "highest"


def _decide(
    requested: Backend | str,
    device_type: str,
    dtype: torch.dtype | None,
    qk_dim: int | None,
    v_dim: int | None,
    exact_float32: bool,
) -> Backend:
    facts = None
    # Only where it can matter: looking for Triton is not free.
    if requested == Backend.TRITON or (requested == Backend.AUTO and device_type == "cuda"):
        facts = CallFacts(
            device_type=device_type,
            dtype=dtype,
            qk_dim=qk_dim,
            v_dim=v_dim,
            triton_release=triton_release(),
            oldest_triton=OLDEST_TRITON,
            interpreting=interpreting(),
            capability=_capability() if device_type == "cuda" else None,
            exact_float32=exact_float32,
        )
    return resolve_backend(requested, facts)


_decided = functools.lru_cache(maxsize=256)(_decide)


# A compiler cannot trace the search; it may take the answer as it is. It would look through a cache, so that is within.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability() -> tuple[int, int] | None:
    """Compute capability of the current NVIDIA GPU; ``None`` where there is none or Triton could not start a kernel."""
    return _found_capability()


@functools.cache
def _found_capability() -> tuple[int, int] | None:
    # PyTorch names AMD's GPUs "cuda" as well.
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    missing = _missing_tools()
    if missing:
        warnings.warn(
            f"backend: 'auto' takes the eager path, since Triton starts kernels through a small C program and there is "
            f"no {missing}; install it for faster kernels, or set backend='eager' to silence this",
            stacklevel=2,
        )
        return None
    return torch.cuda.get_device_capability()


def _missing_tools() -> str:
    """What Triton would miss to compile its launcher, ``""`` for nothing."""
    if not os.environ.get("CC") and not any(shutil.which(name) for name in ("gcc", "clang", "cc")):
        return "C compiler (gcc or clang)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python.h (package python3-dev or alike)"
    return ""
