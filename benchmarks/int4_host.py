"""Measurements of requests whose item rows lie in host memory, alone and with M-FALCON behind them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.int4_measure import Row, device_times, expect_close, random_table
from benchmarks.mfalcon import make_config
from benchmarks.timing import Spread, synchronize
from hstu_kernels import Backend, JaggedLayout
from hstu_kernels.int4 import PackedRows, gather_rows
from hstu_kernels.int4.distinct import can_read_host_rows
from hstu_plugin.events import Events
from hstu_plugin.feature_tables import FeatureTables
from hstu_plugin.mfalcon_serving import MFalconServer, ServingRequest
from hstu_plugin.ranking_config import Categorical, RankingConfig, RankingFeatures, TaskConfig, TokenForm
from hstu_plugin.ranking_model import RankingModel
from hstu_plugin.serving_tables import ServingTable, Transfer

_FEWEST, _MOST = 5, 200
_EPOCH = 1_700_000_000
_BLOCK_ROWS = 1 << 14
_USER = "user"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCase:
    """What is asked for.

    Attributes:
        dim: width of the rows. table_rows: of the item table. ids: candidates of a request. requests: different ones.
        history: events of the user, in the cache. layers: of each model that scores. backend: of attention and gather.
    """

    dim: int
    table_rows: int
    ids: int
    requests: int
    history: int
    layers: Sequence[int]
    backend: str


def host_times(device: torch.device, case: HostCase, *, seconds: float) -> Iterator[Row]:
    """Requests of random ids from a float16 and an int4 table in host memory, serially and overlapped.

    ``float16`` and ``int4``: the CPU gathers rows for a copy; with ``-read`` the device reads them, where it can.
    ``p50_ms`` is a request alone, from ids on the CPU to rows (of ``mfalcon-*``: scores) on the device;
    ``pipelined_ms`` the time for each when the next rows are fetched meanwhile; ``transfer_ms`` the copy of its bytes
    alone; ``mb`` those bytes. On a GPU, M-FALCON scores from CUDA graphs.

    Raises:
        RuntimeError: rows or scores are not those of the definition; nothing is reported then.
    """
    generator = torch.Generator().manual_seed(0)
    asked = [torch.randint(0, case.table_rows, (case.ids,), generator=generator) for _ in range(case.requests)]
    transfers = [Transfer.COPY]
    if can_read_host_rows(device) and case.backend == Backend.TRITON:
        transfers.append(Transfer.READ)
    tables: dict[str, PackedRows | Tensor] = {"float16": _dense_table(case), "int4": _packed_table(case)}
    for transfer in transfers:
        for name, rows in tables.items():
            way = name if transfer is Transfer.COPY else f"{name}-{transfer}"
            yield from _way_times(way, rows, transfer, asked, device, case, seconds)


def _way_times(
    way: str,
    rows: PackedRows | Tensor,
    transfer: Transfer,
    asked: Sequence[Tensor],
    device: torch.device,
    case: HostCase,
    seconds: float,
) -> Iterator[Row]:
    table = ServingTable(rows, device=device, placement="host", backend=case.backend, in_flight=3, transfer=transfer)
    _check_rows(way, table, rows, asked[0])
    table.reset_counts()
    serial = _serial(table, asked, device, seconds)
    overlapped = _overlapped(lambda some: _rows_ahead(table, some), asked, device, seconds)
    counts = table.reset_counts()
    moved = counts.bytes / counts.requests
    copied = _transfer(int(moved), device)
    common = {
        "dim": case.dim,
        "table_rows": case.table_rows,
        "table_gib": table.nbytes / 2**30,
        "ids": case.ids,
        "mb": moved / 1e6,
        "transfer_p20_ms": copied.p20,
        "transfer_ms": copied.p50,
        "transfer_p80_ms": copied.p80,
    }
    yield {"op": "host", "way": way, **common, **_three(serial), "pipelined_ms": overlapped, "layers": 0}
    for layers in case.layers:
        with _server(table, layers, case, device) as server:
            requests = [_request(ids, case) for ids in asked]
            _check_scores(way, server, requests)
            serial = _serial(server.score, requests, device, seconds)
            overlapped = _overlapped(server.stream, requests, device, seconds)
        yield {
            "op": "host", "way": f"mfalcon-{way}", **common, **_three(serial), "pipelined_ms": overlapped,
            "layers": layers,
        }  # fmt: skip


def _packed_table(case: HostCase) -> PackedRows:
    return random_table(case.table_rows, case.dim, torch.device("cpu"))


def _dense_table(case: HostCase) -> Tensor:
    """Random numbers of the range of the packed table; a block that repeats, as making gigabytes takes a CPU long."""
    block = (torch.rand(min(_BLOCK_ROWS, case.table_rows), case.dim) * 0.15 - 0.08).half()
    out = torch.empty(case.table_rows, case.dim, dtype=torch.float16, pin_memory=torch.cuda.is_available())
    for begin in range(0, case.table_rows, block.shape[0]):
        part = out[begin : begin + block.shape[0]]
        part.copy_(block[: part.shape[0]])
    return out


def _check_rows(name: str, table: ServingTable, rows: PackedRows | Tensor, ids: Tensor) -> None:
    if isinstance(rows, PackedRows):
        expected = gather_rows(rows, ids, backend="reference")
    else:
        expected = rows[ids].to(torch.bfloat16)
    expect_close(f"{name} rows", table(ids).cpu(), expected, 0.0)


def _rows_ahead(table: ServingTable, asked: Iterable[Tensor]) -> Iterator[Tensor]:
    """Rows of each request; the next one is on its way when one is taken."""
    ahead = None
    for ids in asked:
        following = table.prefetch(ids)
        if ahead is not None:
            yield table.rows(ahead)
        ahead = following
    if ahead is not None:
        yield table.rows(ahead)


def _server(table: ServingTable, layers: int, case: HostCase, device: torch.device) -> MFalconServer:
    """HSTU of ``layers`` layers whose user is in the cache; the history's rows come from the table as well."""
    features = RankingFeatures(
        items=(Categorical(name="item", num_ids=2),), action_types=("click",), form=TokenForm.SUMMED
    )
    config = make_config("hstu", layers, case.dim, min(4, case.dim), max(1, case.history), case.backend)
    ranking = RankingConfig(tasks=(TaskConfig(name="click"), TaskConfig(name="share")))
    torch.manual_seed(0)
    model = RankingModel(features, config, ranking).to(device, torch.bfloat16).eval()
    with torch.device("meta"):
        # The model's own item rows would take memory and are never read.
        model.embedding.items = FeatureTables((Categorical(name="item", num_ids=case.table_rows),), case.dim)
    server = MFalconServer(model, table, micro_batch_size=case.ids, cuda_graphs=device.type == "cuda")
    ids = torch.randint(0, case.table_rows, (case.history, 1), generator=torch.Generator().manual_seed(1))
    none = ids.new_zeros(case.history, 0)
    history = Events(
        JaggedLayout.from_lengths(torch.tensor([case.history])),
        ids,
        _EPOCH + 60 * torch.arange(case.history),
        torch.arange(case.history) % 2,
        torch.zeros(case.history, 0),
        none,
        none,
    )
    server.prefill([_USER], history)
    return server


def _request(ids: Tensor, case: HostCase) -> ServingRequest:
    layout = JaggedLayout.from_lengths(torch.tensor([ids.numel()]))
    times = torch.full((ids.numel(),), _EPOCH + 60 * case.history + 3600)
    return ServingRequest(candidates=Events.without_actions(layout, ids[:, None], times), cached=[_USER])


def _check_scores(name: str, server: MFalconServer, requests: Sequence[ServingRequest]) -> None:
    """Overlapped requests against requests alone; those are tested against the model (`test_mfalcon_serving.py`)."""
    alone = [server.score(request) for request in requests[:3]]
    for one, ahead in zip(alone, server.stream(requests[:3]), strict=True):
        expect_close(f"{name} scores", ahead, one, 0.0)
    if torch.equal(alone[0], alone[-1]) and len(alone) > 1:
        raise RuntimeError(f"{name} scores: different requests have the same; nothing is reported")


def _serial(run: Callable[[T], object], asked: Sequence[T], device: torch.device, seconds: float) -> Spread:
    upcoming = cycle(asked)
    times: list[float] = []

    def once() -> None:
        one = next(upcoming)
        begin = time.perf_counter()
        run(one)
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin))

    for _ in range(3):
        once()
    for _ in range(_samples(times[-1], seconds)):
        once()
    return Spread.of(times[3:])


def _overlapped(
    run: Callable[[Iterable[T]], Iterator[object]], asked: Sequence[T], device: torch.device, seconds: float
) -> float:
    """Milliseconds of a request, over a stream of them that takes about ``seconds``."""

    def whole(count: int) -> float:
        synchronize(device)
        begin = time.perf_counter()
        for _ in run(islice(cycle(asked), count)):
            pass
        synchronize(device)
        return 1e3 * (time.perf_counter() - begin) / count

    return whole(_samples(whole(_FEWEST), seconds))


def _samples(milliseconds: float, seconds: float) -> int:
    return int(min(max(1e3 * seconds / milliseconds, _FEWEST), _MOST))


def _transfer(size: int, device: torch.device) -> Spread:
    packed = torch.randint(0, 256, (size,), dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(size, dtype=torch.uint8, device=device)
    return device_times([lambda: there.copy_(packed, non_blocking=True)], device)


def _three(spread: Spread) -> Row:
    return {"p20_ms": spread.p20, "p50_ms": spread.p50, "p80_ms": spread.p80}
