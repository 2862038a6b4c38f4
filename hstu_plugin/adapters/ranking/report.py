"""Records of ranking runs, tables for people, learning curves. Times are in seconds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from hstu_plugin._versions import runtime_versions, source_commit
from hstu_plugin.adapters.ranking.settings import RankSettings, plain_settings
from hstu_plugin.adapters.ranking.trainer import RankTrainer
from hstu_plugin.records import machine, plain

RUN_FORMAT = "hstu-plugin/ranking-run"
COMPARISON_FORMAT = "hstu-plugin/ranking-comparison"
FORMAT_VERSION = 1
RECORD, CURVE = "result.json", "curve.png"
# What models are compared under; the rest belongs to a model.
PROTOCOL = ("max_history", "max_candidates", "session_gap")
SHOWN = {"auc": "AUC", "gauc": "GAUC", "ne": "NE", "log_loss": "log loss", "rmse": "RMSE", "mae": "MAE"}
# Readable for people who do not tell red from green, and in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
Record = dict[str, Any]


class ReportError(ValueError):
    """A file that is no record, or records that cannot be put side by side."""


def asked(settings: RankSettings, seed: int) -> Record:
    """What identifies a run; equal requests ask for equal runs."""
    return {"settings": plain(plain_settings(settings)), "seed": seed}


def run_record(
    trainer: RankTrainer, *, label: str, test: Mapping[str, Any], total_seconds: float, commit: str | None = None
) -> Record:
    """The record of a finished run; ``commit`` by default as git says."""
    progress, settings, commit = trainer.progress, trainer.settings, commit or source_commit()
    times = [float(epoch["train_seconds"]) for epoch in progress.history]
    return {
        "format": RUN_FORMAT,
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "label": label,
        "dataset": trainer.data.name,
        **asked(settings, trainer.seed),
        "device": str(trainer.device),
        "protocol": {key: getattr(settings, key) for key in PROTOCOL},
        "data": plain(trainer.data.facts),
        "parameters": sum(p.numel() for p in trainer.trainable),
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        "valid": plain(progress.best_valid),
        "test": plain(test),
        # The first pass carries one-time costs.
        "seconds_per_pass": statistics.median(times[1:] or times) if times else None,
        "total_seconds": total_seconds,
        "history": plain(progress.history),
        "versions": runtime_versions(),
        "machine": machine(),
        **({"commit": commit} if commit else {}),
    }


def read_record(path: Path, formats: Sequence[str] = (RUN_FORMAT,)) -> Record:
    """A run's record, from its file or its directory, or a comparison where ``formats`` say so.

    Raises:
        ReportError: it cannot be read, or is none.
    """
    path = path / RECORD if path.is_dir() else path
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ReportError(f"{path}: not JSON ({error})") from None
    found = record.get("format") if isinstance(record, dict) else None
    if found not in formats:
        raise ReportError(f"{path}: expected a file of format {' or '.join(formats)}, got {found!r}")
    if record["format_version"] > FORMAT_VERSION:
        raise ReportError(f"{path}: written by a newer hstu-plugin (format version {record['format_version']})")
    return dict(record)


def compare(records: Iterable[Record]) -> Record:
    """Runs grouped by label, with mean and sample standard deviation over their seeds.

    Raises:
        ReportError: no records, or several data sets, protocols or data facts.
    """
    runs = list(records)
    if not runs:
        raise ReportError("records: expected at least one, got none")
    for key in ("dataset", "protocol", "data"):
        seen = {json.dumps(run[key], sort_keys=True) for run in runs}
        if len(seen) > 1:
            raise ReportError(f"{key}: the runs differ and cannot be compared: {' / '.join(sorted(seen))}")
    groups: dict[str, list[Record]] = {}
    for run in runs:
        groups.setdefault(run["label"], []).append(run)
    return {
        "format": COMPARISON_FORMAT,
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **{key: runs[0][key] for key in ("dataset", "protocol", "data", "versions")},
        "commits": sorted({run["commit"] for run in runs if run.get("commit")}),
        "models": {label: _group(sorted(group, key=lambda r: int(r["seed"]))) for label, group in groups.items()},
    }


def comparison_tables(comparison: Mapping[str, Any]) -> Group:
    """Test metrics of all models, a table for each task, for a terminal."""
    header, rows = _cells(comparison, ("auc", "gauc", "ne", "rmse", "mae"))
    tables = []
    for task in dict.fromkeys(row[0] for row in rows):
        title = f"{comparison['dataset']}, {task}: test"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        own = [row[1:] for row in rows if row[0] == task]
        # Metrics of the other kind of task stay out.
        kept = [place for place in range(len(own[0])) if any(row[place] != "-" for row in own)]
        for place in kept:
            table.add_column(header[1 + place], justify="right" if place else "left", no_wrap=True)
        for row in own:
            table.add_row(*(row[place] for place in kept))
        tables.append(table)
    return Group(*tables)


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """The same for a README, with protocol, machines and versions."""
    header, rows = _cells(comparison, tuple(SHOWN))
    header.append("parameters")
    for row in rows:
        row.append(f"{comparison['models'][row[1]]['parameters']:,}")
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "---:|" * (len(header) - 2)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    protocol = ", ".join(f"{key} {value}" for key, value in comparison["protocol"].items())
    runs = [run for group in comparison["models"].values() for run in group["runs"]]
    machines = sorted({", ".join(run["machine"]["gpus"]) or run["machine"]["cpu"] for run in runs})
    versions = {key: comparison["versions"].get(key) for key in ("python", "torch")}
    known = ", ".join(f"{key} {value}" for key, value in versions.items() if value)
    # Twelve digits name a commit well enough; "-dirty" is left out of the sentence, not of the record.
    commits = ", ".join(dict.fromkeys(commit[:12] for commit in comparison["commits"]))
    lines += ["", f"Protocol: {protocol}. {'; '.join(machines)}; {known}{'; commit ' + commits if commits else ''}."]
    return "\n".join(lines) + "\n"


def learning_curve(records: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw training loss and validation score over the epochs, one line per run; the kept epoch is marked."""
    # The object interface: no global figure, no display, nothing to close.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9.6, 3.8), dpi=130, layout="constrained")
    loss, score = figure.subplots(1, 2)
    labels = list(dict.fromkeys(str(record["label"]) for record in records))
    for index, record in enumerate(records):
        # Models by colour; one model's seeds by colour as well.
        colour = _COLOURS[(labels.index(record["label"]) if len(labels) > 1 else index) % len(_COLOURS)]
        epochs = [epoch for epoch in record["history"] if epoch.get("train_loss")]
        name = f"{record['label']}, seed {record['seed']}"
        style: dict[str, Any] = {"color": colour, "linewidth": 1.8, "marker": "o" if len(epochs) < 3 else None}
        totals = [sum(epoch["train_loss"].values()) for epoch in epochs]
        loss.plot([epoch["epoch"] for epoch in epochs], totals, label=name, **style)
        scored = [(epoch["epoch"], epoch["valid_score"]) for epoch in epochs if epoch.get("valid_score") is not None]
        score.plot([e for e, _ in scored], [v for _, v in scored], label=name, **style)
        best = dict(scored).get(record["best_epoch"])
        if best is not None:
            score.plot([record["best_epoch"]], [best], marker="o", markersize=7, color=colour, markeredgecolor="white")
    loss.set_title("Training loss, sum over tasks", loc="left", fontsize=11)
    score.set_title("Validation NE, mean over tasks (lower is better)", loc="left", fontsize=11)
    for axis in (loss, score):
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    score.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{', '.join(labels)} on {records[0]['dataset']}", fontsize=12, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def _group(runs: Sequence[Record]) -> Record:
    test: Record = {}
    for task, metrics in runs[0]["test"].items():
        test[task] = {}
        for name in metrics:
            values = [run["test"][task].get(name) for run in runs]
            if None not in values:
                spread = statistics.stdev(values) if len(values) > 1 else None
                test[task][name] = {"mean": statistics.fmean(values), "std": spread}
    short = ("seed", "test", "valid", "epochs", "best_epoch", "seconds_per_pass", "total_seconds", "machine")
    return {
        "seeds": [run["seed"] for run in runs],
        "test": test,
        "parameters": runs[0]["parameters"],
        "settings": runs[0]["settings"],
        "runs": [{key: run[key] for key in short} for run in runs],
    }


def _cells(comparison: Mapping[str, Any], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    models = comparison["models"]
    found = {name for group in models.values() for own in group["test"].values() for name in own}
    names = [name for name in metrics if name in found]
    rows = []
    for task in next(iter(models.values()))["test"]:
        for label, group in models.items():
            cells = [_spread(group["test"][task].get(name)) for name in names]
            rows.append([task, label, str(len(group["seeds"])), *cells])
    return ["task", "model", "seeds", *(SHOWN[name] for name in names)], rows


def _spread(value: Mapping[str, float] | None) -> str:
    if value is None:
        return "-"
    return f"{value['mean']:.4f}" + ("" if value["std"] is None else f" ± {value['std']:.4f}")
