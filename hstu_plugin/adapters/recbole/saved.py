"""Using a saved model again: rank the held-out items, or recommend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hstu_plugin.adapters.recbole import launch, report

if TYPE_CHECKING:
    from rich.console import Console

    from hstu_plugin.adapters.recbole.runner import LoadedRun


def find_checkpoint(path: Path) -> Path:
    """``path``, or the checkpoint of the newest run in that directory: the best model's, else the latest state.

    Raises:
        FileNotFoundError: there is none.
    """
    if path.is_file():
        return path
    found = [*path.glob("*.pth"), *(path / launch.CHECKPOINTS).glob("*.pth")]
    if not found:
        raise FileNotFoundError(f"{path}: neither a checkpoint nor the directory of a run that has one")
    from hstu_plugin.adapters.recbole.checkpoint import best_path

    newest = max(found, key=lambda file: file.stat().st_mtime)
    # The latest state, from which a training goes on, lies beside the best one and is often newer.
    best = best_path(newest)
    return best if best.is_file() else newest


def evaluate(console: Console, path: Path, *, split: str = "test", output: Path | None = None) -> dict[str, float]:
    """Metrics of a saved model on its own data set and protocol, shown and optionally written.

    Args:
        console: where to show them.
        path: checkpoint, or directory of a run.
        split: ``test`` or ``valid``.
        output: JSON file to write.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: nothing was held out for that split.
    """
    file = find_checkpoint(path)
    loaded = _load(file)
    metrics = loaded.evaluate(split)
    if not metrics:
        raise ValueError(f"--split {split}: this model was trained with a split that holds nothing out for it")
    config = loaded.config
    valid, test = (metrics, {}) if split == "valid" else ({}, metrics)
    shown = {
        "label": config["model"],
        "dataset": config["dataset"],
        "seed": config["seed"],
        "valid": valid,
        "test": test,
    }
    console.print(report.metrics_table(shown))
    if output:
        report.write_json(output, {**shown, "checkpoint": str(file), "split": split})
        console.print(f"Wrote {output}", highlight=False, soft_wrap=True)
    return metrics


def recommend(
    console: Console,
    path: Path,
    *,
    users: Sequence[str],
    topk: int = 10,
    include_seen: bool = False,
    as_json: bool = False,
) -> None:
    """Show what a saved model recommends.

    Raises:
        FileNotFoundError: no checkpoint there.
        UnknownUserError: a user for whom nothing is held out.
    """
    from hstu_plugin.adapters.recbole import recommend as recommending

    loaded = _load(find_checkpoint(path))
    texts = recommending.item_texts(loaded.dataset)
    answers = [recommending.recommend(loaded, user, topk, include_seen=include_seen) for user in users]
    if as_json:
        click.echo(json.dumps([recommending.as_json(answer, texts) for answer in answers], indent=1))
        return
    for answer in answers:
        for table in recommending.recommendation_tables(answer, texts):
            console.print(table)


def _load(file: Path) -> LoadedRun:
    from hstu_plugin.adapters.recbole import runner

    return runner.load(str(file))
