"""Quantised tables between our rows and FBGEMM's batched tables; needs fbgemm-gpu alone.

FBGEMM's operators and our tables keep scale and bias behind the codes. Its table-batched lookup keeps them before the
codes and pads every row, so rows are converted, never copied as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from hstu_kernels.int4 import PackedRows, RowFormat
from hstu_kernels.int4.format import TAIL_BYTES

# FBGEMM's kernels on a GPU read rows in steps of 16 bytes.
ROW_ALIGNMENT = 16
_SPARSE = {RowFormat.INT4: SparseType.INT4, RowFormat.INT8: SparseType.INT8}


def to_tbe_rows(table: PackedRows, *, row_alignment: int = ROW_ALIGNMENT) -> Tensor:
    """FBGEMM's rows ``[rows, padded]`` uint8: scale and bias, codes, zeros up to a multiple of ``row_alignment``.

    Raises:
        ValueError: the format has no counterpart in FBGEMM, or an int4 table is of odd width.
    """
    sparse_type(table)
    codes, tail = parts_of(table)
    width = codes.shape[1] + TAIL_BYTES
    padded = -(-width // row_alignment) * row_alignment
    rows = torch.zeros(table.num_rows, padded, dtype=torch.uint8, device=table.device)
    rows[:, :TAIL_BYTES] = tail
    rows[:, TAIL_BYTES:width] = codes
    return rows


def from_tbe_rows(rows: Tensor, dim: int, dtype: RowFormat | str = RowFormat.INT4) -> PackedRows:
    """Our rows from FBGEMM's.

    Args:
        rows: ``[rows, padded]`` uint8, scale and bias first, padded by any amount.
        dim: elements of a row.
        dtype: ``int4`` or ``int8``.

    Raises:
        TypeError, ValueError: no uint8 rows, or too short for ``dim``.
    """
    row_format = RowFormat.parse(dtype)
    expect_counterpart(row_format, dim)
    width = row_format.row_bytes(dim)
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] < width:
        raise ValueError(
            f"rows: expected uint8 [rows, {width} or more] for {row_format} rows of {dim} elements, got "
            f"{tuple(rows.shape)} of {rows.dtype}"
        )
    return PackedRows(torch.cat([rows[:, TAIL_BYTES:width], rows[:, :TAIL_BYTES]], dim=1), dim, row_format)


def to_tbe(
    tables: Mapping[str, PackedRows], *, output_dtype: torch.dtype = torch.float32, row_alignment: int = ROW_ALIGNMENT
) -> IntNBitTableBatchedEmbeddingBagsCodegen:
    """FBGEMM's lookup without pooling over these tables, in their order and on their device.

    Raises:
        ValueError: there is no table, they lie on several devices, or one has no counterpart in FBGEMM.
    """
    devices = {table.device for table in tables.values()}
    if len(devices) != 1:
        raise ValueError(f"tables: expected tables on one device, got {', '.join(map(str, devices)) or 'no table'}")
    (device,) = devices
    place = EmbeddingLocation.HOST if device.type == "cpu" else EmbeddingLocation.DEVICE
    return IntNBitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=[(name, t.num_rows, t.dim, sparse_type(t), place) for name, t in tables.items()],
        pooling_mode=PoolingMode.NONE,
        weight_lists=[parts_of(table) for table in tables.values()],
        device=device,
        output_dtype=SparseType.from_dtype(output_dtype),
        row_alignment=row_alignment,
    )


def from_tbe(lookup: IntNBitTableBatchedEmbeddingBagsCodegen) -> dict[str, PackedRows]:
    """Our rows of every table of an FBGEMM lookup, by name.

    Raises:
        ValueError: a table is neither int4 nor int8, or its scale and bias are not two float16.
    """
    if lookup.scale_bias_size_in_bytes != TAIL_BYTES:
        raise ValueError(
            f"lookup: expected scale and bias of {TAIL_BYTES} bytes, got {lookup.scale_bias_size_in_bytes}"
        )
    formats = {sparse: row_format for row_format, sparse in _SPARSE.items()}
    found = {}
    weights = lookup.split_embedding_weights(split_scale_shifts=False)
    for (name, _, dim, kind, _), (rows, _) in zip(lookup.embedding_specs, weights, strict=True):
        if kind not in formats:
            raise ValueError(f"lookup: expected int4 or int8 tables, got {kind.value} in table {name!r}")
        found[name] = from_tbe_rows(rows, dim, formats[kind])
    return found


def sparse_type(table: PackedRows) -> SparseType:
    """FBGEMM's name of a table's format.

    Raises:
        ValueError: it has none.
    """
    expect_counterpart(table.format, table.dim)
    return _SPARSE[table.format]


def parts_of(table: PackedRows) -> tuple[Tensor, Tensor]:
    """Codes, and scale with bias: how FBGEMM takes rows that it lays out itself."""
    codes = table.format.code_bytes(table.dim)
    return table.data[:, :codes], table.data[:, codes:]


def expect_counterpart(row_format: RowFormat, dim: int) -> None:
    """Refuse what FBGEMM's rows cannot hold.

    Raises:
        ValueError: a format or an odd width.
    """
    if row_format not in _SPARSE:
        raise ValueError(
            f"dtype: expected int4 or int8, whose rows FBGEMM knows, got {row_format}; its fp8 rows have no scale. Use "
            "hstu_plugin.quantize.quantize for fp8"
        )
    if row_format is RowFormat.INT4 and dim % 2:
        raise ValueError(f"dim: expected an even width for FBGEMM's int4 rows, got {dim}; use int8")
