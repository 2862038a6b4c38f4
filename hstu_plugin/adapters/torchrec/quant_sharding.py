"""Quantised collections spread over the devices of one process: TorchRec's sharding for inference."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torchrec.distributed.fused_params import FUSED_PARAM_QUANT_STATE_DICT_SPLIT_SCALE_BIAS
from torchrec.distributed.global_settings import set_propogate_device
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.quant_embedding import QuantEmbeddingCollectionSharder, ShardedQuantEmbeddingCollection
from torchrec.distributed.quant_embedding_kernel import QuantBatchedEmbedding
from torchrec.distributed.types import ModuleSharder
from torchrec.inference.modules import shard_quant_model
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection

from hstu_kernels.int4 import PackedRows
from hstu_plugin.adapters.fbgemm import parts_of, to_tbe_rows
from hstu_plugin.adapters.torchrec.quantize import tables_of_collection

_SHARDINGS = {"cpu": ("table_wise", "row_wise"), "cuda": ("table_wise", "row_wise", "column_wise")}


def shard_quantized(
    model: nn.Module,
    *,
    num_devices: int,
    device: torch.device | str = "cuda",
    sharding: str | Mapping[str, str] = "row_wise",
) -> nn.Module:
    """Spread every quantised EmbeddingCollection of a model over several devices of this process, for inference.

    Works in place and keeps every byte of the rows. The parts outside the collections stay where they are. On a CPU
    this turns on TorchRec's ``propogate_device`` for the process.

    Args:
        model: with the collections of `quantize_embeddings`.
        num_devices: how many; on a CPU as many parts, all in host memory.
        device: ``cuda`` or ``cpu``.
        sharding: ``table_wise``, ``row_wise`` or (CUDA) ``column_wise``; of all tables, or by table name.

    Returns:
        the model.

    Raises:
        ValueError: there is no quantised collection, or a table or its sharding is unknown.
    """
    kind = torch.device(device).type
    found = {path: part for path, part in model.named_modules() if isinstance(part, QuantEmbeddingCollection)}
    if not found or "" in found:
        raise ValueError(
            "model: expected a module that holds quantised EmbeddingCollections, got "
            f"{'one alone' if found else 'none'}; quantize_embeddings makes them"
        )
    tables = {path: tables_of_collection(part) for path, part in found.items()}
    names = {name for part in tables.values() for name in part}
    chosen = dict.fromkeys(names, sharding) if isinstance(sharding, str) else dict(sharding)
    if chosen.keys() != names or kind not in _SHARDINGS or not set(chosen.values()) <= set(_SHARDINGS[kind]):
        raise ValueError(
            f"sharding: expected one of {', '.join(_SHARDINGS.get(kind, ('cpu and cuda devices',)))} on {kind} for "
            f"each of {', '.join(sorted(names))}, got {chosen}"
        )
    constraints = {
        name: ParameterConstraints(sharding_types=[wanted], compute_kernels=["quant"])
        for name, wanted in chosen.items()
    }
    sharders: list[ModuleSharder[nn.Module]] = [
        QuantEmbeddingCollectionSharder(fused_params={FUSED_PARAM_QUANT_STATE_DICT_SPLIT_SCALE_BIAS: True})
    ]
    logging.getLogger("torchrec.distributed.planner").setLevel(logging.ERROR)
    if kind == "cpu":
        # Otherwise TorchRec takes CUDA for all parts, also those it makes at the first lookup.
        set_propogate_device(True)
    model, _ = shard_quant_model(
        model,
        world_size=num_devices,
        compute_device=kind,
        sharding_device=kind,
        sharders=sharders,
        constraints=constraints,
    )
    for path, rows in tables.items():
        part = model.get_submodule(path)
        assert isinstance(part, ShardedQuantEmbeddingCollection)
        for kernel in _kernels(part):
            _fill(kernel, rows)
    return model


def _kernels(part: ShardedQuantEmbeddingCollection) -> Iterator[QuantBatchedEmbedding]:
    # The lookups are kept in plain lists, so no walk over modules meets them.
    for lookup in part._lookups:
        for ranked in lookup._embedding_lookups_per_rank:
            yield from ranked._emb_modules


def _fill(kernel: QuantBatchedEmbedding, tables: Mapping[str, PackedRows]) -> None:
    """Write a lookup's part of the tables: rows, and of column shards some codes beside the whole row's range."""
    lookup = kernel.emb_module
    weights = lookup.split_embedding_weights(split_scale_shifts=False)
    for config, (target, _) in zip(kernel._config.embedding_tables, weights, strict=True):
        assert config.local_metadata is not None
        (row, column), (rows, columns) = config.local_metadata.shard_offsets, config.local_metadata.shard_sizes
        table = tables[config.name]
        part = PackedRows(table.data[row : row + rows], table.dim, table.format)
        if columns < table.dim:
            codes, tail = parts_of(part)
            first, last = (table.format.code_bytes(c) for c in (column, column + columns))
            part = PackedRows(torch.cat([codes[:, first:last], tail], dim=1), columns, table.format)
        target.copy_(to_tbe_rows(part, row_alignment=lookup.row_alignment))
