"""The distinct rows of a request: one place for equal ids, without a sort, and their bytes out of pinned memory."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu_kernels.attention.triton import OLDEST_TRITON, interpreting, triton_release
from hstu_kernels.backend import Backend
from hstu_kernels.dispatch import choose_backend


def choose_places(ids: Tensor, scratch: Tensor) -> Tensor:
    """``[L]`` int32: for each id a place in ``ids`` that holds it, the same one for equal ids.

    Places are written to a table at their ids and read back: of equal ids whichever comes last wins, and no device is
    asked for anything.

    Args:
        ids: ``[L]`` int64 in ``[0, rows)``.
        scratch: ``[rows]`` int32 on the same device, of any content; it changes.
    """
    places = torch.arange(ids.shape[0], dtype=torch.int32, device=ids.device)
    return scratch.scatter_(0, ids, places).gather(0, ids)


def can_read_host_rows(device: torch.device) -> bool:
    """Whether `read_host_rows` serves ``device``: a GPU with Triton, or any beside Triton's interpreter."""
    release = triton_release()
    if release is None or release < OLDEST_TRITON:
        return False
    return device.type == "cuda" or interpreting()


def read_host_rows(data: Tensor, ids: Tensor, chosen: Tensor, count: Tensor) -> Tensor:
    """Rows ``data[ids]`` on the device of ``ids``, which reads them where they lie, each distinct one once.

    Args:
        data: ``[rows, bytes]`` uint8, contiguous, in pinned host memory.
        ids: ``[L]`` int64 in ``[0, rows)``, not checked.
        chosen: ``[L]`` int32 of `choose_places`.
        count: ``[1]`` int64; the number of distinct rows is added.

    Returns:
        ``[L, bytes]`` uint8; row ``i`` is written where ``chosen[i] == i``, so index it by ``chosen``.

    Raises:
        ValueError: ``data`` is not pinned.
        UnsupportedBackend: there is no Triton for the device.
    """
    choose_backend(Backend.TRITON, ids.device)
    if ids.is_cuda and not data.is_pinned():
        raise ValueError("data: expected rows in pinned host memory, which the device can read; call pin_memory()")
    from hstu_kernels.int4.triton.launch import triton_read_rows

    return triton_read_rows(data, ids, chosen, count)
