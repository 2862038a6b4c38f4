"""The dequantising gather: checks, choice of the backend, call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_kernels.backend import Backend, UnsupportedBackend
from hstu_kernels.dispatch import choose_backend
from hstu_kernels.int4.format import PackedRows, RowFormat
from hstu_kernels.int4.reference import NOTHING, gather_reference

_ID_TYPES = (torch.int64, torch.int32)
_OUT_TYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class AddedRows:
    """Rows of a small dense table that are added to gathered ones, such as embeddings of actions or positions.

    Attributes:
        table: ``[A, D]`` float32, bfloat16 or float16.
        ids: ``[L]`` int64 or int32; -1 adds nothing (a candidate has no action yet).
    """

    table: Tensor
    ids: Tensor


def gather_rows(
    table: PackedRows,
    ids: Tensor,
    *,
    item_scale: float = 1.0,
    actions: AddedRows | None = None,
    positions: AddedRows | None = None,
    dtype: torch.dtype = torch.bfloat16,
    backend: Backend | str = Backend.AUTO,
    check_ids: bool | None = None,
) -> Tensor:
    """Sequence rows ``item_scale * dequantised(table[ids]) + actions + positions``; one pass over memory in a kernel.

    For inference: nothing is differentiable. Products and sums are in float32, in this order, rounded once at the
    end, so that all backends give the same bits.

    Args:
        table: packed item rows ``[rows, D]``.
        ids: ``[L]`` int64 or int32 on the table's device.
        item_scale: multiplies item rows before anything is added.
        actions, positions: dense rows to add.
        dtype: of the result: bfloat16, float16 or float32.
        backend: ``triton`` is the fused kernel (int4 and int8, NVIDIA GPUs), ``eager`` tensor operations; ``auto``
            takes the kernel where it serves the call.
        check_ids: refuse ids outside their table, which on a GPU waits for the device. Default: on CPU only.
            Unchecked, such an id gives a row of NaN; memory outside the tables is never read.

    Returns:
        ``[L, D]`` in ``dtype``.

    Raises:
        TypeError: wrong types of tensors.
        ValueError: shapes or devices do not agree, a checked id is out of range, or a table asks for gradients.
        UnsupportedBackend: an explicitly requested backend cannot serve the call.
    """
    if not isinstance(table, PackedRows):
        raise TypeError(f"table: expected PackedRows, got {type(table).__name__}; pack_rows makes them")
    if dtype not in _OUT_TYPES:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, _OUT_TYPES))}, got {dtype}")
    _expect_ids("ids", ids, table)
    checked = table.device.type == "cpu" if check_ids is None else check_ids
    if checked:
        _refuse_outside("ids", ids, 0, table.num_rows)
    added = []
    for name, term in (("actions", actions), ("positions", positions)):
        if term is None:
            continue
        _expect_term(name, term, table, ids)
        if checked:
            _refuse_outside(f"{name}.ids", term.ids, NOTHING, term.table.shape[0])
        added.append((term.table.detach(), term.ids))
    if _resolve(backend, table) is Backend.TRITON:
        from hstu_kernels.int4.triton.launch import triton_gather

        return triton_gather(table, ids, item_scale=item_scale, added=added, dtype=dtype)
    return gather_reference(table, ids, item_scale=item_scale, added=added, dtype=dtype)


def _resolve(backend: Backend | str, table: PackedRows) -> Backend:
    if table.format is RowFormat.FP8 and backend == Backend.AUTO:
        return Backend.EAGER
    chosen = choose_backend(backend, table.device, torch.float32)  # what it adds up in
    if chosen is Backend.TRITON and table.format is RowFormat.FP8:
        raise UnsupportedBackend("backend: triton gathers int4 and int8 rows, got fp8; use backend='eager'")
    return chosen


def _expect_ids(name: str, ids: Tensor, table: PackedRows) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in _ID_TYPES:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name}: expected an int64 or int32 tensor, got {got}")
    if ids.dim() != 1:
        raise ValueError(f"{name}: expected [L], got {tuple(ids.shape)}")
    if ids.device != table.device:
        raise ValueError(f"{name}: expected a tensor on {table.device} as the table, got {ids.device}")


def _expect_term(name: str, term: AddedRows, table: PackedRows, ids: Tensor) -> None:
    dense = term.table
    if not isinstance(dense, Tensor) or dense.dtype not in _OUT_TYPES:
        got = dense.dtype if isinstance(dense, Tensor) else type(dense).__name__
        raise TypeError(f"{name}.table: expected one of {', '.join(map(str, _OUT_TYPES))}, got {got}")
    if dense.dim() != 2 or dense.shape[1] != table.dim:
        raise ValueError(f"{name}.table: expected [A, {table.dim}] as the item rows, got {tuple(dense.shape)}")
    if dense.device != table.device:
        raise ValueError(f"{name}.table: expected a tensor on {table.device} as the table, got {dense.device}")
    if dense.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}.table: expected a table without gradients, got one that requires them; the gather is for "
            "inference: call it under torch.no_grad(), or detach the table"
        )
    _expect_ids(f"{name}.ids", term.ids, table)
    if term.ids.shape != ids.shape:
        raise ValueError(f"{name}.ids: expected one for each of {ids.shape[0]} rows, got {tuple(term.ids.shape)}")


def _refuse_outside(name: str, ids: Tensor, lowest: int, rows: int) -> None:
    if not ids.numel():
        return
    low, high = torch.stack(torch.aminmax(ids)).tolist()
    if low < lowest or high >= rows:
        raise ValueError(
            f"{name}: expected ids in [{lowest}, {rows - 1}] for a table of {rows} rows, got {low} to {high}; "
            "map unknown ids to a row of the table"
        )
