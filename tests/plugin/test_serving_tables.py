"""Tables for serving: what comes out, what is copied, and requests that overlap."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hstu_kernels import UnsupportedBackend
from hstu_kernels.attention.triton import OLDEST_TRITON, interpreting, triton_release
from hstu_kernels.int4 import AddedRows, PackedRows, RowFormat, gather_rows, pack_rows, unpack_rows
from hstu_kernels.int4.distinct import can_read_host_rows
from hstu_plugin import transfers
from hstu_plugin.quantize import quantize
from hstu_plugin.serving_tables import Placement, ServingTable, Transfer, TransferCounts
from hstu_plugin.transfers import usual_transfer
from tests.ops.interpreter import passes_interpreted

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that this PyTorch can use"),
        ],
    ),
]
CASES = Path(__file__).with_name("interpreted_serving.py")
both_devices = pytest.mark.parametrize("device", DEVICES)
both_places = pytest.mark.parametrize("placement", list(Placement))


def dense(rows: int = 60, dim: int = 24) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))


def requests(count: int, rows: int = 60) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, rows, (5 + 17 * (i % 4),), generator=generator) for i in range(count)]


@both_devices
@both_places
@pytest.mark.parametrize("row_format", list(RowFormat))
def test_rows_are_those_of_the_table(device: str, placement: Placement, row_format: RowFormat) -> None:
    packed = pack_rows(dense(), row_format)
    table = ServingTable(packed, device=device, placement=placement, dtype=torch.float32)
    assert (table.num_rows, table.dim, table.nbytes) == (60, 24, packed.nbytes)
    for ids in requests(5):
        out = table(ids)
        assert out.device.type == device
        assert torch.equal(out.cpu(), unpack_rows(packed)[ids])


@both_devices
@both_places
def test_overlapping_requests_do_not_mix(device: str, placement: Placement) -> None:
    packed = pack_rows(dense())
    table = ServingTable(packed, device=device, placement=placement, dtype=torch.float32, in_flight=2)
    asked = requests(9)
    waiting = [table.prefetch(asked[0])]
    answers = []
    for following in [*asked[1:], None]:
        # More prefetches are kept than may be in flight: their rows are their own.
        if following is not None:
            waiting.append(table.prefetch(following))
        if len(waiting) > 3 or following is None:
            answers += [table.rows(one) for one in waiting]
            waiting = []
    for ids, answer in zip(asked, answers, strict=True):
        assert torch.equal(answer.cpu(), unpack_rows(packed)[ids])


@both_devices
def test_only_distinct_rows_are_copied(device: str) -> None:
    packed = pack_rows(dense())
    table = ServingTable(packed, device=device, transfer="copy")
    ids = torch.tensor([5, 3, 5, 5, 9, 3])
    table(ids)
    table(torch.tensor([1]))
    assert table.counts == TransferCounts(requests=2, rows=7, unique_rows=4, bytes=4 * 16 + 7 * 4)
    assert table.reset_counts().requests == 2
    assert table.counts == TransferCounts()


def test_a_dense_table_copies_more() -> None:
    counts = {}
    for name, rows in (("half", dense(60, 512).half()), ("int4", pack_rows(dense(60, 512)))):
        table = ServingTable(rows, dtype=torch.float16)
        out = table(torch.arange(60))
        assert out.shape == (60, 512)
        counts[name] = table.counts.bytes - 60 * 4
    assert counts == {"half": 60 * 1024, "int4": 60 * 260}


@both_places
def test_dense_rows_are_exact(placement: Placement) -> None:
    values = dense()
    table = ServingTable(values, placement=placement, dtype=torch.float32)
    ids = requests(1)[0]
    assert torch.equal(table(ids), values[ids])


@both_devices
@both_places
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_terms_are_added_as_by_the_gather(device: str, placement: Placement, packed: bool) -> None:
    values = unpack_rows(pack_rows(dense()))
    table = ServingTable(
        pack_rows(dense()) if packed else values, device=device, placement=placement, dtype=torch.float32
    )
    ids = torch.arange(20) % 7
    actions = AddedRows(dense(4).to(device), (torch.arange(20) % 5 - 1).to(device))
    positions = AddedRows(dense(30).to(device), torch.arange(20).to(device))
    out = table.rows(table.prefetch(ids), item_scale=3.0, actions=actions, positions=positions)
    expected = gather_rows(
        pack_rows(dense()).to(device),
        ids.to(device),
        item_scale=3.0,
        actions=actions,
        positions=positions,
        dtype=torch.float32,
    )
    assert torch.equal(out, expected)


def test_a_quantised_embedding_is_a_source() -> None:
    embedding = quantize(nn.Embedding(10, 8)).module
    ids = torch.tensor([1, 9])
    assert torch.equal(ServingTable(embedding, dtype=torch.float32)(ids), embedding(ids))  # type: ignore[arg-type]


@both_devices
@both_places
def test_what_goes_beside_the_rows_arrives(device: str, placement: Placement) -> None:
    table = ServingTable(dense(), device=device, placement=placement, dtype=torch.float32, in_flight=1)
    ids = requests(1)[0]
    columns = [torch.arange(3), torch.rand(2, 5), torch.zeros(0, 4), torch.tensor([True]), torch.arange(9).half()]
    first = table.prefetch(ids, beside=columns)
    # The same staging memory again.
    second = table.prefetch(59 - ids, beside=[column.clone().zero_() for column in columns])
    for one, wanted in ((first, ids), (second, 59 - ids)):
        assert torch.equal(table.rows(one).cpu(), dense()[wanted])
    for arrived, column in zip(first.beside, columns, strict=True):
        assert arrived.device.type == device
        assert arrived.dtype == column.dtype
        assert torch.equal(arrived.cpu(), column)
    assert not any(bool(arrived.any()) for arrived in second.beside)


@pytest.mark.skipif((triton_release() or (0,)) < OLDEST_TRITON, reason="the kernels need Triton 3.4")
@pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET is set: run the cases themselves")
def test_a_device_that_reads_in_the_interpreter() -> None:
    passes_interpreted(CASES, seconds=300)


@both_places
def test_an_empty_request(placement: Placement) -> None:
    table = ServingTable(pack_rows(dense()), placement=placement)
    assert table(torch.empty(0, dtype=torch.int64)).shape == (0, 24)


@both_places
def test_int32_ids(placement: Placement) -> None:
    table = ServingTable(pack_rows(dense()), placement=placement)
    ids = requests(1)[0]
    assert torch.equal(table(ids.int()), table(ids))


@both_places
def test_bad_requests_are_refused(placement: Placement) -> None:
    table = ServingTable(pack_rows(dense()), placement=placement)
    for bad in (60, -1):
        with pytest.raises(ValueError, match=r"ids: expected ids in \[0, 59\] for a table of 60 rows, got .* map"):
            table.prefetch(torch.tensor([0, bad]))
    with pytest.raises(TypeError, match=r"ids: expected an int64 or int32 tensor, got torch\.float32"):
        table.prefetch(torch.zeros(3))
    with pytest.raises(ValueError, match=r"ids: expected \[L\], got \(1, 2\)"):
        table.prefetch(torch.zeros(1, 2, dtype=torch.int64))


def test_a_gpu_reads_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for possible in (True, False):
        monkeypatch.setattr(transfers, "can_read_host_rows", lambda _, possible=possible: possible)
        for backend, allowed in (("auto", True), ("triton", True), ("eager", False), ("reference", False)):
            wanted = Transfer.READ if possible and allowed else Transfer.COPY
            assert usual_transfer(gpu, pinned=True, backend=backend) is wanted
            assert usual_transfer(gpu, pinned=False, backend=backend) is Transfer.COPY
            assert usual_transfer(cpu, pinned=True, backend=backend) is Transfer.COPY


@both_devices
def test_the_usual_transfer(device: str) -> None:
    wanted = Transfer.READ if can_read_host_rows(torch.device(device)) and device == "cuda" else Transfer.COPY
    assert ServingTable(pack_rows(dense()), device=device).transfer is wanted
    assert ServingTable(pack_rows(dense()), device=device, placement="device").transfer is Transfer.COPY
    assert ServingTable(pack_rows(dense()), device=device, backend="eager").transfer is Transfer.COPY
    assert ServingTable(pack_rows(dense()), device=device, transfer="copy").transfer is Transfer.COPY


def test_bad_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="placement: expected one of host, device, got 'disk'"):
        ServingTable(pack_rows(dense()), placement="disk")
    with pytest.raises(TypeError, match=r"dtype: expected one of .* got torch\.float64"):
        ServingTable(pack_rows(dense()), dtype=torch.float64)
    with pytest.raises(ValueError, match="transfer: expected one of auto, copy, read, got 'dma'"):
        ServingTable(pack_rows(dense()), transfer="dma")
    with pytest.raises(ValueError, match="transfer: expected auto or copy for a table on the device, got read"):
        ServingTable(pack_rows(dense()), placement="device", transfer="read")
    if not interpreting():
        with pytest.raises(UnsupportedBackend, match="triton"):
            ServingTable(pack_rows(dense()), transfer="read")
    with pytest.raises(ValueError, match="in_flight: expected an int >= 1, got 0"):
        ServingTable(pack_rows(dense()), in_flight=0)
    with pytest.raises(ValueError, match=r"rows: expected packed rows or a dense .* got \(3,\)"):
        ServingTable(torch.zeros(3))
    with pytest.raises(TypeError, match=r"rows: expected PackedRows, .* got list"):
        ServingTable([1])  # type: ignore[arg-type]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that this PyTorch can use")
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_a_gpu_reads_its_rows_itself(packed: bool) -> None:
    values = unpack_rows(pack_rows(dense(4000, 256)))
    rows = pack_rows(dense(4000, 256)) if packed else values
    table = ServingTable(rows, device="cuda", dtype=torch.float32, transfer=Transfer.READ, backend="triton")
    generator = torch.Generator().manual_seed(2)
    asked = [torch.randint(0, 4000, (count,), generator=generator) for count in (1, 3000, 700, 3000, 2)]
    waiting = [table.prefetch(ids, beside=[ids]) for ids in asked]
    for ids, one in zip(asked, waiting, strict=True):
        assert torch.equal(table.rows(one).cpu(), values[ids])
        assert torch.equal(one.beside[0].cpu(), ids)
    assert table.counts.unique_rows == sum(ids.unique().numel() for ids in asked)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that this PyTorch can use")
def test_host_rows_are_pinned_and_copies_run_beside_the_computation() -> None:
    table = ServingTable(pack_rows(dense()), device="cuda", transfer="copy")
    assert table._data.is_pinned()
    handle = table.prefetch(torch.arange(60))
    assert handle.ready is not None
    assert isinstance(handle.table, PackedRows)
    assert handle.table.device.type == "cuda"
