"""How rows of a serving table travel to a device, what has travelled, and what a request holds of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from hstu_kernels import Backend
from hstu_kernels.int4 import PackedRows
from hstu_kernels.int4.distinct import can_read_host_rows


class Placement(StrEnum):
    """Where a table lies: ``HOST`` memory, pinned beside a GPU, or the memory of the ``DEVICE``."""

    HOST = "host"
    DEVICE = "device"


class Transfer(StrEnum):
    """How rows of a host table travel.

    ``COPY``: the CPU gathers them, one copy. ``READ``: the device reads them. ``AUTO``: what `usual_transfer` says.
    """

    AUTO = "auto"
    COPY = "copy"
    READ = "read"


def usual_transfer(device: torch.device, *, pinned: bool, backend: Backend | str) -> Transfer:
    """What ``AUTO`` means: a GPU reads rows itself where it can, as that costs a request least.

    Args:
        device: where rows are needed.
        pinned: whether the table lies in pinned host memory.
        backend: of the gather; one that is not Triton says that Triton shall not run.
    """
    allowed = backend in (Backend.AUTO, Backend.TRITON)
    reads = device.type == "cuda" and pinned and allowed and can_read_host_rows(device)
    return Transfer.READ if reads else Transfer.COPY


@dataclass(slots=True)
class TransferCounts:
    """What went from host to device since the table was made or `ServingTable.reset_counts` was called.

    Attributes:
        requests: prefetches.
        rows: ids asked for.
        unique_rows: rows copied.
        bytes: of rows and of what says where they are.
    """

    requests: int = 0
    rows: int = 0
    unique_rows: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Prefetched:
    """Rows on their way; a handle for `ServingTable.rows`, good once or more often, in any order.

    Attributes:
        table: the rows of the request, on the device: packed, or dense.
        ids: ``[L]`` where in ``table`` each row of the request lies.
        beside: the tensors that came along.
        ready: what the device has to wait for; ``None`` where nothing runs in the background.
    """

    table: PackedRows | Tensor
    ids: Tensor
    beside: tuple[Tensor, ...]
    ready: torch.cuda.Event | None

    def wait(self, stream: torch.cuda.Stream) -> None:
        """Let ``stream`` wait until all has arrived."""
        if self.ready is None:
            return
        stream.wait_event(self.ready)
        # Allocated on the copying stream: not to be used again there before this stream is done with them.
        held = self.table.data if isinstance(self.table, PackedRows) else self.table
        for tensor in (held, self.ids, *self.beside):
            tensor.record_stream(stream)
