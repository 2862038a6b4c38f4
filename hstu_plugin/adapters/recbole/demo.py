"""``hstu-recbole demo``: the whole of it on MovieLens-100K, which RecBole brings along."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hstu_plugin.adapters.recbole import launch, report, settings

if TYPE_CHECKING:
    from rich.console import Console

DATASET = "ml-100k"
RECIPE = "ml-100k-quick"


def demo(
    console: Console,
    *,
    epochs: int | None = None,
    user: str = "1",
    topk: int = 10,
    output_dir: Path | None = None,
    progress: bool = True,
    verbose: bool = False,
) -> launch.Finished:
    """Train HSTU, show its metrics beside recorded ones of other models, and recommend films to one user.

    Raises:
        UnknownUserError: after the training, when the data set has no such user.
    """
    from hstu_plugin.adapters.recbole.recommend import item_texts, recommend, recommendation_tables

    request = launch.Request(
        model="HSTU",
        dataset=DATASET,
        output_dir=output_dir or launch.new_output_dir(DATASET, "HSTU"),
        recipes=(settings.recipe_path(RECIPE),),
        chosen={} if epochs is None else {"epochs": epochs},
        progress=progress,
        verbose=verbose,
    )
    console.print(f"Training HSTU on MovieLens-100K ({_device()}); every test item is ranked among all films.")
    done = launch.execute(request)
    record = done.record
    console.print()
    console.print(report.comparison_table(beside_recorded(record), highlight=record["label"]))
    recorded = settings.recorded_results(DATASET)
    if recorded is None:
        console.print("No recorded results of other models here; `hstu-recbole compare --dataset ml-100k` makes them.")
    else:
        # Otherwise the recorded HSTU reads as what this run should have reached.
        console.print(
            f"This run: recipe {RECIPE}. Recorded: recipe {DATASET}, larger and trained for longer. "
            + report.provenance(report.read_json(recorded, report.COMPARISON_FORMAT)),
            highlight=False,
            soft_wrap=True,
        )
    passes = f", {record['seconds_per_pass']:.2f} s a pass over the data" if record["seconds_per_pass"] else ""
    seconds = record["train_seconds"]
    took = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} minutes"
    console.print(f"{record['epochs']} epochs in {took}{passes}.", highlight=False, soft_wrap=True)
    answer = recommend(done.result, user, topk)
    for table in recommendation_tables(answer, item_texts(done.result.dataset)):
        console.print(table)
    console.print(
        f"Files: {done.output_dir}/ ({launch.RECORD}, {launch.CURVE}, {launch.CHECKPOINTS}/)",
        highlight=False,
        soft_wrap=True,
    )
    return done


def beside_recorded(record: report.Record) -> report.Record:
    """A comparison of this run with the recorded models."""
    mine = report.compare_records([record])
    path = settings.recorded_results(record["dataset"])
    if path is None:
        return mine
    recorded = report.read_json(path, report.COMPARISON_FORMAT)
    own = mine["models"][record["label"]]
    others = recorded["models"]
    # Only metrics that all sides have can stand in one table.
    common = [m for m in own["test"]["mean"] if all(m in group["test"]["mean"] for group in others.values())]
    # Seconds of another machine say nothing beside those of this one.
    models = {
        f"{label} (recorded)": {**_only(group, common), "seconds_per_pass": None} for label, group in others.items()
    }
    return {**mine, "models": {record["label"]: _only(own, common), **models}}


def _only(group: Any, metrics: list[str]) -> dict[str, Any]:
    return {**group, "test": {part: {m: values[m] for m in metrics} for part, values in group["test"].items()}}


def _device() -> str:
    import torch

    return (
        f"on {torch.cuda.get_device_name(0)}"
        if torch.cuda.is_available()
        else f"on {torch.get_num_threads()} CPU cores"
    )
