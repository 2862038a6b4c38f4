"""Quantised tables between our rows, FBGEMM's batched tables, and TorchRec's quantised EmbeddingCollection.

FBGEMM's operators and our tables keep scale and bias behind the codes. Its table-batched lookup keeps them before the
codes and pads every row, so rows are converted, never copied as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection

from hstu_kernels.int4 import PackedRows, RowFormat
from hstu_kernels.int4.format import TAIL_BYTES
from hstu_plugin.quantize import (
    Evaluate,
    QuantizeConfig,
    Quantized,
    check_frequencies,
    pack_table,
    replace_modules,
    why_not,
)
from hstu_plugin.quantize_report import QuantizationReport, TableReport, table_report

# FBGEMM's kernels on a GPU read rows in steps of 16 bytes.
ROW_ALIGNMENT = 16
_SPARSE = {RowFormat.INT4: SparseType.INT4, RowFormat.INT8: SparseType.INT8}
_DATA = {RowFormat.INT4: DataType.INT4, RowFormat.INT8: DataType.INT8}


def to_tbe_rows(table: PackedRows, *, row_alignment: int = ROW_ALIGNMENT) -> Tensor:
    """FBGEMM's rows ``[rows, padded]`` uint8: scale and bias, codes, zeros up to a multiple of ``row_alignment``.

    Raises:
        ValueError: the format has no counterpart in FBGEMM, or an int4 table is of odd width.
    """
    sparse_type(table)
    codes, tail = _parts(table)
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
    _expect_counterpart(row_format, dim)
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
        weight_lists=[_parts(table) for table in tables.values()],
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


def quantize_embeddings(
    model: nn.Module,
    dtype: RowFormat | str = RowFormat.INT4,
    *,
    config: QuantizeConfig | None = None,
    frequencies: Mapping[str, Tensor] | None = None,
    evaluate: Evaluate | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Quantized:
    """Replace every EmbeddingCollection of a model by TorchRec's quantised one over FBGEMM's INT4 or INT8 lookup.

    Works in place, as `hstu_plugin.quantize.quantize`, whose arguments these are; tables are called as their modules
    are (``embeddings.embeddings.item``). A collection is replaced as a whole. That function serves an unsharded
    collection as well, table by table and without FBGEMM's lookup.

    Args:
        output_dtype: of the looked-up rows.

    Raises:
        ValueError: there is no unsharded collection, a table cannot be held in ``dtype``, or one is left out by name.
    """
    row_format, config, known = RowFormat.parse(dtype), config or QuantizeConfig(), dict(frequencies or {})
    collections: dict[str, EmbeddingCollection] = {}
    kept: dict[str, str] = {}
    for path, part in model.named_modules():
        if isinstance(part, ShardedEmbeddingCollection):
            raise ValueError(
                f"model: expected unsharded collections, got the sharded {path!r}; load its weights into the model "
                "before it is sharded, and quantise that"
            )
        if isinstance(part, EmbeddingCollection):
            collections[path] = part
        elif isinstance(part, EmbeddingBagCollection):
            kept[path] = "pooled lookups are not served"
    weights = {
        f"{path}.embeddings.{name}".removeprefix("."): (path, table.weight)
        for path, part in collections.items()
        for name, table in part.embeddings.items()
    }
    if not weights:
        raise ValueError("model: expected an EmbeddingCollection, found none; quantize() serves plain embeddings")
    for name in weights:
        reason = why_not(name, config)
        if reason:
            raise ValueError(f"config: expected patterns that take whole collections, but {name!r} is {reason}")
    check_frequencies(known, {name: weight.shape[0] for name, (_, weight) in weights.items()})
    for name, (_, weight) in weights.items():
        try:
            _expect_counterpart(row_format, weight.shape[1])
        except ValueError as error:
            raise ValueError(f"table {name!r}: {error}") from error
    model.eval()
    before = dict(evaluate(model)) if evaluate else {}
    packed: dict[str, dict[str, PackedRows]] = {path: {} for path in collections}
    reports: list[TableReport] = []
    with torch.no_grad():
        for name, (path, weight) in weights.items():
            rows = pack_table(name, weight, row_format, config, known.get(name))
            packed[path][name.rpartition(".")[2]] = rows
            reports.append(table_report(name, weight, rows, ranges=config.ranges, frequency=known.get(name)))
    replacements = {id(part): _collection(part, packed[path], output_dtype) for path, part in collections.items()}
    model = replace_modules(model, replacements)
    after = dict(evaluate(model)) if evaluate else {}
    report = QuantizationReport(tables=tuple(reports), kept=kept, metrics_before=before, metrics_after=after)
    return Quantized(model, report)


def tables_of_collection(collection: QuantEmbeddingCollection) -> dict[str, PackedRows]:
    """Our rows of every table of a quantised collection, whoever quantised it."""
    found: dict[str, PackedRows] = {}
    for lookup in collection._emb_modules:
        found |= from_tbe(lookup)
    return found


def sparse_type(table: PackedRows) -> SparseType:
    """FBGEMM's name of a table's format.

    Raises:
        ValueError: it has none.
    """
    _expect_counterpart(table.format, table.dim)
    return _SPARSE[table.format]


def _collection(
    part: EmbeddingCollection, tables: Mapping[str, PackedRows], output_dtype: torch.dtype
) -> QuantEmbeddingCollection:
    configs = copy.deepcopy(part.embedding_configs())
    for config in configs:
        config.data_type = _DATA[tables[config.name].format]
    quantised = QuantEmbeddingCollection(
        configs,
        device=next(iter(tables.values())).device,
        need_indices=part.need_indices(),
        output_dtype=output_dtype,
        table_name_to_quantized_weights={name: _parts(table) for name, table in tables.items()},
        row_alignment=ROW_ALIGNMENT,
    )
    return quantised.eval()


def _parts(table: PackedRows) -> tuple[Tensor, Tensor]:
    """Codes, and scale with bias: how FBGEMM takes rows that it lays out itself."""
    codes = table.format.code_bytes(table.dim)
    return table.data[:, :codes], table.data[:, codes:]


def _expect_counterpart(row_format: RowFormat, dim: int) -> None:
    if row_format not in _SPARSE:
        raise ValueError(
            f"dtype: expected int4 or int8, whose rows FBGEMM knows, got {row_format}; its fp8 rows have no scale. Use "
            "hstu_plugin.quantize.quantize for fp8"
        )
    if row_format is RowFormat.INT4 and dim % 2:
        raise ValueError(f"dim: expected an even width for FBGEMM's int4 rows, got {dim}; use int8")
