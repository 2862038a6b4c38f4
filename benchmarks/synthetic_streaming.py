"""``python -m benchmarks.synthetic_streaming``: pointwise against softmax attention on a vocabulary that grows.

The experiment of HSTU (arXiv 2402.17152, section 4.1.1) on records of 128 items from a Dirichlet process over a few
categories; 40 % of the items exist at first, the rest appear at equal intervals. One pass over the first 90 % of the
records, in order; hit rate of the next item over the second half of every other record. What must hold is the order
Transformer < HSTU with softmax < HSTU.

All sides share item vectors, loss, optimiser, width and depth; the softmax side differs from HSTU in the attention's
normalisation alone, and neither has a relative bias, as in the paper. Attention without softmax starts near zero: a
small ``--norm-eps`` lets its norm bring it to size from the first step. Items of a category are alike, so nobody gets
beyond naming items of the category that a record has most of; ``counting`` is what that reaches. After enough records
every side comes close to it: what differs is how soon. So several lengths of the stream are tried.

With several learning rates, each side first tries all of them on a stream of another seed and of the same length, or
of ``--tuning-records`` where that is less, and goes on with the one of its best HR@50 there.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.ledger import RESULTS
from benchmarks.machine import provenance
from benchmarks.streaming_sides import MODELS, Side
from benchmarks.streaming_world import World, batches, counting_hits
from hstu_plugin.config import LossType, RetrievalConfig
from hstu_plugin.losses import normalise
from hstu_plugin.shared_negatives import shared_negatives_loss

_TUNING_SEED = 1000
_HITS = (10, 50)
_TESTED_AT_ONCE = 64
_PATH = click.Path(path_type=Path, dir_okay=False)


@dataclass(frozen=True, slots=True)
class Job:
    """One training of one side."""

    model: str
    seed: int
    learning_rate: float
    world: World
    device: str
    options: dict[str, Any]

    def __call__(self) -> dict[str, Any]:
        torch.set_num_threads(1)
        found = run_one(
            self.model, self.world, self.seed, torch.device(self.device), self.learning_rate, **self.options
        )
        about = {"model": self.model, "seed": self.seed, "learning_rate": self.learning_rate}
        return about | {"records": self.world.records} | found


@click.command(help=__doc__, context_settings={"max_content_width": 110})
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS), default=MODELS, show_default=True)
@click.option("--seed", "seeds", multiple=True, type=int, default=(1, 2, 3), show_default=True)
@click.option(
    "--records", "sizes", multiple=True, type=int, default=(25_000, 50_000, 100_000, 200_000), show_default=True,
    help="Of a stream; recorded one after the other.",
)  # fmt: skip
@click.option("--items", default=World.items, show_default=True)
@click.option("--length", default=World.length, show_default=True)
@click.option("--dim", default=128, show_default=True)
@click.option("--layers", default=2, show_default=True)
@click.option("--heads", default=2, show_default=True)
@click.option("--dropout", default=0.0, show_default=True)
@click.option("--norm-eps", default=1e-10, show_default=True, help="Of the norms of HSTU, with softmax and without.")
@click.option("--batch-size", default=128, show_default=True)
@click.option(
    "--learning-rate", "learning_rates", multiple=True, type=float, default=(1e-4, 3e-4, 1e-3, 3e-3), show_default=True
)
@click.option(
    "--tuning-records", default=100_000, show_default=True, help="Of the longest stream that rates are tried on."
)
@click.option("--negatives", default=256, show_default=True, help="Drawn for each batch, shared by its rows.")
@click.option("--jobs", default=1, show_default=True, help="Trainings at the same time.")
@click.option("--device", default=None, help="Default: cuda where there is one, else cpu.")
@click.option("--output", type=_PATH, default=RESULTS / "synthetic-streaming.json", show_default=True)
@click.option("--commit", help="To record. Default: that of this checkout.")
def main(
    models: tuple[str, ...],
    seeds: tuple[int, ...],
    sizes: tuple[int, ...],
    items: int,
    length: int,
    learning_rates: tuple[float, ...],
    tuning_records: int,
    jobs: int,
    device: str | None,
    output: Path,
    commit: str | None,
    **options: Any,
) -> None:
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    world = World(items=items, length=length)
    report = provenance(torch.device(place), commit) | {"world": asdict(world), "options": options}
    del report["world"]["records"]
    report |= {"sizes": [], "tuning": [], "runs": []}
    best: dict[int, dict[str, float]] = {}
    with _pool(jobs) as pool:
        for size in sizes:
            tuned = min(size, tuning_records)
            if tuned not in best:
                best[tuned] = dict.fromkeys(models, learning_rates[0])
                if len(learning_rates) > 1:
                    on = replace(world, records=tuned)
                    asked = [Job(m, _TUNING_SEED, rate, on, place, options) for rate in learning_rates for m in models]
                    tried = _run(asked, pool)
                    report["tuning"] += tried
                    for m in models:
                        best[tuned][m] = max((t for t in tried if t["model"] == m), key=_merit)["learning_rate"]
            longer, rates = replace(world, records=size), best[tuned]
            runs = _run([Job(m, seed, rates[m], longer, place, options) for seed in seeds for m in models], pool)
            about = {"records": size, "tuning_records": tuned, "learning_rates": rates}
            report["sizes"] = sorted(
                [*report["sizes"], about | summarise(runs, models)], key=lambda s: int(s["records"])
            )
            report["runs"] += runs
            # One size at a time, so that a run that is cut off keeps what it has.
            _write(output, report)
    click.echo(markdown(report["sizes"]))


def summarise(runs: Sequence[dict[str, Any]], models: Sequence[str]) -> dict[str, Any]:
    """Means and standard deviations over the seeds, and how far each model is ahead of the one named before it."""
    out: dict[str, Any] = {"models": {m: _spread([run for run in runs if run["model"] == m]) for m in models}}
    out["counting"] = {f"hr@{k}": statistics.fmean(run[f"counting@{k}"] for run in runs) for k in _HITS}
    out["gaps"] = []
    for lower, upper in pairwise(models):
        gap: dict[str, Any] = {"of": upper, "over": lower}
        for metric in (f"hr@{k}" for k in _HITS):
            values = {m: {run["seed"]: run[metric] for run in runs if run["model"] == m} for m in (lower, upper)}
            # Sides of one seed saw the same records.
            differences = [values[upper][seed] - values[lower][seed] for seed in values[lower]]
            mean = statistics.fmean(values[lower].values())
            gap[metric] = {
                "difference": statistics.fmean(differences),
                "least": min(differences),
                "relative": statistics.fmean(differences) / mean if mean else None,
            }
        out["gaps"].append(gap)
    return out


def markdown(sizes: Sequence[dict[str, Any]]) -> str:
    """A table: a row for each length of the stream and side."""
    lines = ["| records | side | rate | HR@10 | HR@50 | HR@50 over the one above |", "|---:|---|---:|---:|---:|---:|"]
    for size in sizes:
        gaps = {gap["of"]: gap["hr@50"]["relative"] for gap in size["gaps"]}
        for name, found in size["models"].items():
            cells = [f"{size['learning_rates'][name]:g}"]
            cells += [f"{found[f'hr@{k}']:.4f} ± {found[f'hr@{k}_std']:.4f}" for k in _HITS]
            cells.append("" if gaps.get(name) is None else f"{gaps[name]:+.1%}")
            lines.append(" | ".join([f"| {size['records']:,}", name, *cells]) + " |")
        reached = [f"{size['counting'][f'hr@{k}']:.4f}" for k in _HITS]
        lines.append(" | ".join([f"| {size['records']:,}", "counting", "", *reached, ""]) + "|")
    return "\n".join(lines)


def _write(output: Path, report: dict[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_suffix(".part")
    part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    part.replace(output)


def _merit(run: dict[str, Any]) -> float:
    """HR@50, which is less noisy than HR@10; a run that diverged comes last."""
    return float(run["hr@50"]) if math.isfinite(run["last_loss"]) else -1.0


def _spread(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Means and standard deviations over the seeds."""
    out = {}
    for metric in (f"hr@{k}" for k in _HITS):
        values = [run[metric] for run in runs]
        out |= {metric: statistics.fmean(values), f"{metric}_std": statistics.stdev(values) if len(values) > 1 else 0.0}
    return out


def _pool(jobs: int) -> AbstractContextManager[Executor | None]:
    # Spawned: a process that has used CUDA cannot be forked.
    return nullcontext(None) if jobs == 1 else ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))


def _run(jobs: list[Job], pool: Executor | None) -> list[dict[str, Any]]:
    """Results in the order of ``jobs``, told as they come."""
    done: dict[int, dict[str, Any]] = {}

    def tell(index: int, found: dict[str, Any]) -> None:
        done[index] = found
        click.echo(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()))

    if pool is None:
        for index, job in enumerate(jobs):
            tell(index, job())
    else:
        futures = {pool.submit(job): index for index, job in enumerate(jobs)}
        for future in as_completed(futures):
            tell(futures[future], future.result())
    return [done[index] for index in range(len(jobs))]


def run_one(
    name: str,
    world: World,
    seed: int,
    device: torch.device,
    learning_rate: float,
    *,
    batch_size: int,
    negatives: int,
    **shape: Any,
) -> dict[str, float]:
    """One pass over the training records, then hit rates on the others."""
    torch.manual_seed(seed)
    side = Side(name, world, **shape).to(device)
    retrieval = RetrievalConfig(loss=LossType.SAMPLED_SOFTMAX, num_negatives=negatives)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        side.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=on_gpu
    )
    # Data of its own seed: every side sees the same records.
    generator = torch.Generator(device=device).manual_seed(seed)
    begin, losses = time.perf_counter(), []
    side.train()
    for _, batch in batches(world, 0, world.trained, batch_size, generator, device):
        drawn = torch.randint(1, world.items + 1, (negatives,), generator=generator, device=device)
        vectors = side.items(batch)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_gpu):
            rows = side(vectors[:, :-1]).flatten(0, 1)
            positives = batch[:, 1:].flatten(), vectors[:, 1:].flatten(0, 1)
            loss = shared_negatives_loss(rows, *positives, drawn, side.items(drawn), retrieval)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    tail = torch.stack(losses[-max(1, len(losses) // 10) :]).mean()
    found = evaluate(side, world, generator, device, retrieval)
    return found | {"last_loss": float(tail), "seconds": time.perf_counter() - begin}


@torch.no_grad()
def evaluate(
    side: Side, world: World, generator: torch.Generator, device: torch.device, retrieval: RetrievalConfig
) -> dict[str, float]:
    """Hit rates over the second half of every test record, and those of counting."""
    side.eval()
    table = normalise(side.items.weight, retrieval.similarity)[1:]
    first_place, total = world.length // 2, 0
    sums = torch.zeros(2, len(_HITS), dtype=torch.float64, device=device)
    for first, batch in batches(world, world.trained, world.records, _TESTED_AT_ONCE, generator, device):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            rows = side(side.items(batch[:, :-1]))[:, first_place - 1 :]
        ranks = ranks_of(normalise(rows.flatten(0, 1).float(), retrieval.similarity), table, batch[:, first_place:])
        for i, k in enumerate(_HITS):
            sums[0, i] += (ranks <= k).sum()
            sums[1, i] += counting_hits(world, batch, first, first_place, k).sum()
        total += len(ranks)
    rates = (sums / total).tolist()
    return {f"{what}@{k}": rates[i][j] for i, what in enumerate(("hr", "counting")) for j, k in enumerate(_HITS)}


def ranks_of(users: Tensor, table: Tensor, wanted: Tensor) -> Tensor:
    """``[R]`` places from 1 of the items ``wanted`` (ids from 1) by ``users [R, D] @ table.T``; ties come last."""
    scores = users @ table.T
    own = scores.gather(1, wanted.reshape(-1, 1) - 1)
    # Written so that a user vector of NaN finds nothing.
    return len(table) + 1 - (scores < own).sum(1) - own.squeeze(1).isfinite().long()


if __name__ == "__main__":
    main()
