"""Inputs of the dequantising gather and an oracle of it, shared by the legs of its tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_kernels.int4 import AddedRows, PackedRows, RowFormat, pack_rows, unpack_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherCase:
    """A table, how many rows of it are asked for, and what is added to them."""

    name: str
    dim: int = 32
    rows: int = 40
    ids: int = 67
    format: RowFormat = RowFormat.INT4
    actions: torch.dtype | None = torch.float32
    positions: torch.dtype | None = torch.float32
    id_type: torch.dtype = torch.int64
    item_scale: float = 1.0

    def __str__(self) -> str:
        return self.name


GATHER_CASES = [
    GatherCase(name="words"),
    GatherCase(name="words-128", dim=128, item_scale=128**0.5),
    GatherCase(name="words-512-bfloat16-tables", dim=512, ids=9, actions=torch.bfloat16, positions=torch.bfloat16),
    GatherCase(name="several-column-blocks", dim=1100, ids=5),
    GatherCase(name="odd-7-in-words", dim=7, item_scale=3.0),
    GatherCase(name="odd-33", dim=33),
    GatherCase(name="one-column", dim=1),
    GatherCase(name="half-words", dim=12),
    GatherCase(name="bytes", dim=50, id_type=torch.int32),
    GatherCase(name="alone", actions=None, positions=None),
    GatherCase(name="positions-alone", actions=None, positions=torch.float16),
    GatherCase(name="one-id", ids=1),
    GatherCase(name="no-ids", ids=0),
    GatherCase(name="empty-table", rows=0, ids=0),
    GatherCase(name="int8", format=RowFormat.INT8, dim=20, item_scale=0.5),
    GatherCase(name="int8-bytes", format=RowFormat.INT8, dim=13),
    GatherCase(name="int8-half-words", format=RowFormat.INT8, dim=14),
    GatherCase(name="fp8", format=RowFormat.FP8, dim=13),
]


@dataclass(frozen=True, slots=True)
class GatherInputs:
    """Arguments of `gather_rows`."""

    table: PackedRows
    ids: Tensor
    actions: AddedRows | None
    positions: AddedRows | None
    item_scale: float

    def keywords(self) -> dict[str, object]:
        """The optional ones."""
        return {"actions": self.actions, "positions": self.positions, "item_scale": self.item_scale}


def gather_inputs(case: GatherCase, device: str = "cpu") -> GatherInputs:
    """Unit-scale tables, ids with repeats, some actions missing."""
    generator = torch.Generator().manual_seed(11)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def numbers(low: int, high: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), (case.ids,), generator=generator).to(device, case.id_type)

    table = pack_rows(drawn(case.rows, case.dim), case.format).to(device)
    ids = numbers(0, case.rows)
    actions = positions = None
    if case.actions is not None:
        actions = AddedRows(drawn(6, case.dim).to(device, case.actions), numbers(-1, 6))
    if case.positions is not None:
        positions = AddedRows(drawn(90, case.dim).to(device, case.positions), numbers(0, 90))
    return GatherInputs(table, ids, actions, positions, case.item_scale)


def gather_oracle(inputs: GatherInputs, dtype: torch.dtype) -> Tensor:
    """Row by row, in float32 steps rounded as the definition says."""
    out = torch.empty(inputs.ids.numel(), inputs.table.dim, dtype=dtype)
    values = unpack_rows(inputs.table.to("cpu"))
    for i, item in enumerate(inputs.ids.tolist()):
        row = values[item] * inputs.item_scale
        for term in (inputs.actions, inputs.positions):
            if term is not None and int(term.ids[i]) >= 0:
                row = row + term.table[int(term.ids[i])].cpu().float()
        out[i] = row.to(dtype)
    return out
