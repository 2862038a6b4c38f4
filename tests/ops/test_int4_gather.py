"""The dequantising gather: its definition, what is refused, and what unchecked ids do."""

from __future__ import annotations

import pytest
import torch

from hstu_kernels import UnsupportedBackend
from hstu_kernels.int4 import AddedRows, PackedRows, gather_rows, pack_rows, unpack_rows
from hstu_kernels.int4.reference import gather_reference
from hstu_kernels.testing import poisoned_empty
from tests.ops.int4_cases import GATHER_CASES, GatherCase, gather_inputs, gather_oracle

INPUTS = gather_inputs(GatherCase(name="some"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", GATHER_CASES, ids=str)
def test_equals_the_row_by_row_definition(case: GatherCase, dtype: torch.dtype) -> None:
    inputs = gather_inputs(case)
    with poisoned_empty():
        out = gather_rows(inputs.table, inputs.ids, dtype=dtype, **inputs.keywords())  # type: ignore[arg-type]
    assert out.dtype == dtype
    assert torch.equal(out, gather_oracle(inputs, dtype))


def test_bfloat16_is_the_default() -> None:
    assert gather_rows(INPUTS.table, INPUTS.ids).dtype == torch.bfloat16


@pytest.mark.parametrize("case", GATHER_CASES[:3], ids=str)
def test_float32_sums_are_near_those_of_float64(case: GatherCase) -> None:
    inputs = gather_inputs(case)
    added = [(term.table, term.ids) for term in (inputs.actions, inputs.positions) if term is not None]
    arguments = {"item_scale": inputs.item_scale, "added": added, "dtype": torch.float64}
    exact = gather_reference(inputs.table, inputs.ids, precision=torch.float64, **arguments)  # type: ignore[arg-type]
    got = gather_rows(inputs.table, inputs.ids, dtype=torch.float32, **inputs.keywords())  # type: ignore[arg-type]
    assert float((got.double() - exact).abs().max()) <= 4 * 2.0**-24 * float(exact.abs().max())


@pytest.mark.parametrize("bad", [40, -1, -(2**40), 2**40])
def test_ids_outside_are_refused_on_the_cpu(bad: int) -> None:
    ids = INPUTS.ids.clone()
    ids[3] = bad
    with pytest.raises(ValueError, match=r"ids: expected ids in \[0, 39\] for a table of 40 rows, got .*; map unknown"):
        gather_rows(INPUTS.table, ids)
    with pytest.raises(ValueError, match=r"positions\.ids: expected ids in \[-1, 9\] for a table of 10 rows"):
        gather_rows(INPUTS.table, INPUTS.ids, positions=AddedRows(torch.zeros(10, 32), INPUTS.ids))
    with pytest.raises(ValueError, match="for a table of 0 rows"):
        gather_rows(pack_rows(torch.empty(0, 32)), INPUTS.ids)


def test_unchecked_ids_outside_give_rows_of_nan() -> None:
    ids = INPUTS.ids.clone()
    ids[3], ids[5] = 40, -1
    out = gather_rows(INPUTS.table, ids, dtype=torch.float32, check_ids=False)
    right = gather_rows(INPUTS.table, INPUTS.ids, dtype=torch.float32)
    assert torch.isnan(out[[3, 5]]).all()
    kept = torch.ones(67, dtype=torch.bool)
    kept[[3, 5]] = False
    assert torch.equal(out[kept], right[kept])
    actions = AddedRows(torch.zeros(4, 32), torch.tensor([-1, 0, 3, 4, -2]))
    out = gather_rows(INPUTS.table, INPUTS.ids[:5], actions=actions, dtype=torch.float32, check_ids=False)
    assert torch.isnan(out).all(1).tolist() == [False, False, False, True, True]
    assert torch.equal(out[:3], right[:3])
    nothing = gather_rows(pack_rows(torch.empty(0, 32)), INPUTS.ids, check_ids=False)
    assert torch.isnan(nothing).all()


def test_nothing_is_added_where_there_is_no_action() -> None:
    none = AddedRows(torch.full((2, 32), torch.nan), torch.full((67,), -1))
    plain = gather_rows(INPUTS.table, INPUTS.ids)
    assert torch.equal(gather_rows(INPUTS.table, INPUTS.ids, actions=none), plain)
    empty = AddedRows(torch.empty(0, 32), torch.full((67,), -1))
    assert torch.equal(gather_rows(INPUTS.table, INPUTS.ids, actions=empty), plain)


def test_item_scale_comes_before_the_sum() -> None:
    table = pack_rows(torch.tensor([[1.0, 2.0]]))
    one = torch.zeros(1, dtype=torch.int64)
    out = gather_rows(table, one, item_scale=4.0, positions=AddedRows(torch.tensor([[1.0, 1.0]]), one))
    assert out.tolist() == [[5.0, 9.0]]


def test_wrong_arguments_are_named() -> None:
    table, ids = INPUTS.table, INPUTS.ids
    dense = torch.zeros(4, 32)
    with pytest.raises(TypeError, match="table: expected PackedRows, got Tensor"):
        gather_rows(dense, ids)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype: expected one of torch.bfloat16, .* got torch\.float64"):
        gather_rows(table, ids, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"ids: expected an int64 or int32 tensor, got torch\.float32"):
        gather_rows(table, ids.float())
    with pytest.raises(ValueError, match=r"ids: expected \[L\], got \(1, 67\)"):
        gather_rows(table, ids[None])
    with pytest.raises(ValueError, match="ids: expected a tensor on cpu as the table, got meta"):
        gather_rows(table, ids.to("meta"))
    with pytest.raises(ValueError, match=r"actions\.table: expected \[A, 32\] as the item rows, got \(4, 31\)"):
        gather_rows(table, ids, actions=AddedRows(dense[:, :31], ids))
    with pytest.raises(TypeError, match=r"actions\.table: expected one of .* got torch\.float64"):
        gather_rows(table, ids, actions=AddedRows(dense.double(), ids))
    with pytest.raises(ValueError, match=r"positions\.ids: expected one for each of 67 rows, got \(66,\)"):
        gather_rows(table, ids, positions=AddedRows(dense, ids[1:]))
    with pytest.raises(ValueError, match=r"positions\.table: .* call it under torch\.no_grad\(\)"):
        gather_rows(table, ids, positions=AddedRows(dense.requires_grad_(), ids))
    with torch.no_grad():
        gather_rows(table, ids, positions=AddedRows(dense, ids % 4))


def test_explicit_backends_are_not_replaced() -> None:
    with pytest.raises(UnsupportedBackend, match=r"expected one of auto, .* got 'fast'"):
        gather_rows(INPUTS.table, INPUTS.ids, backend="fast")
    with pytest.raises(UnsupportedBackend, match=r"triton .*; use backend='eager'"):
        gather_rows(INPUTS.table, INPUTS.ids, backend="triton")
    for backend in ("reference", "eager"):
        assert torch.equal(
            gather_rows(INPUTS.table, INPUTS.ids, backend=backend), gather_rows(INPUTS.table, INPUTS.ids)
        )


def test_selecting_keeps_rows_packed() -> None:
    chosen = INPUTS.table.select(INPUTS.ids)
    assert isinstance(chosen, PackedRows)
    assert torch.equal(unpack_rows(chosen), unpack_rows(INPUTS.table)[INPUTS.ids])
