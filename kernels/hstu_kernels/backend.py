"""Which implementation serves a call: a pure function of the request and the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch


class Backend(StrEnum):
    """Implementations of the operators.

    ``REFERENCE`` is the readable oracle, ``EAGER`` the fast path made of plain PyTorch operations, for CPU training
    and for any device without a kernel of ours. ``TRITON`` is the kernels for NVIDIA GPUs. ``AUTO`` takes the kernels
    where they serve the call and pay (`resolve_backend`), and the eager path everywhere else.
    """

    AUTO = "auto"
    REFERENCE = "reference"
    EAGER = "eager"
    TRITON = "triton"


class UnsupportedBackend(ValueError):
    """An explicitly requested backend cannot serve the call; the message says why and what to use instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFacts:
    """What decides whether a backend can serve a call; ``None`` where it is not known yet.

    Attributes:
        device_type: of the tensors, as ``torch.device.type``.
        dtype: of q, k and v.
        qk_dim, v_dim: ``Dqk``, ``Dv``.
        triton_release: major and minor number of the Triton package; ``None`` where there is none.
        oldest_triton: that the kernels are written for.
        interpreting: Triton runs kernels in its CPU interpreter.
        capability: compute capability of the NVIDIA GPU; ``None`` without one.
        exact_float32: products of float32 are asked for in full precision (``"highest"``, PyTorch's default).
    """

    device_type: str
    dtype: torch.dtype | None = None
    qk_dim: int | None = None
    v_dim: int | None = None
    triton_release: tuple[int, int] | None = None
    oldest_triton: tuple[int, int] = (0, 0)
    interpreting: bool = False
    capability: tuple[int, int] | None = None
    exact_float32: bool = False


# Looked up, not constructed: torch 2.6 cannot compile the construction of an enum.
_BY_NAME = {backend.value: backend for backend in Backend}
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_WIDTHS = range(16, 257)
# Hopper: where the kernels ran and were timed. For others they are compiled in the tests, and run on request.
MEASURED_CAPABILITIES = ((9, 0),)
# Wider heads are multiplied without tensor cores where float32 products must be exact; cuBLAS is faster at that.
WIDEST_EXACT = 64


def resolve_backend(requested: Backend | str, facts: CallFacts | None = None) -> Backend:
    """Map a request to the implementation that runs; an explicit request is never replaced by another.

    ``AUTO`` is ``TRITON`` on NVIDIA GPUs that the kernels were measured on (Hopper), in a dtype and head widths that
    they serve, but for float32 products in full precision with heads wider than 64. Otherwise it is ``EAGER``.
    Without ``facts`` only the name is looked at, and ``AUTO`` is ``EAGER``.

    Raises:
        UnsupportedBackend: the name is unknown, or the backend cannot serve a call of these facts.
    """
    backend = requested if isinstance(requested, Backend) else _BY_NAME.get(requested)
    if backend is None:
        raise UnsupportedBackend(f"backend: expected one of {', '.join(_BY_NAME)}, got {requested!r}")
    if backend is Backend.AUTO:
        return Backend.TRITON if facts is not None and _triton_pays(facts) else Backend.EAGER
    if backend is Backend.TRITON and facts is not None:
        obstacle = _triton_obstacle(facts)
        if obstacle:
            raise UnsupportedBackend(f"backend: triton {obstacle}; use backend='eager'")
    return backend


def _triton_pays(facts: CallFacts) -> bool:
    if facts.device_type != "cuda" or facts.capability not in MEASURED_CAPABILITIES:
        return False
    if facts.dtype is None or _triton_obstacle(facts):
        return False
    widest = max(facts.qk_dim or 0, facts.v_dim or 0)
    return not (facts.dtype == torch.float32 and facts.exact_float32 and widest > WIDEST_EXACT)


def _triton_obstacle(facts: CallFacts) -> str | None:
    if facts.triton_release is None:
        return "is not installed"
    if facts.triton_release < facts.oldest_triton:
        oldest, found = (".".join(map(str, release)) for release in (facts.oldest_triton, facts.triton_release))
        return f"is too old: expected release {oldest} or newer, got {found}"
    if facts.interpreting:
        if facts.dtype == torch.bfloat16:
            return "cannot compute in torch.bfloat16 in its interpreter"
    elif facts.device_type != "cuda":
        return f"needs tensors on an NVIDIA GPU, got {facts.device_type}"
    if facts.dtype is not None and facts.dtype not in TRITON_DTYPES:
        return f"serves float32, bfloat16 and float16, got {facts.dtype}"
    for name, width in (("Dqk", facts.qk_dim), ("Dv", facts.v_dim)):
        if width is not None and width not in TRITON_WIDTHS:
            return f"serves head widths of 16 to 256, got {name} {width}"
    return None
