"""Which implementation serves a call: a pure function of the request and the inputs."""

from __future__ import annotations

from enum import StrEnum


class Backend(StrEnum):
    """Implementations of the operators.

    ``REFERENCE`` is the readable oracle, ``EAGER`` the fast path made of plain PyTorch operations, for CPU training
    and for any device without a kernel of ours. ``AUTO`` takes the fastest one that serves the call.
    """

    AUTO = "auto"
    REFERENCE = "reference"
    EAGER = "eager"


class UnsupportedBackend(ValueError):
    """An explicitly requested backend cannot serve the call; the message says why and what to use instead."""


def resolve_backend(requested: Backend | str) -> Backend:
    """Map a request to the implementation that runs; an explicit request is never replaced by another.

    Raises:
        UnsupportedBackend: the name is unknown.
    """
    try:
        backend = Backend(requested)
    except ValueError:
        names = ", ".join(b.value for b in Backend)
        raise UnsupportedBackend(f"backend: expected one of {names}, got {requested!r}") from None
    return Backend.EAGER if backend is Backend.AUTO else backend
