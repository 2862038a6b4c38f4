"""One or several runs under one recipe; finished runs are not repeated, unfinished ones go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hstu_plugin.adapters.ranking import report
from hstu_plugin.adapters.ranking.dataset import RankingData, load, without_actions
from hstu_plugin.adapters.ranking.models import make_model
from hstu_plugin.adapters.ranking.quantize import restored
from hstu_plugin.adapters.ranking.schema import read_schema
from hstu_plugin.adapters.ranking.settings import RankSettings, find_recipe, read_recipe
from hstu_plugin.adapters.ranking.trainer import Metrics, RankTrainer, pick_device
from hstu_plugin.records import write_json, write_text


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to train.

    Attributes:
        recipe: name or file. data: directory of the schema's files. output_dir: one folder for each run in it.
        models: names; ``None`` for the recipe's. seeds: each model once for each.
        overrides: settings that win over the recipe. label: of the runs in tables, in place of the model's name.
        device: auto, cpu or cuda. resume: go on from unfinished runs. force: repeat runs made with other settings.
        show_progress: bars on standard error. commit: of the source, in place of what git says.
    """

    recipe: str
    data: Path
    output_dir: Path
    models: Sequence[str | None] = (None,)
    seeds: Sequence[int] = (1,)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None
    device: str = "auto"
    resume: bool = True
    force: bool = False
    show_progress: bool = False
    commit: str | None = None


def execute(request: Request, say: Callable[[str], None] = print) -> list[report.Record]:
    """Train and test; writes result.json and curve.png of each run, comparison.json and .md, and curve.png of several.

    Raises:
        SchemaError, DataError, CheckpointError, ReportError, ValueError: recipe, data or an old run cannot be used.
    """
    recipe = read_recipe(find_recipe(request.recipe))
    # All settings are checked before the first training.
    chosen = [recipe.settings(model, request.overrides) for model in request.models]
    device = pick_device(request.device)
    data = load(read_schema(recipe.schema), request.data)
    records = []
    for settings in chosen:
        label = request.label or str(settings.model)
        for seed in request.seeds:
            folder = request.output_dir / f"{label}-seed{seed}"
            done = _finished(folder, settings, seed, force=request.force)
            if done is not None:
                say(f"{folder}: finished before")
            records.append(done or _run(request, data, settings, seed, folder, label, device, say))
    comparison = report.compare(records)
    write_json(request.output_dir / "comparison.json", comparison)
    write_text(request.output_dir / "comparison.md", report.comparison_markdown(comparison))
    trained = [record for record in records if record["history"]]
    if len(trained) > 1:
        report.learning_curve(trained, request.output_dir / report.CURVE)
    return records


def evaluate(
    recipe: str, data: Path, folder: Path, *, split: str, device: str, tables_file: Path | None = None
) -> Metrics:
    """Metrics of a finished run's best weights, from its files and the data.

    Args:
        tables_file: quantised tables to use in place of the run's own.

    Raises:
        CheckpointError: the run has no checkpoint, or belongs to other data.
        TableFileError: the tables cannot be used.
    """
    return restored(recipe, data, folder, device=device, tables_file=tables_file).evaluate(split)


def _finished(folder: Path, settings: RankSettings, seed: int, *, force: bool) -> report.Record | None:
    if not (folder / report.RECORD).is_file():
        return None
    record = report.read_record(folder)
    if {key: record[key] for key in ("settings", "seed")} == report.asked(settings, seed):
        return record
    if force:
        return None
    raise report.ReportError(f"{folder}: holds a run with other settings; choose another --output-dir, or --force")


def _run(
    request: Request,
    data: RankingData,
    settings: RankSettings,
    seed: int,
    folder: Path,
    label: str,
    device: torch.device,
    say: Callable[[str], None],
) -> report.Record:
    began = time.perf_counter()
    data = without_actions(data, settings.without_actions)
    torch.manual_seed(seed)
    trainer = RankTrainer(
        make_model(settings, data),
        data,
        settings,
        seed=seed,
        device=device,
        directory=folder,
        show_progress=request.show_progress,
    )
    if request.resume and not request.force and trainer.resume():
        say(f"{folder}: goes on after epoch {trainer.progress.epoch}")
    trainer.fit()
    test = trainer.evaluate("test")
    seconds = time.perf_counter() - began
    record = report.run_record(trainer, label=label, test=test, total_seconds=seconds, commit=request.commit)
    write_json(folder / report.RECORD, record)
    if record["history"]:
        report.learning_curve([record], folder / report.CURVE)
    scores = ", ".join(f"{name} {_short(metrics)}" for name, metrics in test.items())
    say(f"{folder}: {trainer.progress.epoch} epochs, {record['total_seconds']:.0f} s; test {scores}")
    return record


def _short(metrics: Mapping[str, float | None]) -> str:
    shown = [f"{report.SHOWN[name]} {metrics[name]:.4f}" for name in ("auc", "rmse") if metrics.get(name) is not None]
    return " ".join(shown) or "-"
