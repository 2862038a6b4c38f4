"""What `test_int4_triton.py` runs in a process of its own, with TRITON_INTERPRET=1 from its start."""

from __future__ import annotations

import os

import pytest
import torch

from hstu_kernels import UnsupportedBackend
from hstu_kernels.int4 import AddedRows, PackedRows, RowFormat, gather_rows
from hstu_kernels.int4.triton import launch
from hstu_kernels.int4.triton.shape import GatherTile, gather_shape
from hstu_kernels.testing import poisoned_empty
from tests.ops.int4_cases import GATHER_CASES, GatherCase, gather_inputs, gather_oracle

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_int4_triton.py"
torch.set_num_threads(1)

SERVED = [case for case in GATHER_CASES if case.format is not RowFormat.FP8]


def gathered(case: GatherCase, dtype: torch.dtype) -> torch.Tensor:
    inputs = gather_inputs(case)
    with poisoned_empty():
        return gather_rows(inputs.table, inputs.ids, dtype=dtype, backend="triton", **inputs.keywords())  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", SERVED, ids=str)
def test_the_same_bits_as_the_definition(case: GatherCase, dtype: torch.dtype) -> None:
    assert torch.equal(gathered(case, dtype), gather_oracle(gather_inputs(case), dtype))


@pytest.mark.parametrize("case", SERVED[::3], ids=str)
@pytest.mark.parametrize("words", [1, 2, 4, 8])
def test_other_tiles(case: GatherCase, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = gather_inputs(case)
    tile = GatherTile(units=64, words=words)
    monkeypatch.setattr(launch, "gather_shape", lambda table, _: gather_shape(table, tile))
    with poisoned_empty():
        out = gather_rows(inputs.table, inputs.ids, dtype=torch.float32, backend="triton", **inputs.keywords())  # type: ignore[arg-type]
    assert torch.equal(out, gather_oracle(inputs, torch.float32))


def test_bfloat16_is_written() -> None:
    # The interpreter cuts bfloat16 off where hardware rounds: the upper half of the float32 bits.
    exact = gather_oracle(gather_inputs(SERVED[1]), torch.float32)
    assert torch.equal(gathered(SERVED[1], torch.bfloat16).view(torch.int16), (exact.view(torch.int32) >> 16).short())


@pytest.mark.parametrize(
    ("dim", "row_format", "unit"),
    [
        (32, "int4", 4),
        (7, "int4", 4),
        (12, "int4", 2),
        (50, "int4", 1),
        (20, "int8", 4),
        (14, "int8", 2),
        (13, "int8", 1),
    ],
)
def test_rows_are_read_in_the_widest_unit_that_fits(dim: int, row_format: str, unit: int) -> None:
    width = RowFormat(row_format).row_bytes(dim)
    assert (
        gather_shape(PackedRows(torch.zeros(4, width, dtype=torch.uint8), dim, RowFormat(row_format))).unit_bytes
        == unit
    )
    # One byte behind a boundary nothing but bytes is left.
    shifted = torch.zeros(4 * width + 1, dtype=torch.uint8)[1:].view(4, width)
    assert gather_shape(PackedRows(shifted, dim, RowFormat(row_format))).unit_bytes == 1


def test_a_table_that_lies_off_the_boundary() -> None:
    inputs = gather_inputs(SERVED[0])
    moved = (
        torch.empty(inputs.table.nbytes + 1, dtype=torch.uint8)[1:].view_as(inputs.table.data).copy_(inputs.table.data)
    )
    table = PackedRows(moved, inputs.table.dim)
    out = gather_rows(table, inputs.ids, dtype=torch.float32, backend="triton", **inputs.keywords())  # type: ignore[arg-type]
    assert torch.equal(out, gather_oracle(inputs, torch.float32))


def test_strided_ids_and_tables() -> None:
    inputs = gather_inputs(SERVED[0])
    wide = torch.randn(6, 64)
    actions = AddedRows(wide[:, ::2], torch.arange(134)[::2] % 6)
    ids = torch.stack([inputs.ids, inputs.ids], 1)[:, 0]
    assert not ids.is_contiguous()
    arguments = {"actions": actions, "dtype": torch.float32}
    by_kernel = gather_rows(inputs.table, ids, backend="triton", **arguments)  # type: ignore[arg-type]
    assert torch.equal(by_kernel, gather_rows(inputs.table, ids, backend="eager", **arguments))  # type: ignore[arg-type]


def test_unchecked_ids_outside_give_rows_of_nan() -> None:
    inputs = gather_inputs(SERVED[0])
    ids = inputs.ids.clone()
    ids[3], ids[5], ids[6] = 40, -1, 2**40
    actions = AddedRows(torch.ones(4, 32), torch.arange(67) % 7 - 2)
    arguments = {"actions": actions, "dtype": torch.float32, "check_ids": False}
    by_kernel = gather_rows(inputs.table, ids, backend="triton", **arguments)  # type: ignore[arg-type]
    by_definition = gather_rows(inputs.table, ids, backend="eager", **arguments)  # type: ignore[arg-type]
    assert torch.isnan(by_kernel[[3, 5, 6]]).all()
    assert torch.equal(by_kernel.nan_to_num(99.0), by_definition.nan_to_num(99.0))


def test_fp8_is_refused() -> None:
    inputs = gather_inputs(GATHER_CASES[-1])
    with pytest.raises(UnsupportedBackend, match="triton gathers int4 and int8 rows, got fp8; use backend='eager'"):
        gather_rows(inputs.table, inputs.ids, backend="triton")
