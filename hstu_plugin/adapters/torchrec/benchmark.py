"""Training throughput on this process group, with synthetic data: one JSON record.

Weak scaling: every rank has as many users in a step whatever the number of ranks, so that samples per second on n ranks
against n times those on one is the efficiency. The lengths of a step are drawn for all ranks together and dealt out by
length, as the trainer's length buckets do: a step takes as long as its longest rank. A block is as many steps as there
are batches, timed on the device without a wait in between, by its slowest rank; what counts is the median of blocks,
which a short disturbance from elsewhere on the host does not move. Model FLOPs are those of the transducer under its
mask and of the loss's products, three times the forward; they are set against the rate of a large matrix product
measured in the same run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from hstu_plugin._versions import runtime_versions, source_commit
from hstu_plugin.adapters.torchrec.batch import SequenceBatch, keyed_jagged
from hstu_plugin.adapters.torchrec.fused import fused_params
from hstu_plugin.adapters.torchrec.options import OptimOptions, Precision
from hstu_plugin.adapters.torchrec.retrieval import HSTURetrievalModel, HSTURetrievalTask
from hstu_plugin.adapters.torchrec.schema import FeatureSchema, Table
from hstu_plugin.adapters.torchrec.sharding import describe_plan, shard_model
from hstu_plugin.adapters.torchrec.train import join_group
from hstu_plugin.config import HSTUConfig, RetrievalConfig
from hstu_plugin.flops import TRAINING_FACTOR, sequence_flops
from hstu_plugin.optim import dense_adamw
from hstu_plugin.records import machine, write_json

_NOW, _TIMEOUT_S, _BATCHES = 1_700_000_000, 600, 4
# Rows of the profile's table; matrix products, or messages, between two waits.
_TABLE_ROWS, _IN_A_ROW = 60, 8


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured. ``users`` are those of one rank and step; lengths lie in ``[shortest, max_seq_len]``, where a
    ``shortest`` of 0 stands for a quarter of ``max_seq_len``."""

    users: int = 32
    max_seq_len: int = 2048
    shortest: int = 0
    variant: str = "research"
    embedding_dim: int = 512
    num_layers: int = 8
    num_heads: int = 4
    rows: int = 10_000_000
    negatives: int = 1024
    steps: int = 80
    warmup: int = 20
    backend: str = "auto"
    precision: str = "bf16"
    messages: str = "fp32"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="hstu_plugin.adapters.torchrec.benchmark", description=__doc__)
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write")
    parser.add_argument("--profile", type=Path, help="text file for a table of rank 0's operations, after the timing")
    for name, default in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parsed = vars(parser.parse_args(arguments))
    output, table = parsed.pop("output"), parsed.pop("profile")
    device, local_world_size = join_group(_TIMEOUT_S)
    record, steps = measure(Sizes(**parsed), device, local_world_size)
    if dist.get_rank() == 0:
        write_json(output, record)
        print(f"{record['samples_per_second']:.1f} samples/s on {record['world_size']}, MFU {record['mfu']:.3f}")
    if table is not None:
        _write_profile(table, steps)
    dist.destroy_process_group()
    return 0


def measure(sizes: Sizes, device: torch.device, local_world_size: int) -> tuple[dict[str, Any], Callable[[], object]]:
    """Train on batches made before the clock starts; the record of this group, and what runs some steps more."""
    config = HSTUConfig(
        embedding_dim=sizes.embedding_dim,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        max_seq_len=sizes.max_seq_len,
        dropout=0.0,
        variant=sizes.variant,  # type: ignore[arg-type]
        backend=sizes.backend,  # type: ignore[arg-type]
    )
    schema = FeatureSchema(
        time="time" if config.time_bias else None,
        negative="negative",
        tables=(Table(name="item", num_embeddings=sizes.rows, features=("item_id", "negative")),),
    )
    retrieval = RetrievalConfig(loss="sampled_softmax", num_negatives=sizes.negatives)  # type: ignore[arg-type]
    torch.manual_seed(0)
    autocast = torch.bfloat16 if sizes.precision == "bf16" else None
    model = HSTURetrievalModel(config, schema, retrieval, device=torch.device("meta"))
    parallel = shard_model(
        HSTURetrievalTask(model, autocast=autocast),
        schema,
        device=device,
        fused_params=fused_params(OptimOptions(), device),
        choices={"item": ("row_wise",)},
        messages=Precision(sizes.messages),
        local_world_size=local_world_size,
        batch_size=sizes.users,
    )
    dense = dict(in_backward_optimizer_filter(parallel.named_parameters()))
    optimizer = CombinedOptimizer([parallel.fused_optimizer, KeyedOptimizerWrapper(dense, dense_adamw)])
    rank, world = dist.get_rank(), dist.get_world_size()
    made = [_batch(sizes, seed, rank, world) for seed in range(_BATCHES)]
    if device.type == "cuda":
        made = [batch.pin_memory() for batch in made]
    batches = (made[i % _BATCHES] for i in count())
    pipeline = TrainPipelineSparseDist(parallel, optimizer, device, execute_all_batches=True)
    for _ in range(sizes.warmup):
        pipeline.progress(batches)
    _meet(device)
    block = min(_BATCHES, sizes.steps)
    marks = [_mark(device)]
    for step in range(1, sizes.steps + 1):
        loss, _ = pipeline.progress(batches)
        if step % block == 0:
            marks.append(_mark(device))
    _meet(device)
    # A step ends where its slowest rank does.
    taken = torch.tensor([_between(*pair) / block for pair in pairwise(marks)], dtype=torch.float64, device=device)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    seconds = float(taken.quantile(0.5))
    flops = sum(_flops(config, batch, sizes) for batch in made) / _BATCHES
    peak = matrix_rate(device, torch.bfloat16 if autocast else torch.float32)
    record = {
        "sizes": asdict(sizes),
        "world_size": world,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "seconds_per_step": seconds,
        "seconds_per_step_p20_p80": [float(taken.quantile(share)) for share in (0.2, 0.8)],
        "seconds_per_step_mean": float(taken.mean()),
        "samples_per_second": sizes.users * world / seconds,
        "rows_per_second": sum(int(b.features["item_id"].values().numel()) for b in made) / _BATCHES * world / seconds,
        "model_flops_per_step_and_rank": flops,
        "matrix_flops_per_second": peak,
        "mfu": flops / seconds / peak,
        "messages": _message_rates(sizes, dense, device) if world > 1 else None,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "loss_is_finite": bool(torch.isfinite(loss)),
        "placement": describe_plan(parallel.plan, schema, sizes.embedding_dim),
        "commit": source_commit(),
        "versions": runtime_versions(),
        "machine": machine(),
    }
    return record, lambda: [pipeline.progress(batches) for _ in range(_BATCHES)]


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product: 8192 wide on CUDA, 1024 elsewhere; the best of five times eight."""
    width = 8192 if device.type == "cuda" else 1024
    a = torch.randn(width, width, device=device, dtype=dtype)
    return 2 * width**3 / _best_seconds(lambda: a @ a, device)


def _message_rates(sizes: Sizes, dense: dict[str, torch.Tensor], device: torch.device) -> dict[str, float]:
    """Bytes that leave a rank, by second, in messages as large as the step's: looked-up rows and dense gradients."""
    world = dist.get_world_size()
    # The same on all ranks, whose own batches differ by some rows.
    rows = sizes.users * (_shortest(sizes) + sizes.max_seq_len) // 2 // world * world
    dtype = torch.bfloat16 if sizes.messages == Precision.BF16 else torch.float32
    sent = torch.ones(rows, sizes.embedding_dim, device=device, dtype=dtype)
    received = torch.empty_like(sent)
    grads = torch.ones(sum(weight.numel() for weight in dense.values()), device=device)
    exchange = _best_seconds(lambda: dist.all_to_all_single(received, sent), device)
    reduce = _best_seconds(lambda: dist.all_reduce(grads), device)
    others = (world - 1) / world
    return {
        "all_to_all_bytes": others * sent.nbytes,
        "all_to_all_bytes_per_second": others * sent.nbytes / exchange,
        "all_reduce_bytes": 2 * others * grads.nbytes,
        "all_reduce_bytes_per_second": 2 * others * grads.nbytes / reduce,
    }


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call among several in a row; the best of five, behind one that warms up."""
    best = float("inf")
    for _ in range(6):
        _synchronise(device)
        begin = time.perf_counter()
        for _ in range(_IN_A_ROW):
            call()
        _synchronise(device)
        best = min(best, (time.perf_counter() - begin) / _IN_A_ROW)
    return best


def _write_profile(path: Path, steps: Callable[[], object]) -> None:
    """The operations of some steps, those first that take longest; all ranks run, rank 0 writes."""
    on_cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as seen:
        steps()
        if on_cuda:
            torch.cuda.synchronize()
    if dist.get_rank() == 0:
        longest = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
        table = seen.key_averages().table(sort_by=longest, row_limit=_TABLE_ROWS, max_name_column_width=90)
        path.write_text(table, encoding="utf-8")


def _mark(device: torch.device) -> torch.cuda.Event | float:
    """A moment: on CUDA one of the device, which nobody waits for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _between(begin: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    """Seconds between two marks."""
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin
    return float(begin.elapsed_time(end)) / 1e3


def _shortest(sizes: Sizes) -> int:
    return sizes.shortest or max(2, sizes.max_seq_len // 4)


def _batch(sizes: Sizes, seed: int, rank: int, world: int) -> SequenceBatch:
    draw = torch.Generator().manual_seed(seed)
    lengths = _dealt(
        torch.randint(_shortest(sizes), sizes.max_seq_len + 1, (sizes.users * world,), generator=draw), rank, world
    )
    own = torch.Generator().manual_seed(seed * world + rank)
    lengths = lengths[torch.randperm(sizes.users, generator=own)]
    total = int(lengths.sum())
    items = torch.split(torch.randint(1, sizes.rows, (total,), generator=own), lengths.tolist())
    times = torch.split(_NOW + torch.randint(1, 4000, (total,), generator=own).cumsum(0), lengths.tolist())
    none = torch.zeros(0, dtype=torch.int64)
    drawn = torch.randint(1, sizes.rows, (sizes.negatives,), generator=draw)
    features = {"item_id": items, "negative": [drawn, *[none] * (sizes.users - 1)]}
    return SequenceBatch(keyed_jagged(features), keyed_jagged({"time": times}))


def _dealt(lengths: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """A rank's share ``[users]`` of the lengths ``[users * world]``: from the longest on, to and fro over the ranks."""
    rounds = lengths.sort(descending=True).values.view(-1, world)
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds[:, rank]


def _flops(config: HSTUConfig, batch: SequenceBatch, sizes: Sizes) -> float:
    lengths = batch.features["item_id"].lengths()
    forward = float(sequence_flops(config, lengths).total.sum())
    scored = 2.0 * float((lengths - 1).sum()) * sizes.negatives * sizes.embedding_dim
    return TRAINING_FACTOR * (forward + scored)


def _meet(device: torch.device) -> None:
    _synchronise(device)
    dist.barrier()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
