"""The meaning of the dequantising gather in plain tensor operations; also the path of devices without a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hstu_kernels.int4.format import PackedRows
from hstu_kernels.int4.packing import rows_at_once, unpack_rows

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
    out = torch.empty(ids.numel(), table.dim, dtype=dtype, device=table.device)
    step = rows_at_once(ids.numel(), table.dim, table.device)
    for begin in range(0, ids.numel(), step):
        part = slice(begin, begin + step)
        values = _item_rows(table, ids[part], item_scale, precision)
        for dense, dense_ids in added:
            values += _dense_rows(dense, dense_ids[part], precision)
        out[part] = values
    return out


def _item_rows(table: PackedRows, ids: Tensor, item_scale: float, precision: torch.dtype) -> Tensor:
    if not table.num_rows:
        return torch.full((ids.numel(), table.dim), torch.nan, dtype=precision, device=table.device)
    inside, row = _rows_inside(ids, table.num_rows)
    # One product for the scale and for rows of NaN: filling behind a mask takes a CPU as long as all the rest.
    factor = torch.full(ids.shape, item_scale, dtype=precision, device=ids.device).masked_fill_(~inside, torch.nan)
    return unpack_rows(table.select(row)).to(precision).mul_(factor[:, None])


def _dense_rows(dense: Tensor, ids: Tensor, precision: torch.dtype) -> Tensor:
    inside, row = _rows_inside(ids, dense.shape[0])
    if dense.shape[0]:
        rows = dense.index_select(0, row).to(precision)
    else:
        rows = torch.empty(ids.numel(), dense.shape[1], dtype=precision, device=dense.device)
    rows.masked_fill_(~inside[:, None], torch.nan)
    return rows.masked_fill_((ids == NOTHING)[:, None], 0.0)


def _rows_inside(ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    inside = (ids >= 0) & (ids < rows)
    return inside, torch.where(inside, ids, 0)
