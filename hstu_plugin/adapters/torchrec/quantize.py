"""TorchRec's quantised EmbeddingCollection in place of full-precision ones, over FBGEMM's lookup.

`to_tbe` and its like, which convert between our rows and FBGEMM's, come from `hstu_plugin.adapters.fbgemm`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection

from hstu_kernels.int4 import PackedRows, RowFormat
from hstu_plugin.adapters.fbgemm import (
    ROW_ALIGNMENT,
    expect_counterpart,
    from_tbe,
    from_tbe_rows,
    parts_of,
    to_tbe,
    to_tbe_rows,
)
from hstu_plugin.adapters.torchrec.sharded_rows import Collection, row_blocks, settings_of, table_weights
from hstu_plugin.quantize import (
    Evaluate,
    QuantizeConfig,
    Quantized,
    check_frequencies,
    pack_table,
    replace_modules,
    searched_rows,
    why_not,
)
from hstu_plugin.quantize_report import QuantizationReport, RowErrors, TableReport, report_from, row_errors

__all__ = ["from_tbe", "from_tbe_rows", "quantize_embeddings", "tables_of_collection", "to_tbe", "to_tbe_rows"]

_DATA = {RowFormat.INT4: DataType.INT4, RowFormat.INT8: DataType.INT8}


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

    Sharded collections are served on every rank of the default process group, which all call this alike: their rows
    are gathered a block at a time, and each rank gets the whole quantised tables. `shard_quantized` spreads them over
    the devices of one process again. Of a DistributedModelParallel the module inside is returned.

    Args:
        output_dtype: of the looked-up rows.

    Raises:
        ValueError: there is no collection, a table cannot be held in ``dtype``, or one is left out by name.
    """
    row_format, config, known = RowFormat.parse(dtype), config or QuantizeConfig(), dict(frequencies or {})
    if isinstance(model, DistributedModelParallel):
        model = model.module
    collections: dict[str, Collection] = {}
    kept: dict[str, str] = {}
    for path, part in model.named_modules():
        if isinstance(part, EmbeddingCollection | ShardedEmbeddingCollection):
            collections[path] = part
        elif isinstance(part, EmbeddingBagCollection | ShardedEmbeddingBagCollection):
            kept[path] = "pooled lookups are not served"
    weights = {
        f"{path}.embeddings.{name}".removeprefix("."): (path, weight)
        for path, part in collections.items()
        for name, weight in table_weights(part).items()
    }
    if not weights:
        raise ValueError("model: expected an EmbeddingCollection, found none; quantize() serves plain embeddings")
    for name in weights:
        reason = why_not(name, config)
        if reason:
            raise ValueError(f"config: expected patterns that take whole collections, but {name!r} is {reason}")
    check_frequencies(known, {name: weight.size(0) for name, (_, weight) in weights.items()})
    for name, (_, weight) in weights.items():
        try:
            expect_counterpart(row_format, weight.size(1))
        except ValueError as error:
            raise ValueError(f"table {name!r}: {error}") from error
    model.eval()
    before = dict(evaluate(model)) if evaluate else {}
    packed: dict[str, dict[str, PackedRows]] = {path: {} for path in collections}
    reports: list[TableReport] = []
    with torch.no_grad():
        for name, (path, weight) in weights.items():
            rows, report = _packed(name, weight, row_format, config, known.get(name))
            packed[path][name.rpartition(".")[2]] = rows
            reports.append(report)
    replacements = {id(part): _collection(part, packed[path], output_dtype) for path, part in collections.items()}
    model = replace_modules(model, replacements)
    after = dict(evaluate(model)) if evaluate else {}
    return Quantized(
        model, QuantizationReport(tables=tuple(reports), kept=kept, metrics_before=before, metrics_after=after)
    )


def _packed(
    name: str, weight: Tensor, row_format: RowFormat, config: QuantizeConfig, counts: Tensor | None
) -> tuple[PackedRows, TableReport]:
    """Rows and report of one table, a block of rows in full precision at a time."""
    chosen, parts, errors, size = searched_rows(config, counts), [], [], 0
    for begin, block in row_blocks(weight):
        searched = None if chosen is None else chosen[begin : begin + block.shape[0]]
        try:
            part = pack_table(name, block, row_format, config, searched)
        except ValueError as error:
            raise ValueError(f"{error} (counted from row {begin})" if begin else str(error)) from error
        parts.append(part.data)
        errors.append(row_errors(block, part))
        size += block.numel() * block.element_size()
    rows = PackedRows(torch.cat(parts), weight.size(1), row_format)
    report = report_from(
        name, RowErrors.joined(errors), rows, ranges=config.ranges, bytes_before=size, frequency=counts
    )
    return rows, report


def tables_of_collection(collection: QuantEmbeddingCollection) -> dict[str, PackedRows]:
    """Our rows of every table of a quantised collection, whoever quantised it."""
    found: dict[str, PackedRows] = {}
    for lookup in collection._emb_modules:
        found |= from_tbe(lookup)
    return found


def _collection(
    part: Collection, tables: Mapping[str, PackedRows], output_dtype: torch.dtype
) -> QuantEmbeddingCollection:
    configs, need_indices = settings_of(part)
    for config in configs:
        config.data_type = _DATA[tables[config.name].format]
    quantised = QuantEmbeddingCollection(
        configs,
        device=next(iter(tables.values())).device,
        need_indices=need_indices,
        output_dtype=output_dtype,
        table_name_to_quantized_weights={name: parts_of(table) for name, table in tables.items()},
        row_alignment=ROW_ALIGNMENT,
        # TorchRec shards rows and columns of such collections only.
        quant_state_dict_split_scale_bias=True,
    )
    return quantised.eval()
