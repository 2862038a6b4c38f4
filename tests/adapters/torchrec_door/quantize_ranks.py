"""One rank of the test of sharded quantisation, a process of its own: ``python -m ... RANK RANKS STORE OUT``."""

from __future__ import annotations

import copy
import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from hstu_plugin.adapters.torchrec.fused import fused_params
from hstu_plugin.adapters.torchrec.options import OptimOptions
from hstu_plugin.adapters.torchrec.quantize import quantize_embeddings, tables_of_collection
from hstu_plugin.adapters.torchrec.sharded_rows import row_blocks, table_weights
from hstu_plugin.adapters.torchrec.sharding import _shards, shard_model
from hstu_plugin.quantize import QuantizeConfig, Quantized

from .cases import RANKING, ranking_batch, ranking_model

CPU = torch.device("cpu")
PLACES = {"item": ("row_wise",), "action": ("column_wise",), "user": ("table_wise",)}
BATCH = ranking_batch()
COUNTS = {"embeddings.embeddings.item": torch.arange(40), "embeddings.embeddings.user": torch.ones(20).long()}


def numbers(model: nn.Module) -> Tensor:
    scores: Tensor = model(BATCH.features, BATCH.numbers)
    return scores.detach()


def evaluate(model: nn.Module) -> dict[str, float]:
    return {"mean": numbers(model).double().mean().item()}


def quantized(model: nn.Module, row_format: str) -> Quantized:
    config = QuantizeConfig(ranges="search", search_coverage=0.9)  # type: ignore[arg-type]
    return quantize_embeddings(model, row_format, config=config, frequencies=COUNTS, evaluate=evaluate)


def sharded(plain: nn.Module) -> Any:
    """The same model with its tables spread over the ranks."""
    weights = {f"embeddings.embeddings.{name}.weight": w for name, w in table_weights(plain.embeddings).items()}  # type: ignore[arg-type]
    model = shard_model(
        copy.deepcopy(plain),
        RANKING,
        device=CPU,
        fused_params=fused_params(OptimOptions(tables="sgd", table_lr=0.1), CPU),
        choices=PLACES,
        local_world_size=2,
        batch_size=4,
    )
    with torch.no_grad():
        for name, row, column, _, local in _shards(model):
            local.copy_(weights[name][row : row + local.shape[0], column : column + local.shape[1]])
    return model


def main(rank: int, ranks: int, store: str, out: Path) -> None:
    """Quantise a sharded model and its unsharded twin, and write what they have in common."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    plain = ranking_model().eval()
    found: dict[str, Any] = {}
    whole = {name: weight.detach().clone() for name, weight in table_weights(plain.embeddings).items()}
    model = sharded(plain)
    placed = table_weights(model.module.embeddings)
    found["sharded"] = sorted(name for name, weight in placed.items() if type(weight) is not Tensor)
    for elements in (8, 24, 1 << 20):
        for name, weight in placed.items():
            blocks = list(row_blocks(weight, elements))
            assert [begin for begin, _ in blocks] == list(range(0, whole[name].shape[0], max(1, elements // 8)))
            assert torch.equal(torch.cat([block for _, block in blocks]), whole[name]), name
    for row_format in ("int4", "int8"):
        mine, theirs = quantized(copy.deepcopy(plain), row_format), quantized(sharded(plain), row_format)
        tables = [tables_of_collection(done.module.embeddings) for done in (mine, theirs)]  # type: ignore[arg-type]
        found[row_format] = {
            "tables": sorted(tables[1]),
            "bytes": all(torch.equal(tables[0][name].data, tables[1][name].data) for name in tables[0]),
            "scores": torch.equal(numbers(mine.module), numbers(theirs.module)),
            "report": mine.report.tables == theirs.report.tables,
            "before": abs(mine.report.metrics_before["mean"] - theirs.report.metrics_before["mean"]),
            "after": mine.report.metrics_after == theirs.report.metrics_after,
            "changed": mine.report.metrics_before["mean"] != mine.report.metrics_after["mean"],
        }
    for *_, local in _shards(model):
        if rank == 0:
            local[0] = torch.nan
    try:
        quantize_embeddings(model)
    except ValueError as error:
        found["refused"] = str(error)
    out.write_text(json.dumps(found), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
