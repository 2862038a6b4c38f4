"""The meaning of the dequantising gather in plain tensor operations; also the path of devices without a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hstu_kernels.int4.format import PackedRows
from hstu_kernels.int4.packing import unpack_rows

# As an id of an added table: this row gets nothing from it.
NOTHING = -1


def gather_reference(
    table: PackedRows,
    ids: Tensor,
    *,
    item_scale: float,
    added: Sequence[tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """Arguments and result as `hstu_kernels.int4.gather_rows`.

    Args:
        table: packed rows.
        ids: ``[L]``.
        item_scale: multiplies the dequantised row.
        added: dense tables ``[A, D]`` with their ids ``[L]``, in the order of the sum.
        dtype: of the result.
        precision: in which products and sums are taken.
    """
    inside, row = _rows_inside(ids, table.num_rows)
    if table.num_rows:
        values = unpack_rows(table.select(row)).to(precision)
    else:
        values = torch.zeros(ids.numel(), table.dim, dtype=precision, device=table.device)
    values = torch.where(inside[:, None], values * item_scale, torch.nan)
    for dense, dense_ids in added:
        inside, row = _rows_inside(dense_ids, dense.shape[0])
        term = dense.index_select(0, row).to(precision) if dense.shape[0] else torch.zeros_like(values)
        values = values + torch.where(inside[:, None], term, torch.where(dense_ids == NOTHING, 0.0, torch.nan)[:, None])
    return values.to(dtype)


def _rows_inside(ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    inside = (ids >= 0) & (ids < rows)
    return inside, torch.where(inside, ids, 0)
