"""Several models under one protocol, seed by seed: the runs behind a results table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hstu_plugin.adapters.recbole import launch, report, settings

if TYPE_CHECKING:
    from rich.console import Console

POPULARITY = "Pop"
_POPULARITY_CLASS = "PopularitySequential"
# What a recipe says about data, split and ranking holds for every model; the rest, early stopping too, is HSTU's own.
_PROTOCOL = (
    "eval_args",
    "metrics",
    "topk",
    "valid_metric",
    "eval_batch_size",
    "load_col",
    "repeatable",
)


def compare(
    console: Console,
    *,
    dataset: str | None,
    recipe: str | None,
    models: str,
    seeds: Sequence[int],
    overrides: Sequence[str],
    time_epochs: int | None,
    deltas: bool,
    output_dir: Path | None,
    record: Path | None,
    timing: Path | None,
    note: str | None,
    force: bool,
    progress: bool,
    verbose: bool,
    words: Sequence[str],
) -> report.Record:
    """Run what is missing, then write and show the comparison.

    Raises:
        SettingsError: settings that cannot be used, or finished runs that were made with others.
    """
    requests = plan(
        dataset=dataset,
        recipe=recipe,
        models=[name.strip() for name in models.split(",") if name.strip()],
        overrides=overrides,
        time_epochs=time_epochs,
        output_dir=output_dir,
        words=words,
    )
    seeds = seeds[:1] if time_epochs else seeds
    records = []
    for number, (request, seed) in enumerate([(r, s) for r in requests for s in seeds], start=1):
        one = _with_seed(request, seed, progress=progress, verbose=verbose)
        done = _finished(one, force=force)
        state = "already finished" if done else "training"
        console.print(
            f"({number}/{len(requests) * len(seeds)}) {one.name}, seed {seed}: {state}", highlight=False, soft_wrap=True
        )
        records.append(done or launch.execute(one).record)
    names = [request.name for request in requests]
    pair = (names[0], names[1]) if deltas and len(names) > 1 and not time_epochs else None
    comparison = report.compare_records(records, deltas=pair)
    if time_epochs:
        # One pass is no trained model; its metrics would be misread.
        comparison["purpose"] = f"training time of {time_epochs} passes; the models are not trained out"
    if timing:
        report.take_timing(comparison, report.read_json(timing, report.COMPARISON_FORMAT))
    if note:
        comparison["note"] = note
    directory = requests[0].output_dir.parent
    table = report.comparison_markdown(comparison)
    report.write_json(directory / "comparison.json", comparison)
    report.write_text(directory / "comparison.md", table)
    if record:
        report.write_json(record, comparison)
    console.print(report.comparison_table(comparison, highlight=names[0]))
    if pair:
        _print_deltas(console, comparison["deltas"])
    console.print(
        f"Files: {directory}/comparison.json, comparison.md{f', {record}' if record else ''}",
        highlight=False,
        soft_wrap=True,
    )
    return comparison


def plan(
    *,
    dataset: str | None,
    recipe: str | None,
    models: Sequence[str],
    overrides: Sequence[str] = (),
    time_epochs: int | None = None,
    output_dir: Path | None = None,
    words: Sequence[str] = (),
) -> list[launch.Request]:
    """A request for each model, without a seed; all share data set, split, order and ranking.

    HSTU takes the recipe as it is. Others take the same protocol, and RecBole's defaults for the rest. An entry of
    ``models`` is a model, or ``LABEL=MODEL`` where one model stands in the table twice.

    Raises:
        SettingsError: a model given twice or not at all, an override of none of them, or no data set.
    """
    named = [(entry.rpartition("=")[0] or entry, entry.rpartition("=")[2]) for entry in models]
    labels = [label for label, _ in named]
    if not labels or len(set(labels)) < len(labels):
        raise settings.SettingsError(
            f"--models: expected different names such as HSTU,SASRec, got {','.join(models)!r}"
        )
    name = recipe or (dataset if dataset in settings.recipes() else None)
    recipe_files = (settings.recipe_path(name),) if name else ()
    from_recipe = settings.read_settings(recipe_files)
    chosen_dataset = dataset or from_recipe.get("dataset")
    if not chosen_dataset:
        raise settings.SettingsError("--dataset: expected a data set, or --recipe, got neither")
    special = _overrides(overrides, labels)
    directory = output_dir or Path("runs") / f"compare-{chosen_dataset}{'-time' if time_epochs else ''}"
    shared = {**settings.model_defaults("HSTU"), **from_recipe}
    protocol = {key: v for key, v in shared.items() if key in _PROTOCOL or key.endswith("_interval")}
    requests = []
    for label, model in named:
        ours = model.upper().endswith("HSTU")
        chosen: dict[str, Any] = {} if ours else dict(protocol)
        # Hiding seen items is HSTU's option; with it the sides would rank different sets.
        chosen.update({"filter_seen_items": False} if ours else {"train_neg_sample_args": None})
        if model == POPULARITY:
            # Counting needs one pass, and of the history only what tells a user's first row from a cut one.
            chosen.update(epochs=1, eval_step=1, MAX_ITEM_LIST_LENGTH=2, train_batch_size=65536)
        if time_epochs:
            chosen.update(epochs=time_epochs, eval_step=0)
        chosen.update(special[label])
        requests.append(
            launch.Request(
                model=_POPULARITY_CLASS if model == POPULARITY else model,
                dataset=str(chosen_dataset),
                output_dir=directory / label,
                recipes=recipe_files if ours else (),
                chosen=chosen,
                argv=tuple(words),
                label=label,
            )
        )
    return requests


def _overrides(entries: Sequence[str], models: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``MODEL.name=value`` by model."""
    special: dict[str, dict[str, Any]] = {model: {} for model in models}
    for entry in entries:
        model, dot, setting = entry.partition(".")
        if not dot or model not in special or "=" not in setting:
            raise settings.SettingsError(
                f"--set: expected MODEL.name=value with a model of {', '.join(models)}, got {entry!r}"
            )
        special[model].update(settings.parse_tokens([f"--{setting}"]))
    return special


def _with_seed(request: launch.Request, seed: int, *, progress: bool, verbose: bool) -> launch.Request:
    return replace(
        request,
        output_dir=request.output_dir.with_name(f"{request.name}-seed-{seed}"),
        chosen={**request.chosen, "seed": seed},
        resume=launch.AUTO,
        progress=progress,
        verbose=verbose,
    )


def _finished(request: launch.Request, *, force: bool) -> report.Record | None:
    """The record of an earlier run of the same request."""
    path = request.output_dir / launch.RECORD
    if force or not path.exists():
        return None
    found = report.read_json(path, report.RUN_FORMAT)
    asked = request.asked()
    if found["user_config"] == asked:
        return found
    keys = sorted(k for k in asked.keys() | found["user_config"].keys() if asked.get(k) != found["user_config"].get(k))
    raise settings.SettingsError(
        f"{path}: was finished with other settings ({', '.join(keys)}); repeat it with --force, or choose another "
        "--output-dir"
    )


def _print_deltas(console: Console, delta: Mapping[str, Any]) -> None:
    console.print(f"{delta['of']} minus {delta['over']}, seed by seed:", highlight=False, soft_wrap=True)
    for seed, values in delta["per_seed"].items():
        shown = (f"{report.metric_name(m)} {v:+.4f}" for m, v in values.items())
        console.print(f"  seed {seed}: {', '.join(shown)}", highlight=False, soft_wrap=True)
