"""``python -m benchmarks.synthetic_streaming``: pointwise against softmax attention on a vocabulary that grows.

The experiment of HSTU (arXiv 2402.17152, section 4.1.1): records of 128 items from a Dirichlet process over a few
categories; 40 % of the items exist at first, the rest appear at equal intervals. One pass over the first 90 % of the
records, hit rate of the last item over the rest. What must hold is the order Transformer < HSTU with softmax < HSTU.

All sides share item vectors, loss, optimiser, width and depth; the softmax side differs from HSTU in the attention's
normalisation alone, and neither has a relative bias, as in the paper. Where the paper is silent: a record picks its
number of categories evenly from 1 to 5, and an item evenly among those of the category that exist by then.

With several learning rates, each side first tries all of them on a shorter stream of another seed, and goes on with the
one of its best HR@50 there.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks.ledger import RESULTS
from benchmarks.machine import provenance
from hstu_kernels import JaggedLayout
from hstu_kernels.bias import position_index
from hstu_plugin.config import HSTUConfig, LossType, RetrievalConfig
from hstu_plugin.embedding import SequenceEmbedding, init_item_table
from hstu_plugin.encoder import HSTUEncoder
from hstu_plugin.losses import normalise
from hstu_plugin.sequence import JaggedSequence
from hstu_plugin.shared_negatives import shared_negatives_loss

MODELS = ("transformer", "hstu-softmax", "hstu")
_TUNING_SEED = 1000
_PATH = click.Path(path_type=Path, dir_okay=False)


@dataclass(frozen=True, kw_only=True)
class World:
    """Constants of the data."""

    items: int = 20_000
    categories: int = 100
    records: int = 1_000_000
    length: int = 128
    picks: int = 5
    available: float = 0.4
    train_share: float = 0.9
    largest_alpha: float = 500.0


def make_records(world: World, first: int, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """``[count, length]`` int64 item ids from 1, of the records from ``first`` on."""

    def draw(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, device=device)

    alpha = 1 + draw(count) * (world.largest_alpha - 1)
    order = draw(count, world.categories).argsort(1)[:, : world.picks]
    picks = 1 + (draw(count) * world.picks).long().clamp(max=world.picks - 1)
    counts = torch.zeros(count, world.picks, device=device)
    size = world.items // world.categories
    progress = torch.arange(first, first + count, device=device) / max(1, world.records - 1)
    existing = (size * (world.available + (1 - world.available) * progress)).long().clamp(1, size)
    columns = []
    for n in range(1, world.length + 1):
        fresh = draw(count) < alpha / (alpha + n - 1)
        by_fresh = (draw(count) * picks).long().clamp(max=world.picks - 1)
        # The share of a category among the n - 1 items before; the first item is always fresh.
        reached = counts.cumsum(1) / max(1, n - 1)
        by_count = (reached <= draw(count, 1)).sum(1).clamp(max=world.picks - 1)
        place = torch.where(fresh, by_fresh, by_count)
        counts.scatter_add_(1, place[:, None], torch.ones(count, 1, device=device))
        category = order.gather(1, place[:, None]).squeeze(1)
        item = (draw(count) * existing).long().clamp(max=size - 1)
        columns.append(1 + category * size + item)
    return torch.stack(columns, 1)


class Side(nn.Module):
    """One model: item vectors in, a row for every position out."""

    def __init__(
        self,
        name: str,
        world: World,
        *,
        dim: int,
        layers: int,
        heads: int,
        dropout: float,
        position_bias: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.length = name, world.length
        self.items = nn.Embedding(world.items + 1, dim, padding_idx=0)
        init_item_table(self.items.weight)
        self.config = HSTUConfig(
            embedding_dim=dim,
            num_layers=layers,
            num_heads=heads,
            max_seq_len=world.length,
            time_bias=False,
            position_bias=position_bias,
            dropout=dropout,
        )
        self.embedding = SequenceEmbedding(self.config)
        self.encoder: nn.Module
        if name == "transformer":
            block = nn.TransformerEncoderLayer(
                dim, heads, 4 * dim, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            self.encoder = nn.TransformerEncoder(block, layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        else:
            self.encoder = HSTUEncoder(self.config)

    def forward(self, records: Tensor) -> Tensor:
        """``[B, n]`` ids to rows ``[B, n, D]``."""
        count, length = records.shape
        lengths = torch.full((count,), length, device=records.device)
        layout = JaggedLayout.from_lengths(lengths, max_seq_len=length)
        seq = self.embedding(JaggedSequence(self.items(records.flatten()), layout))
        if self.name == "transformer":
            hidden = torch.ones(length, length, dtype=torch.bool, device=records.device).triu(1)
            rows: Tensor = self.encoder(seq.values.view(count, length, -1), mask=hidden, is_causal=True)
            return rows
        assert isinstance(self.encoder, HSTUEncoder)
        if self.name == "hstu":
            return self.encoder(seq).values.view(count, length, -1)  # type: ignore[no-any-return]
        x = seq.values
        for layer in self.encoder.first_layers:
            x = layer.through(x, SoftmaxAttention(layer.pos_table, self.config.alpha, length))
        return x.view(count, length, -1)


@dataclass(frozen=True, slots=True)
class SoftmaxAttention:
    """Causal ``softmax(alpha * q . k + rab) v`` over records of one length."""

    pos_table: Tensor | None
    alpha: float
    length: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = torch.arange(self.length, device=q.device)
        hidden = places[None, :] > places[:, None]
        added = torch.zeros(self.length, self.length, dtype=q.dtype, device=q.device)
        if self.pos_table is not None:
            added = self.pos_table[position_index(places[:, None], places[None, :], self.pos_table)].to(q.dtype)
        q, k, v = (x.unflatten(0, (-1, self.length)).transpose(1, 2) for x in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=added.masked_fill(hidden, -torch.inf), scale=self.alpha
        )
        return out.transpose(1, 2).flatten(0, 1)


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
@click.option("--records", default=World.records, show_default=True)
@click.option("--items", default=World.items, show_default=True)
@click.option("--length", default=World.length, show_default=True)
@click.option("--dim", default=128, show_default=True)
@click.option("--layers", default=2, show_default=True)
@click.option("--heads", default=2, show_default=True)
@click.option("--dropout", default=0.0, show_default=True)
@click.option("--position-bias/--no-position-bias", default=False, show_default=True, help="Of both sides of HSTU.")
@click.option("--batch-size", default=256, show_default=True)
@click.option(
    "--learning-rate", "learning_rates", multiple=True, type=float, default=(3e-4, 1e-3, 3e-3), show_default=True
)
@click.option("--tuning-records", default=200_000, show_default=True, help="Of the stream that rates are tried on.")
@click.option("--negatives", default=1024, show_default=True, help="Drawn for each batch, shared by its rows.")
@click.option("--jobs", default=1, show_default=True, help="Trainings at the same time.")
@click.option("--device", default=None, help="Default: cuda where there is one, else cpu.")
@click.option("--output", type=_PATH, default=RESULTS / "synthetic-streaming.json", show_default=True)
@click.option("--commit", help="To record. Default: that of this checkout.")
def main(
    models: tuple[str, ...],
    seeds: tuple[int, ...],
    records: int,
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
    world = World(records=records, items=items, length=length)
    tried: list[dict[str, Any]] = []
    best = dict.fromkeys(models, learning_rates[0])
    with _pool(jobs) as pool:
        if len(learning_rates) > 1:
            shorter = replace(world, records=min(tuning_records, records))
            asked = [Job(m, _TUNING_SEED, rate, shorter, place, options) for rate in learning_rates for m in models]
            tried = _run(asked, pool)
            best = {m: max((t for t in tried if t["model"] == m), key=_merit)["learning_rate"] for m in models}
        runs = _run([Job(m, seed, best[m], world, place, options) for seed in seeds for m in models], pool)
    summary = {m: _spread([run for run in runs if run["model"] == m]) for m in models}
    for name, found in summary.items():
        click.echo(f"{name:13} rate {best[name]:g} HR@10 {found['hr@10']:.4f} +- {found['hr@10_std']:.4f}")
    report = provenance(torch.device(place), commit) | {
        "world": asdict(world),
        "options": options,
        "learning_rates": best,
        "summary": summary,
        "tuning": tried,
        "runs": runs,
    }
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
    for metric in ("hr@10", "hr@50"):
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
    """One pass over the training records, then HR@10 and HR@50 of the last item of the others."""
    torch.manual_seed(seed)
    model = Side(name, world, **shape).to(device)
    retrieval = RetrievalConfig(loss=LossType.SAMPLED_SOFTMAX, num_negatives=negatives)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=on_gpu
    )
    # Data of its own seed: every side sees the same records.
    generator = torch.Generator(device=device).manual_seed(seed)
    trained = int(world.records * world.train_share)
    begin, losses = time.perf_counter(), []
    model.train()
    for batch in _batches(world, 0, trained, batch_size, generator, device):
        positives = batch[:, 1:].flatten()
        drawn = torch.randint(1, world.items + 1, (negatives,), generator=generator, device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_gpu):
            rows = model(batch[:, :-1]).flatten(0, 1)
            vectors = model.items(positives), model.items(drawn)
            loss = shared_negatives_loss(rows, positives, vectors[0], drawn, vectors[1], retrieval)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    hits = {10: 0, 50: 0}
    model.eval()
    with torch.no_grad():
        table = normalise(model.items.weight, retrieval.similarity)[1:]
        for batch in _batches(world, trained, world.records, batch_size, generator, device):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_gpu):
                last = model(batch[:, :-1])[:, -1]
            users = normalise(last.float(), retrieval.similarity)
            best = (users @ table.T).topk(max(hits), dim=1).indices + 1
            found = best == batch[:, -1:]
            for k in hits:
                hits[k] += int(found[:, :k].any(1).sum())
    tested = world.records - trained
    tail = torch.stack(losses[-max(1, len(losses) // 10) :]).mean()
    seconds = time.perf_counter() - begin
    return {"hr@10": hits[10] / tested, "hr@50": hits[50] / tested, "last_loss": float(tail), "seconds": seconds}


def _batches(
    world: World, first: int, last: int, size: int, generator: torch.Generator, device: torch.device
) -> Iterator[Tensor]:
    """Records in the order of time, made in larger pieces."""
    piece = size * 32
    for begin in range(first, last, piece):
        made = make_records(world, begin, min(piece, last - begin), generator, device)
        yield from made.split(size)


if __name__ == "__main__":
    main()
