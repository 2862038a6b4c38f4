"""What the benchmarks of quantised embeddings share: tables, device times, and the copy bandwidth of the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Call, Spread, synchronize, time_calls
from hstu_kernels.int4 import PackedRows, RowFormat

Row = dict[str, Any]
GatherRows = Callable[[Tensor], Tensor]
SECTOR_BYTES = 32
_CHUNK_ROWS = 1 << 20
_QUEUED_CALLS = 48
_ROUNDS = 3
# Some 30 ms of an idle device: longer than the host takes to queue the calls of a round.
_SLEEP_CYCLES = 50_000_000


def device_times(calls: Sequence[Call], device: torch.device) -> Spread:
    """Time of one call on the device, without the gaps that the host leaves between short ones.

    The device sleeps while the host queues a round of calls, each between two events. On a CPU the host's clock.
    """
    if device.type != "cuda":
        return time_calls(calls, device, seconds=0.05)
    for call in calls:
        call()
    upcoming, marks = cycle(calls), []
    for _ in range(_ROUNDS):
        synchronize(device)
        torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        for call in islice(upcoming, _QUEUED_CALLS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            marks.append((begin, end))
    synchronize(device)
    return Spread.of([begin.elapsed_time(end) for begin, end in marks])


def copy_bandwidth(device: torch.device, size: int) -> float:
    """GB/s of a copy of ``size`` random bytes within the device's memory, read plus written."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / device_times([lambda: target.copy_(source)], device).p50 / 1e6


def random_table(rows: int, dim: int, device: torch.device, row_format: RowFormat = RowFormat.INT4) -> PackedRows:
    """Packed rows of random codes, made where they lie; every scale 0.01 and bias -0.08.

    On a CPU beside a GPU in pinned memory. There the codes of a large table repeat, as random bytes take a CPU long.
    """
    pinned = device.type == "cpu" and torch.cuda.is_available()
    data = torch.empty(rows, row_format.row_bytes(dim), dtype=torch.uint8, device=device, pin_memory=pinned)
    tail = torch.tensor([0.01, -0.08], dtype=torch.float16).view(torch.uint8).to(device)
    first = data[: min(rows, _CHUNK_ROWS if device.type == "cuda" else _CHUNK_ROWS // 16)]
    for begin in range(0, rows, max(1, first.shape[0])):
        part = data[begin : begin + first.shape[0]]
        if begin == 0 or device.type == "cuda":
            part.random_(0, 256)
            part[:, -tail.numel() :] = tail
        else:
            part.copy_(first[: part.shape[0]])
    return PackedRows(data, dim, row_format)


def sector_bytes(ids: Tensor, row_bytes: int, width: int) -> int:
    """Bytes that a device moves to read the first ``width`` bytes of rows ``ids [L]``: sectors are read as a whole."""
    begin = ids.to(torch.int64) * row_bytes
    sectors = (begin + width - 1) // SECTOR_BYTES - begin // SECTOR_BYTES + 1
    return SECTOR_BYTES * int(sectors.sum())


def expect_close(name: str, got: Tensor, expected: Tensor, allowed: float) -> None:
    """Refuse to report on wrong numbers.

    Raises:
        RuntimeError: a number is off by more than ``allowed``.
    """
    # Written so that NaN fails.
    if not bool(((got.float() - expected.float()).abs() <= allowed).all()):
        raise RuntimeError(f"{name}: the numbers are not those of the definition; nothing is reported")
