"""What `benchmarks.int4` measures: times by device events, bytes, and the copy bandwidth of the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from hstu_kernels.int4 import AddedRows, PackedRows, RowFormat, gather_rows
from hstu_plugin.serving_tables import ServingTable

Row = dict[str, Any]
_CHUNK_ROWS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Repetitions of a measurement: ``warmup`` runs that do not count, then ``repeats`` that do."""

    warmup: int = 10
    repeats: int = 50


def milliseconds(run: Callable[[], object], device: torch.device, timing: Timing) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile of a run; on a GPU between two device events, without waiting in between."""
    for _ in range(timing.warmup):
        run()
    if device.type == "cuda":
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(timing.repeats)]
        torch.cuda.synchronize(device)
        for begin, end in pairs:
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize(device)
        times = [begin.elapsed_time(end) for begin, end in pairs]
    else:
        times = []
        for _ in range(timing.repeats):
            begin_s = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - begin_s))
    return percentiles(times)


def percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile."""
    low, middle, high = torch.quantile(torch.tensor(times, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8]).double())
    return float(low), float(middle), float(high)


def copy_bandwidth(device: torch.device, timing: Timing, size: int) -> float:
    """GB/s of a copy of ``size`` random bytes within the device's memory, read plus written."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    _, middle, _ = milliseconds(lambda: target.copy_(source), device, timing)
    return 2 * size / middle / 1e6


def random_table(rows: int, dim: int, device: torch.device, row_format: RowFormat = RowFormat.INT4) -> PackedRows:
    """Packed rows of random codes, made where they lie; every scale 0.01 and bias -0.08."""
    data = torch.empty(rows, row_format.row_bytes(dim), dtype=torch.uint8, device=device)
    tail = torch.tensor([0.01, -0.08], dtype=torch.float16).view(torch.uint8).to(device)
    for begin in range(0, rows, _CHUNK_ROWS):
        part = data[begin : begin + _CHUNK_ROWS]
        part.random_(0, 256)
        part[:, -tail.numel() :] = tail
    return PackedRows(data, dim, row_format)


def gather_times(
    device: torch.device,
    *,
    dims: Sequence[int],
    table_rows: int,
    ids: int,
    timing: Timing,
    copy_bytes: int,
    id_sets: int,
) -> Iterator[Row]:
    """Times of the dequantising gather beside the copy bandwidth of the same run, one row for each way to do it.

    Bytes are those the task needs: packed rows read and bfloat16 rows written; ids and added tables do not count.

    Raises:
        RuntimeError: a way gives other numbers than the definition; nothing is reported then.
    """
    generator = torch.Generator(device).manual_seed(0)
    for dim in dims:
        bandwidth = copy_bandwidth(device, timing, copy_bytes)
        table = random_table(table_rows, dim, device)
        # Rotated, so that no run finds the rows of the one before in the cache.
        sets = [torch.randint(0, table_rows, (ids,), device=device, generator=generator) for _ in range(id_sets)]
        needed = ids * (RowFormat.INT4.row_bytes(dim) + 2 * dim)
        for name, way in _ways(table, ids, device).items():
            _check(name, way, table, sets[0])
            upcoming = cycle(sets)
            low, middle, high = milliseconds(lambda way=way, sets=upcoming: way(next(sets)), device, timing)
            speed = needed / middle / 1e6
            yield {
                "op": "gather",
                "way": name,
                "dim": dim,
                "table_rows": table_rows,
                "table_gib": table.nbytes / 2**30,
                "ids": ids,
                "p20_ms": low,
                "p50_ms": middle,
                "p80_ms": high,
                "mb": needed / 1e6,
                "gb_per_s": speed,
                "copy_gb_per_s": bandwidth,
                "share_of_copy": speed / bandwidth,
            }
        del table, sets


def _ways(table: PackedRows, ids: int, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    actions = AddedRows(_dense(8, table.dim, device), torch.arange(ids, device=device) % 8)
    positions = AddedRows(_dense(2048, table.dim, device), torch.arange(ids, device=device) % 2048)
    ways: dict[str, Callable[[Tensor], Tensor]] = {"eager": lambda some: gather_rows(table, some, backend="eager")}
    if device.type == "cuda":
        ways["triton"] = lambda some: gather_rows(table, some, backend="triton")
        ways["triton-action-position"] = lambda some: gather_rows(
            table, some, actions=actions, positions=positions, backend="triton"
        )
    else:
        ways["eager-action-position"] = lambda some: gather_rows(table, some, actions=actions, positions=positions)
    fbgemm = _fbgemm(table)
    if fbgemm is not None:
        ways["fbgemm-tbe"] = fbgemm
    return ways


def _dense(rows: int, dim: int, device: torch.device) -> Tensor:
    return torch.randn(rows, dim, device=device).to(torch.bfloat16)


def _fbgemm(table: PackedRows) -> Callable[[Tensor], Tensor] | None:
    """FBGEMM's INT4 lookup over a copy of the table, where it is installed and knows the device."""
    try:
        from hstu_plugin.adapters.torchrec.quantize import to_tbe
    except ImportError:
        return None
    try:
        lookup = to_tbe({"item": table}, output_dtype=torch.bfloat16)
        probe = torch.zeros(1, dtype=torch.int32, device=table.device)
        lookup(probe, torch.tensor([0, 1], dtype=torch.int32, device=table.device))
    except (RuntimeError, NotImplementedError) as error:
        print(f"FBGEMM's lookup is left out: {str(error).splitlines()[0]}")
        return None
    prepared: dict[int, tuple[Tensor, Tensor]] = {}

    def look_up(ids: Tensor) -> Tensor:
        # Its ids are int32; the conversion is not part of the measurement.
        key = ids.data_ptr()
        if key not in prepared:
            # A bag for each id: its kernel walks through a bag one row after the other.
            prepared[key] = ids.int(), torch.arange(ids.numel() + 1, dtype=torch.int32, device=ids.device)
        out: Tensor = lookup(*prepared[key])
        return out

    return look_up


def _check(name: str, way: Callable[[Tensor], Tensor], table: PackedRows, ids: Tensor) -> None:
    """The first rows against the definition."""
    if name.endswith("action-position"):
        # Its terms are checked by the tests of the operator; here that all is written.
        good = bool(torch.isfinite(way(ids)).all())
    else:
        some = ids[: min(4096, ids.numel())]
        expected = gather_rows(table, some, backend="reference").float()
        # FBGEMM computes in float16 on GPUs; a code more or less is 0.01.
        allowed = 1e-3 if name.startswith("fbgemm") else 0.0
        good = bool(((way(ids)[: some.numel()].float() - expected).abs() <= allowed).all())
    if not good:
        raise RuntimeError(
            f"{name} at dim {table.dim}: the numbers are not those of the definition; nothing is reported"
        )


def host_times(
    device: torch.device, *, dim: int, table_rows: int, ids: int, requests: int, timing: Timing
) -> Iterator[Row]:
    """Tables in host memory: bytes and milliseconds of a request, float16 rows beside INT4 rows.

    ``request_ms`` is one request after the other, each waited for; ``pipelined_ms`` prefetches the next request before
    the rows of this one are taken; ``transfer_ms`` is the copy to the device alone.
    """
    generator = torch.Generator().manual_seed(0)
    asked = [torch.randint(0, table_rows, (ids,), generator=generator) for _ in range(requests)]
    host = torch.device("cpu")
    for name in ("float16", "int4"):
        rows: Tensor | PackedRows
        if name == "int4":
            rows = random_table(table_rows, dim, host)
        else:
            rows = torch.empty(table_rows, dim, dtype=torch.float16)
            for begin in range(0, table_rows, _CHUNK_ROWS):
                rows[begin : begin + _CHUNK_ROWS].uniform_(-0.08, 0.07)
        backend = "triton" if device.type == "cuda" and name == "int4" else "auto"
        table = ServingTable(rows, device=device, backend=backend)
        table(asked[0])
        table.reset_counts()
        serial, pipelined = _serial(table, asked, timing), _pipelined(table, asked, timing)
        counts = table.reset_counts()
        low, middle, high = _transfer(table, asked[0], timing)
        yield {
            "op": "host",
            "way": name,
            "dim": dim,
            "table_rows": table_rows,
            "table_gib": table.nbytes / 2**30,
            "ids": ids,
            "mb": counts.bytes / counts.requests / 1e6,
            "p20_ms": serial[0],
            "p50_ms": serial[1],
            "p80_ms": serial[2],
            "pipelined_ms": pipelined,
            "transfer_p20_ms": low,
            "transfer_ms": middle,
            "transfer_p80_ms": high,
        }
        del table, rows


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _serial(table: ServingTable, asked: Sequence[Tensor], timing: Timing) -> tuple[float, float, float]:
    upcoming = cycle(asked)
    times = []
    for number in range(timing.warmup + timing.repeats):
        begin = time.perf_counter()
        table(next(upcoming))
        _wait(table.device)
        if number >= timing.warmup:
            times.append(1000 * (time.perf_counter() - begin))
    return percentiles(times)


def _pipelined(table: ServingTable, asked: Sequence[Tensor], timing: Timing) -> float:
    """Milliseconds of a request when the next one is prefetched while this one is taken, over all repeats."""
    upcoming = cycle(asked)
    ahead = table.prefetch(next(upcoming))
    _wait(table.device)
    begin = time.perf_counter()
    for _ in range(timing.repeats):
        following = table.prefetch(next(upcoming))
        table.rows(ahead)
        ahead = following
    _wait(table.device)
    return 1000 * (time.perf_counter() - begin) / timing.repeats


def _transfer(table: ServingTable, ids: Tensor, timing: Timing) -> tuple[float, float, float]:
    distinct = torch.unique(ids).numel()
    size = distinct * table.nbytes // table.num_rows
    packed = torch.randint(0, 256, (size,), dtype=torch.uint8, pin_memory=table.device.type == "cuda")
    there = torch.empty(size, dtype=torch.uint8, device=table.device)
    return milliseconds(lambda: there.copy_(packed, non_blocking=True), table.device, timing)
