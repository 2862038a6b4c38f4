"""What `test_serving_tables.py` runs in a process of its own, with TRITON_INTERPRET=1 from its start."""

from __future__ import annotations

import os

import pytest
import torch

from hstu_kernels.int4 import RowFormat, pack_rows, unpack_rows
from hstu_plugin.mfalcon_serving import MFalconServer
from hstu_plugin.serving_tables import ServingTable, TransferCounts

from .test_mfalcon_serving import expected, make_model, make_request
from .test_serving_tables import dense, requests

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_serving_tables.py"
torch.set_num_threads(1)


@pytest.mark.parametrize("row_format", list(RowFormat))
def test_rows_that_the_device_reads(row_format: RowFormat) -> None:
    packed = pack_rows(dense(), row_format)
    table = ServingTable(packed, dtype=torch.float32, transfer="read")
    assert table.counts == TransferCounts()
    for ids in (*requests(5), torch.empty(0, dtype=torch.int64), torch.tensor([3, 3], dtype=torch.int32)):
        assert torch.equal(table(ids), unpack_rows(packed)[ids])


def test_dense_rows_that_the_device_reads() -> None:
    table = ServingTable(dense(), dtype=torch.float32, transfer="read")
    waiting = [(ids, table.prefetch(ids, beside=[ids.float()])) for ids in requests(4)]
    for ids, one in waiting:
        assert torch.equal(table.rows(one), dense()[ids])
        assert torch.equal(one.beside[0], ids.float())


def test_only_distinct_rows_are_read() -> None:
    table = ServingTable(pack_rows(dense()), transfer="read")
    table(torch.tensor([5, 3, 5, 5, 9, 3]))
    table(torch.tensor([1]))
    # Ids travel as they are.
    assert table.counts == TransferCounts(requests=2, rows=7, unique_rows=4, bytes=4 * 16 + 7 * 8)
    assert table.reset_counts().unique_rows == 4
    assert table.counts == TransferCounts()


def test_a_server_whose_device_reads() -> None:
    model = make_model()
    asked = [make_request(model, seed) for seed in range(3)]
    wanted = [expected(model, request, "cpu") for request in asked]
    with MFalconServer.from_model(model, micro_batch_size=3, transfer="read") as server:
        for ours, theirs in zip(server.stream(asked), wanted, strict=True):
            assert torch.equal(ours, theirs)
