"""Where the tables lie: the planner's choice, readable, and weights that do not depend on it."""

from __future__ import annotations

import io
import logging
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ModuleSharder, ShardingPlan, ShardingType

from hstu_plugin.adapters.torchrec.options import Precision
from hstu_plugin.adapters.torchrec.schema import FeatureSchema

_INIT_STD, _CHUNK = 0.02, 1 << 16
_RESERVED = 0.15
_COMMS = {
    Precision.FP32: QCommsConfig(),
    Precision.BF16: QCommsConfig(forward_precision=CommType.BF16, backward_precision=CommType.BF16),
}


def shard_model(
    module: nn.Module,
    schema: FeatureSchema,
    *,
    device: torch.device,
    fused_params: dict[str, Any],
    choices: Mapping[str, tuple[str, ...]],
    local_world_size: int,
    batch_size: int,
    messages: Precision = Precision.FP32,
    replicated: bool = False,
) -> DistributedModelParallel:
    """Let TorchRec's planner place the tables of ``module``, and replicate the rest.

    Args:
        module: a task with one EmbeddingCollection. schema: its tables. device: of this rank.
        fused_params: the tables' optimiser (`fused_params`).
        choices: table -> sharding types that the planner may take; any where not named.
        local_world_size: ranks of one host. batch_size: users of a rank, for the planner's estimates.
        messages: what looked-up rows, and their gradients, travel in.
        replicated: every rank holds all tables, as plain weights whose gradients are averaged.

    Raises:
        ValueError: ``messages`` are bf16 on a CPU, where gloo has none; the planner finds no placement, or one that
            FBGEMM cannot serve; names the choices.
    """
    if messages is Precision.BF16 and device.type != "cuda":
        raise ValueError("run.messages: expected fp32 on a CPU, got bf16; gloo carries no bf16")
    if replicated:
        # Not "data_parallel": FBGEMM's dense lookup of sequences has no CPU form (1.6).
        return DistributedModelParallel(module, device=device, plan=ShardingPlan({}), sharders=[])
    logging.getLogger("torchrec.distributed.planner").setLevel(logging.ERROR)
    world = dist.get_world_size()
    memory = {}
    if device.type == "cuda":
        # The planner's own guess is 32 GiB.
        memory = {"hbm_cap": torch.cuda.get_device_properties(device).total_memory}
    topology = Topology(world_size=world, compute_device=device.type, local_world_size=local_world_size, **memory)
    width = next(part.embedding_dim for part in _tables(module))
    allowed = _allowed(schema, choices, world, device)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=max(1, batch_size),
        constraints={
            name: ParameterConstraints(
                sharding_types=list(types),
                # A column shard narrower than the kernels' vectors of 4 is not allowed.
                min_partition=max(4, width // world) if "column_wise" in types else None,
            )
            for name, types in allowed.items()
        },
        storage_reservation=FixedPercentageStorageReservation(_RESERVED),
        debug=False,
    )
    codecs = get_qcomm_codecs_registry(_COMMS[messages], device=device)
    sharders: list[ModuleSharder[nn.Module]] = [EmbeddingCollectionSharder(fused_params, codecs)]
    try:
        plan = planner.collective_plan(module, sharders, dist.group.WORLD)
    except Exception as error:
        wanted = {table.name: choices.get(table.name, "any") for table in schema.tables}
        raise ValueError(f"sharding: TorchRec's planner finds no placement for {wanted}: {error}") from error
    return DistributedModelParallel(module, device=device, plan=plan, sharders=sharders)


def _allowed(
    schema: FeatureSchema, choices: Mapping[str, tuple[str, ...]], world: int, device: torch.device
) -> dict[str, tuple[str, ...]]:
    """The choices without those that FBGEMM's CPU kernels cannot serve: a rank without a single row of a table."""
    allowed = dict(choices)
    for table in schema.tables:
        rows_a_rank = -(-table.num_embeddings // world)
        if device.type != "cpu" or rows_a_rank * (world - 1) < table.num_embeddings:
            continue
        if "row_wise" in choices.get(table.name, ()):
            raise ValueError(
                f"sharding: table {table.name!r} has {table.num_embeddings} rows, too few for row_wise over {world} "
                "ranks on CPUs: some rank would hold none; choose table_wise"
            )
        if table.name not in choices:
            allowed[table.name] = tuple(kind.value for kind in ShardingType if "row_wise" not in kind.value)
    return allowed


def describe_plan(plan: ShardingPlan, schema: FeatureSchema, embedding_dim: int) -> str:
    """The placement as a table of text: rows, width, GiB of weights, sharding, kernel, ranks."""
    table = RichTable(title="Placement of the embedding tables")
    for name in ("table", "rows", "width", "weights GiB", "sharding", "kernel", "ranks"):
        table.add_column(name, justify="right" if name in ("rows", "width", "weights GiB") else "left")
    rows = {t.name: t.num_embeddings for t in schema.tables}
    if not plan.plan:
        for name, count in rows.items():
            cells = (name, f"{count:,}", str(embedding_dim), f"{count * embedding_dim * 4 / 2**30:.3f}")
            table.add_row(*cells, "replicated", "torch", "all")
    for module in plan.plan.values():
        assert isinstance(module, EmbeddingModuleShardingPlan)
        for name, placed in module.items():
            size = rows[name] * embedding_dim * 4 / 2**30
            ranks = "all" if placed.ranks is None else ", ".join(map(str, sorted(set(placed.ranks))))
            cells = (name, f"{rows[name]:,}", str(embedding_dim), f"{size:.3f}")
            table.add_row(*cells, placed.sharding_type, placed.compute_kernel, ranks)
    text = io.StringIO()
    Console(file=text, width=110, color_system=None).print(table)
    return text.getvalue().rstrip()


def draw_tables(model: DistributedModelParallel, seed: int) -> None:
    """Draw all tables from N(0, 0.02), such that a weight depends on (seed, table, row, column) and on no placement.

    Row 0, padding or what is unknown, starts at zero, as in the other doors.
    """
    with torch.no_grad():
        for name, rows, columns, width, local in _shards(model):
            key = zlib.crc32(name.encode())
            for chunk in range(rows // _CHUNK, -(-(rows + local.shape[0]) // _CHUNK)):
                generator = torch.Generator(local.device).manual_seed(seed + (key << 20) + chunk)
                drawn = torch.randn(_CHUNK, width, generator=generator, device=local.device) * _INIT_STD
                begin, end = max(rows, chunk * _CHUNK), min(rows + local.shape[0], (chunk + 1) * _CHUNK)
                part = drawn[begin - chunk * _CHUNK : end - chunk * _CHUNK, columns : columns + local.shape[1]]
                local[begin - rows : end - rows] = part.to(local.dtype)
            if rows == 0:
                local[:1] = 0


def _shards(model: DistributedModelParallel) -> Iterator[tuple[str, int, int, int, Tensor]]:
    """(table, first row, first column, whole width, weights) of this rank's parts."""
    for name, value in model.state_dict().items():
        if ".embeddings." not in f".{name}" or not name.endswith(".weight") or not name.startswith("embeddings."):
            continue
        if isinstance(value, ShardedTensor):
            for shard in value.local_shards():
                first, column = shard.metadata.shard_offsets
                yield name, first, column, value.metadata().size[1], shard.tensor
        else:
            yield name, 0, 0, value.shape[1], value


def _tables(module: nn.Module) -> Any:
    from torchrec.modules.embedding_modules import EmbeddingCollection

    return (
        config
        for part in module.modules()
        if isinstance(part, EmbeddingCollection)
        for config in part.embedding_configs()
    )
