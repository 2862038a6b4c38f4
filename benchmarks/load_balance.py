"""``python -m benchmarks.load_balance``: loads of simulated ranks under plain and load-balanced stochastic length.

The ranks are threads of one process that meet at every all-reduce; each draws its own users, with lengths as logs have
them (log-normal, cut at the longest). A load is a batch's operations under the model's mask. Reported is max/mean over
the ranks: what the slowest rank makes the others wait.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.ledger import RESULTS
from hstu_kernels import AttentionMask
from hstu_plugin._versions import runtime_versions, source_commit
from hstu_plugin.config import HSTUConfig, Variant
from hstu_plugin.ultra.load_balance import LoadBalanceConfig, LoadBalancedLength, LoadFunction, model_load
from hstu_plugin.ultra.stochastic_length import Sampling, StochasticLengthConfig, draw_lengths


@click.command(help=__doc__, context_settings={"max_content_width": 110})
@click.option("--ranks", default=8, show_default=True)
@click.option("--steps", default=400, show_default=True)
@click.option("--batch-size", default=32, show_default=True, help="Users of a rank's batch.")
@click.option("--max-seq-len", default=4096, show_default=True)
@click.option("--median-length", default=600.0, show_default=True)
@click.option("--spread", default=1.1, show_default=True, help="Standard deviation of the log-length.")
@click.option("--alpha", default=1.7, show_default=True, help="Of stochastic length.")
@click.option("--warmup-steps", default=20, show_default=True)
@click.option("--period", default=50, show_default=True)
@click.option("--tolerance", default=0.01, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=RESULTS / "load-balance.json",
    show_default=True,
)
def main(output: Path, **options: Any) -> None:
    report = simulate(**options)
    report |= {"commit": source_commit() or "unknown", "versions": runtime_versions()}
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_suffix(".part")
    part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    part.replace(output)
    for name in ("plain", "balanced"):
        found = report[name]
        click.echo(f"{name:9} max/mean load: mean {found['mean']:.4f}, worst {found['worst']:.4f}")
    click.echo(
        f"events kept: plain {report['plain']['events_kept']:.4f}, balanced {report['balanced']['events_kept']:.4f}"
    )


def simulate(
    *,
    ranks: int,
    steps: int,
    batch_size: int,
    max_seq_len: int,
    median_length: float,
    spread: float,
    alpha: float,
    warmup_steps: int,
    period: int,
    tolerance: float,
    seed: int,
) -> dict[str, Any]:
    """Settings and, for both kinds of sampling, imbalance and share of the events kept behind the warm-up."""
    settings = dict(locals())
    mask = AttentionMask(max_attn_len=256, full_attn_tail_len=256)
    config = HSTUConfig(
        embedding_dim=512, num_heads=4, num_layers=8, max_seq_len=max_seq_len, variant=Variant.ULTRA, mask=mask
    )
    stochastic = StochasticLengthConfig(alpha=alpha, max_seq_len=max_seq_len, sampling=Sampling.RECENT)
    balance = LoadBalanceConfig(warmup_steps=warmup_steps, period=period, tolerance=tolerance)
    reduce = together(ranks)
    load = model_load(config)

    def rank(number: int) -> list[tuple[float, float, float, float, float]]:
        balanced = LoadBalancedLength(stochastic, balance, load, reduce=lambda total: reduce(number, total))
        lengths = torch.Generator().manual_seed(1000 * seed + number)
        draws, plain_draws = (torch.Generator().manual_seed(2000 * seed + number) for _ in range(2))
        return [
            _step(
                balanced,
                stochastic,
                load,
                _lengths(batch_size, median_length, spread, max_seq_len, lengths),
                draws,
                plain_draws,
            )
            for _ in range(steps)
        ]

    with ThreadPoolExecutor(ranks) as pool:
        # Every rank waits for the others: each needs a thread of its own.
        found = torch.tensor(list(pool.map(rank, range(ranks))))[:, warmup_steps:]
    events = float(found[..., 4].sum())
    return {
        "settings": settings,
        "plain": summary(found[..., 0], float(found[..., 2].sum()) / events),
        "balanced": summary(found[..., 1], float(found[..., 3].sum()) / events),
    }


def _step(
    balanced: LoadBalancedLength,
    stochastic: StochasticLengthConfig,
    load: LoadFunction,
    events: Tensor,
    draws: torch.Generator,
    plain_draws: torch.Generator,
) -> tuple[float, float, float, float, float]:
    """Loads plain and balanced, events kept plain and balanced, events."""
    none = torch.zeros_like(events)
    ones = torch.ones(events.shape, dtype=torch.float64)
    plain = draw_lengths(events, stochastic, plain_draws)
    kept = balanced.lengths(events, none, importance=ones, generator=draws)
    loads = [float(load(lengths, none).sum()) for lengths in (plain, kept)]
    return loads[0], loads[1], float(plain.sum()), float(kept.sum()), float(events.sum())


def _lengths(count: int, median: float, spread: float, longest: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(count, generator=generator) * spread
    return (median * drawn.exp()).long().clamp(2, longest)


def summary(loads: Tensor, kept: float) -> dict[str, float]:
    """Max/mean of ``loads [ranks, steps]``: mean, 95th percentile and worst over the steps."""
    imbalance = (loads.amax(0) / loads.mean(0)).tolist()
    return {
        "mean": statistics.fmean(imbalance),
        "p95": statistics.quantiles(imbalance, n=20, method="inclusive")[18],
        "worst": max(imbalance),
        "mean_load": float(loads.mean()),
        "events_kept": kept,
    }


def together(ranks: int) -> Callable[[int, Tensor], Tensor]:
    """An all-reduce between ``ranks`` threads, called as ``reduce(rank, total)``."""
    parts: list[Tensor] = [torch.zeros(0)] * ranks
    barrier = Barrier(ranks)

    def reduce(rank: int, total: Tensor) -> Tensor:
        parts[rank] = total
        barrier.wait()
        summed = torch.stack(parts).sum(0)
        barrier.wait()
        return summed

    return reduce


if __name__ == "__main__":
    main()
