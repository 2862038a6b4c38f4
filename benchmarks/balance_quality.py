"""``python -m benchmarks.balance_quality``: what load-balanced stochastic length does to a model's quality.

    run     train one model with one way to shorten histories, and test it
    report  one record and a table of many runs

``whole`` keeps histories as they are, ``plain`` draws their lengths, and ``balanced`` draws them under a budget. Each
training batch is the work of several simulated ranks, a share of its users each; they meet at every all-reduce, and the
load of a rank is the operations of its users under the model's mask. All else is the recipe's. A pass's last batch,
which is shorter than the others, is drawn plainly and counts in no load.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.ledger import RESULTS
from benchmarks.load_balance import summary, together
from benchmarks.machine import provenance
from hstu_plugin.records import plain, write_json
from hstu_plugin.sequence import JaggedSequence
from hstu_plugin.ultra.load_balance import LoadBalanceConfig, LoadBalancedLength, LoadFunction, model_load, recency
from hstu_plugin.ultra.stochastic_length import StochasticLengthConfig, count_events, draw_lengths, shorten

WAYS = ("whole", "plain", "balanced")
FORMAT = "hstu-plugin/balance-quality"
_PATH = click.Path(path_type=Path)


class SimulatedRanks:
    """Shortens the histories of a global batch as the ranks of a data-parallel training would, one share each.

    Args:
        batch_size: users of a global batch; a batch of another size is drawn plainly.
        balance: of the budget; ``None``: every batch is drawn plainly.
        seed: of all draws.
    """

    def __init__(
        self,
        ranks: int,
        batch_size: int,
        stochastic: StochasticLengthConfig,
        balance: LoadBalanceConfig | None,
        load: LoadFunction,
        seed: int,
    ) -> None:
        if batch_size < ranks:
            raise ValueError(f"ranks: expected at most the {batch_size} users of a batch, got {ranks}")
        self.ranks, self.batch_size, self.stochastic, self.load = ranks, batch_size, stochastic, load
        self._draws = [torch.Generator().manual_seed(1000 * seed + rank) for rank in range(ranks + 1)]
        reduce = together(ranks)
        self._balanced = [
            LoadBalancedLength(stochastic, balance, load, reduce=partial(reduce, rank))
            for rank in range(ranks)
            if balance is not None
        ]
        self._threads = ThreadPoolExecutor(ranks)
        self.loads: list[list[float]] = []
        self.events = self.kept = 0

    def __call__(self, seq: JaggedSequence) -> JaggedSequence:
        events = count_events(seq.layout).cpu()
        kept = self.lengths(events, recency(seq).cpu())
        return shorten(seq, kept.to(seq.layout.device), self.stochastic)

    def lengths(self, events: Tensor, importance: Tensor) -> Tensor:
        """``[B]`` int64 events to keep."""
        if len(events) != self.batch_size:
            return draw_lengths(events, self.stochastic, self._draws[-1])
        shares = list(zip(events.tensor_split(self.ranks), importance.tensor_split(self.ranks), strict=True))
        if self._balanced:
            # Each rank waits for the others in an all-reduce, so each needs a thread of its own.
            kept = list(self._threads.map(self._balance, range(self.ranks), shares))
        else:
            kept = [draw_lengths(own, self.stochastic, self._draws[rank]) for rank, (own, _) in enumerate(shares)]
        self.loads.append([float(self.load(own, torch.zeros_like(own)).sum()) for own in kept])
        joined = torch.cat(kept)
        self.events, self.kept = self.events + int(events.sum()), self.kept + int(joined.sum())
        return joined

    def _balance(self, rank: int, share: tuple[Tensor, Tensor]) -> Tensor:
        events, importance = share
        none = torch.zeros_like(events)
        return self._balanced[rank].lengths(events, none, importance=importance, generator=self._draws[rank])

    def found(self, skipped: int) -> dict[str, float]:
        """Max/mean load of the ranks behind the first ``skipped`` steps, and the share of events kept in all."""
        return summary(torch.tensor(self.loads[skipped:], dtype=torch.float64).T, self.kept / self.events)


@click.group(help=__doc__, context_settings={"max_content_width": 110})
def main() -> None:
    pass


@main.command(context_settings={"ignore_unknown_options": True})
@click.option("--recipe", default="ml-1m-best", show_default=True)
@click.option("--model", default="HSTU", show_default=True)
@click.option("--way", type=click.Choice(WAYS), required=True)
@click.option("--seed", type=int, required=True)
@click.option("--ranks", default=8, show_default=True)
@click.option("--alpha", default=1.7, show_default=True, help="Of stochastic length.")
@click.option("--warmup-steps", default=20, show_default=True)
@click.option("--period", default=50, show_default=True)
@click.option("--output", type=_PATH, required=True, help="JSON file of this run.")
@click.option("--commit", help="To record. Default: that of this checkout.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[--NAME=VALUE]...")
def run(output: Path, commit: str | None, words: tuple[str, ...], **options: Any) -> None:
    """Train one model and test it; settings of the recipe may follow. Each pass is told as it ends."""
    record = train_once(words=words, **options)
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_json(output, plain({"format": FORMAT, **provenance(place, commit), **record}))
    test = record["test"]
    click.echo(f"{options['way']} seed {options['seed']}: " + " ".join(f"{k} {v:.4f}" for k, v in test.items()))


def train_once(
    *,
    recipe: str,
    model: str,
    way: str,
    seed: int,
    ranks: int,
    alpha: float,
    warmup_steps: int,
    period: int,
    words: Sequence[str],
) -> dict[str, Any]:
    """Settings, metrics of the test, seconds of a pass, and the loads where lengths were drawn."""
    from hstu_plugin.adapters.recbole import prepare, report, settings
    from hstu_plugin.adapters.recbole.register import register

    chosen = {"recipe": recipe, "model": model, "way": way, "seed": seed, "ranks": ranks, "alpha": alpha}
    chosen |= {"warmup_steps": warmup_steps, "period": period, "words": list(words)}
    register()
    sampler = None
    with prepare.quiet_recbole():
        config = prepare.make_config(model, None, [settings.recipe_path(recipe)], {"seed": seed}, words)
        prepare.seed_all(config)
        _, (training, validation, testing) = prepare.make_data(config)
        prepare.seed_all(config)
        network = prepare.make_model(config, training)
        if way != "whole":
            batch_size = int(config["train_batch_size"])
            stochastic = StochasticLengthConfig(alpha=alpha, max_seq_len=network.hstu_config.max_seq_len)
            balance = LoadBalanceConfig(warmup_steps=warmup_steps, period=period) if way == "balanced" else None
            load = model_load(network.hstu_config)
            sampler = network.shorten = SimulatedRanks(ranks, batch_size, stochastic, balance, load, seed)
        trainer = prepare.make_trainer(config, network)
        trainer.logger = _told()
        trainer.fit(training, validation, saved=False)
        test = trainer.evaluate(testing, load_best_model=False)
    return {
        "settings": chosen,
        "epochs": len(trainer.history),
        "test": {name: float(value) for name, value in test.items()},
        "seconds_per_pass": report.seconds_per_pass(trainer.history),
        "loads": None if sampler is None else sampler.found(warmup_steps),
    }


class _Told(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(click.unstyle(record.getMessage()))


def _told() -> logging.Logger:
    """Where RecBole's trainer says the loss and the seconds of each pass: the terminal, not the root logger."""
    logger = logging.getLogger(__name__)
    logger.setLevel(logging.INFO)
    logger.propagate, logger.handlers = False, [_Told()]
    return logger


@main.command("report")
@click.argument("runs", type=_PATH, nargs=-1, required=True, metavar="FILE...")
@click.option("--output", type=_PATH, default=RESULTS / "balance-quality.json", show_default=True)
def report_command(runs: tuple[Path, ...], output: Path) -> None:
    """One record and a table of many runs."""
    import json

    found = [json.loads(path.read_text(encoding="utf-8")) for path in runs]
    strange = [str(path) for path, run in zip(runs, found, strict=True) if run.get("format") != FORMAT]
    if strange:
        raise click.ClickException(f"{strange[0]}: expected a file of `run`, format {FORMAT}")
    ways = {way: [run for run in found if run["settings"]["way"] == way] for way in WAYS}
    record = {"format": FORMAT + "-report", "ways": {w: group(rs) for w, rs in ways.items() if rs}, "runs": found}
    write_json(output, record)
    click.echo(markdown(record["ways"]))  # type: ignore[arg-type]


def group(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and standard deviations of the metrics."""
    runs = sorted(runs, key=lambda run: int(run["settings"]["seed"]))
    out: dict[str, Any] = {"seeds": [run["settings"]["seed"] for run in runs]}
    for name in runs[0]["test"]:
        values = [run["test"][name] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else None
        out[name] = {"mean": statistics.fmean(values), "std": spread}
    if runs[0]["loads"] is not None:
        out["loads"] = {name: statistics.fmean(run["loads"][name] for run in runs) for name in runs[0]["loads"]}
    return out


def markdown(ways: dict[str, dict[str, Any]]) -> str:
    """A row for each way to shorten histories."""
    lines = ["| histories | seeds | HR@10 | NDCG@10 | max/mean load | worst step | events kept |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for way, found in ways.items():
        cells = [way, str(len(found["seeds"]))]
        for name in ("hit@10", "ndcg@10"):
            spread = "" if found[name]["std"] is None else f" ± {found[name]['std']:.4f}"
            cells.append(f"{found[name]['mean']:.4f}{spread}")
        loads = found.get("loads")
        cells += ["", "", "1.000"] if loads is None else [f"{loads[n]:.3f}" for n in ("mean", "worst", "events_kept")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
