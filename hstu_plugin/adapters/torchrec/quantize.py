"""TorchRec's quantised EmbeddingCollection in place of full-precision ones, over FBGEMM's lookup.

`to_tbe` and its like, which convert between our rows and FBGEMM's, come from `hstu_plugin.adapters.fbgemm`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
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
            expect_counterpart(row_format, weight.shape[1])
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
        table_name_to_quantized_weights={name: parts_of(table) for name, table in tables.items()},
        row_alignment=ROW_ALIGNMENT,
    )
    return quantised.eval()
