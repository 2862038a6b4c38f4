"""What a run leaves behind: a JSON record, tables for people, and the comparison of several runs.

Records are plain dictionaries of JSON types, so that a file read back equals what was written. Times are in seconds.
Nothing here imports torch or RecBole at import time.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hstu_plugin._versions import runtime_versions, source_commit
from hstu_plugin.records import machine
from hstu_plugin.records import plain as plain
from hstu_plugin.records import write_json as write_json
from hstu_plugin.records import write_text as write_text

RUN_FORMAT = "hstu-plugin/run"
COMPARISON_FORMAT = "hstu-plugin/comparison"
# Raised when a field changes its meaning or goes away; new fields leave it alone.
FORMAT_VERSION = 1

Record = dict[str, Any]
# Keys that say how runs were split and ranked; runs are compared only where all of them agree.
PROTOCOL_KEYS = (
    "eval_args",
    "metrics",
    "topk",
    "valid_metric",
    "user_inter_num_interval",
    "item_inter_num_interval",
    "val_interval",
    "rm_dup_inter",
)


class RunLike(Protocol):
    """The part of a finished run that a record is made from."""

    @property
    def config(self) -> Any: ...
    @property
    def dataset(self) -> Any: ...
    @property
    def model(self) -> Any: ...
    @property
    def best_valid_score(self) -> Any: ...
    @property
    def best_valid_result(self) -> Any: ...
    @property
    def test_result(self) -> Any: ...
    @property
    def history(self) -> Any: ...
    @property
    def train_seconds(self) -> Any: ...
    @property
    def total_seconds(self) -> Any: ...


class ReportError(ValueError):
    """A file that is no record, or records that cannot be put side by side."""


def run_record(
    result: RunLike,
    *,
    user_config: Mapping[str, Any] | None = None,
    label: str | None = None,
    files: Mapping[str, str] | None = None,
) -> Record:
    """The record of a finished run.

    Args:
        result: the run.
        user_config: what the user asked for, in files and on the command line.
        label: the run's name in tables; default: the model's.
        files: what else was written, by role.
    """
    config = result.config
    final = {str(k): v for k, v in config.final_config_dict.items()}
    history = [plain(epoch) for epoch in result.history]
    commit = source_commit()
    return {
        "format": RUN_FORMAT,
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "label": label or str(config["model"]),
        "model": str(config["model"]),
        "dataset": str(config["dataset"]),
        "seed": int(config["seed"]),
        "device": str(config["device"]),
        "protocol": {key: plain(final.get(key)) for key in PROTOCOL_KEYS},
        "user_config": plain(dict(user_config or {})),
        # Paths and the like say where the run stood, not what it did.
        "config": {key: plain(value) for key, value in sorted(final.items()) if not key.endswith(("_path", "_dir"))},
        "data": _data_facts(result.dataset),
        "parameters": sum(int(p.numel()) for p in result.model.parameters() if p.requires_grad),
        "epochs": len(history),
        "best_epoch": best_epoch(history, bigger=bool(config["valid_metric_bigger"])),
        "valid_metric": str(config["valid_metric"]),
        "best_valid_score": plain(result.best_valid_score),
        "valid": plain(dict(result.best_valid_result or {})),
        "test": plain(dict(result.test_result or {})),
        "seconds_per_pass": seconds_per_pass(history),
        "seconds_per_evaluation": seconds_per_pass(history, "valid_seconds"),
        "train_seconds": plain(result.train_seconds),
        "total_seconds": plain(result.total_seconds),
        "history": history,
        "files": dict(files or {}),
        "versions": runtime_versions(),
        "machine": machine(),
        **({"commit": commit} if commit else {}),
    }


def seconds_per_pass(history: Sequence[Mapping[str, Any]], part: str = "train_seconds") -> float | None:
    """Median time of ``part`` of an epoch, without the first where there are others: it carries one-time costs."""
    seconds = [float(epoch[part]) for epoch in history if epoch.get(part) is not None]
    return statistics.median(seconds[1:] or seconds) if seconds else None


def best_epoch(history: Sequence[Mapping[str, Any]], *, bigger: bool = True) -> int | None:
    """Number of the first epoch with the best validation score; None where nothing was validated."""
    scored = [(float(e["valid_score"]), int(e["epoch"])) for e in history if e.get("valid_score") is not None]
    if not scored:
        return None
    top = max(s for s, _ in scored) if bigger else min(s for s, _ in scored)
    return min(epoch for score, epoch in scored if score == top)


def read_json(path: Path, *formats: str) -> Record:
    """Read a record back.

    Raises:
        ReportError: the file is absent, is not JSON, is none of ``formats``, or was written by a newer release.
    """
    formats = formats or (RUN_FORMAT, COMPARISON_FORMAT)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ReportError(f"{path}: not JSON ({error})") from None
    found = record.get("format") if isinstance(record, dict) else None
    if found not in formats:
        raise ReportError(f"{path}: expected a file of format {' or '.join(formats)}, got {found!r}")
    if record.get("format_version", 0) > FORMAT_VERSION:
        raise ReportError(f"{path}: written by a newer hstu-plugin (format version {record['format_version']})")
    return dict(record)


def compare_records(records: Iterable[Record], *, deltas: tuple[str, str] | None = None) -> Record:
    """Runs grouped by label, with mean and sample standard deviation over their seeds.

    Args:
        records: runs on one data set under one protocol.
        deltas: two labels; adds the first minus the second, seed by seed.

    Raises:
        ReportError: no records, several data sets or protocols, a label that is not there, or no seed in common.
    """
    runs = list(records)
    if not runs:
        raise ReportError("records: expected at least one, got none")
    for key in ("dataset", "protocol"):
        seen = {json.dumps(r[key], sort_keys=True) for r in runs}
        if len(seen) > 1:
            raise ReportError(f"{key}: the runs differ and cannot be compared: {' / '.join(sorted(seen))}")
    groups: dict[str, list[Record]] = {}
    for run in runs:
        groups.setdefault(run["label"], []).append(run)
    comparison: Record = {
        "format": COMPARISON_FORMAT,
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "dataset": runs[0]["dataset"],
        "protocol": runs[0]["protocol"],
        "data": runs[0]["data"],
        "models": {label: _group(sorted(group, key=lambda r: int(r["seed"]))) for label, group in groups.items()},
        "versions": runs[0]["versions"],
        "machine": runs[0]["machine"],
    }
    commits = sorted({run["commit"] for run in runs if run.get("commit")})
    if commits:
        comparison["commit"] = ", ".join(commits)
    if deltas:
        comparison["deltas"] = _deltas(groups, *deltas)
    return comparison


def take_timing(comparison: Record, timing: Mapping[str, Any]) -> None:
    """Replace each model's seconds of a pass by those of ``timing``: measured alone, on one machine.

    A model that ``timing`` lacks is left without seconds.

    Raises:
        ReportError: ``timing`` is of another data set, or of none of the models.
    """
    if timing["dataset"] != comparison["dataset"]:
        raise ReportError(f"timing: expected data set {comparison['dataset']}, got {timing['dataset']}")
    if not comparison["models"].keys() & timing["models"].keys():
        raise ReportError(
            f"timing: expected one of the models {', '.join(comparison['models'])}, got {', '.join(timing['models'])}"
        )
    for label, group in comparison["models"].items():
        group["seconds_per_pass"] = timing["models"].get(label, {}).get("seconds_per_pass")
    comparison["timing"] = {key: timing.get(key) for key in ("created", "machine", "commit", "note")}


def take_others(comparison: Record, earlier: Mapping[str, Any]) -> None:
    """Add the models of ``earlier`` that ``comparison`` lacks, each with where and at which commit it was recorded.

    Raises:
        ReportError: ``earlier`` is of other data or another protocol, or has no other model.
    """
    for key in ("dataset", "protocol", "data"):
        if comparison[key] != earlier[key]:
            raise ReportError(f"others: expected {key} {comparison[key]}, got {earlier[key]}")
    others = {label: group for label, group in earlier["models"].items() if label not in comparison["models"]}
    if not others:
        raise ReportError(f"others: expected a model beside {', '.join(comparison['models'])}, got none")
    of = {key: earlier.get(key) for key in ("created", "commit", "versions", "machine", "note")}
    # What was taken over before keeps its own origin.
    taken = {label: {"recorded": of, **group} for label, group in others.items()}
    comparison["models"] = {**taken, **comparison["models"]}


def config_table(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """The settings in force and who chose each; RecBole's own defaults stay out of sight.

    Args:
        layers: a name and its settings, the strongest first.
    """
    table = Table(title="Settings", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, min_width=50)
    table.add_column("setting")
    table.add_column("value", overflow="fold")
    table.add_column("set by", style="dim")
    taken: set[str] = set()
    for origin, values in layers:
        for key in sorted(values.keys() - taken):
            table.add_row(key, str(values[key]), origin, style="bold" if origin == layers[0][0] else None)
        taken |= values.keys()
    return table


def metrics_table(record: Mapping[str, Any]) -> Table:
    """Validation and test metrics of one run."""
    title = f"{record['label']} on {record['dataset']}, full ranking, seed {record['seed']}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, min_width=50)
    table.add_column("metric")
    if record["valid"]:
        table.add_column("valid", justify="right")
    if record["test"]:
        table.add_column("test", justify="right")
    for name in record["test"] or record["valid"]:
        parts = [part for part in (record["valid"], record["test"]) if part]
        table.add_row(metric_name(name), *(_number(part.get(name)) for part in parts))
    return table


def comparison_rows(
    comparison: Mapping[str, Any], metrics: Sequence[str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Header and text cells: a row per model, with ``mean ± spread`` where there are several seeds."""
    models = comparison["models"]
    names = list(metrics or _shown_metrics(models))
    header = ["model", "seeds", *(metric_name(n) for n in names), "epochs", "s / pass"]
    rows = []
    for label, group in models.items():
        cells = [_spread(group["test"]["mean"].get(n), group["test"]["std"].get(n)) for n in names]
        rows.append(
            [label, str(len(group["seeds"])), *cells, _number(group["epochs"], 0), _seconds(group["seconds_per_pass"])]
        )
    return header, rows


def comparison_table(comparison: Mapping[str, Any], *, highlight: str | None = None) -> Table:
    """The models side by side, for a terminal: metrics at the cut-off of the validation metric only."""
    cutoff = str(comparison["protocol"].get("valid_metric") or "").partition("@")[2]
    shown = [n for n in _shown_metrics(comparison["models"]) if n.partition("@")[2] == cutoff]
    header, rows = comparison_rows(comparison, shown)
    title = f"{comparison['dataset']}: test metrics, full ranking"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, min_width=50)
    for name in header:
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == highlight else None)
    return table


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """The models side by side with protocol, machine and versions, for a README."""
    header, rows = comparison_rows(comparison)
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    if "deltas" in comparison:
        delta = comparison["deltas"]
        shown = [n for n in _shown_metrics(comparison["models"]) if n in delta["mean"]]
        parts = [f"{metric_name(n)} {delta['mean'][n]:+.4f} (lowest {delta['min'][n]:+.4f})" for n in shown]
        lines += ["", f"{delta['of']} minus {delta['over']}, seed by seed: {', '.join(parts)}."]
    args = comparison["protocol"]["eval_args"] or {}
    mode = args.get("mode")
    mode = " / ".join(sorted(set(mode.values()))) if isinstance(mode, Mapping) else mode
    split = ", ".join(f"{k} {v}" for k, v in (args.get("split") or {}).items())
    lines += ["", f"Protocol: split {split}, order {args.get('order')}, {mode} ranking. {provenance(comparison)}"]
    return "\n".join(lines) + "\n"


def provenance(comparison: Mapping[str, Any]) -> str:
    """Machines, versions, commit and note of a comparison, in a sentence or two."""
    versions = comparison["versions"]
    by_machine: dict[str, list[str]] = {}
    for label, group in comparison["models"].items():
        for run in group.get("runs", [{}]):
            on = run.get("machine") or comparison["machine"]
            name = ", ".join(on["gpus"]) or f"{on['cpu']}, {on['threads']} threads"
            if label not in by_machine.setdefault(name, []):
                by_machine[name].append(label)
    machines = [f"{name} ({', '.join(of)})" if len(by_machine) > 1 else name for name, of in by_machine.items()]
    known = [f"{name} {versions[name]}" for name in ("python", "torch", "recbole", "numpy") if name in versions]
    commits = [_short(commit) for commit in comparison.get("commit", "").split(", ") if commit]
    recorded = {
        label: group["recorded"].get("commit") for label, group in comparison["models"].items() if "recorded" in group
    }
    older = [f"{label} of commit {_short(commit)}" for label, commit in recorded.items() if commit]
    text = (
        "; ".join([*machines, ", ".join(known), *(["commit " + ", ".join(commits)] if commits else []), *older]) + "."
    )
    return f"{text} {comparison['note']}" if comparison.get("note") else text


def _short(commit: str) -> str:
    """Twelve digits name a commit well enough."""
    return re.sub(r"^(\w{12})\w+", r"\1", commit)


def metric_name(name: str) -> str:
    """``ndcg@10`` as papers write it."""
    base, _, k = name.partition("@")
    return {"ndcg": "NDCG", "hit": "HR", "mrr": "MRR", "map": "MAP"}.get(base, base.capitalize()) + (
        f"@{k}" if k else ""
    )


def _group(runs: Sequence[Record]) -> Record:
    metrics = list(runs[0]["test"])
    values = {m: [float(r["test"][m]) for r in runs] for m in metrics}
    passes = [r["seconds_per_pass"] for r in runs if r["seconds_per_pass"] is not None]
    evaluations = [t for r in runs if (t := r.get("seconds_per_evaluation")) is not None]
    short = (
        "seed",
        "test",
        "valid",
        "epochs",
        "best_epoch",
        "seconds_per_pass",
        "seconds_per_evaluation",
        "train_seconds",
        "total_seconds",
        "machine",
    )
    return {
        "model": runs[0]["model"],
        "seeds": [r["seed"] for r in runs],
        "test": {
            "mean": {m: statistics.fmean(v) for m, v in values.items()},
            "std": {m: statistics.stdev(v) if len(v) > 1 else None for m, v in values.items()},
        },
        "epochs": statistics.fmean(r["epochs"] for r in runs),
        "seconds_per_pass": statistics.median(passes) if passes else None,
        "seconds_per_evaluation": statistics.median(evaluations) if evaluations else None,
        "parameters": runs[0]["parameters"],
        "user_config": runs[0]["user_config"],
        "config": runs[0]["config"],
        "runs": [{key: r.get(key) for key in short} for r in runs],
    }


def _deltas(groups: Mapping[str, Sequence[Record]], of: str, over: str) -> Record:
    for label in (of, over):
        if label not in groups:
            raise ReportError(f"deltas: expected one of {', '.join(groups)}, got {label!r}")
    left, right = ({r["seed"]: r["test"] for r in groups[label]} for label in (of, over))
    seeds = sorted(left.keys() & right.keys())
    if not seeds:
        raise ReportError(f"deltas: {of} and {over} have no seed in common")
    per_seed = {seed: {m: left[seed][m] - right[seed][m] for m in left[seed] if m in right[seed]} for seed in seeds}
    metrics = list(per_seed[seeds[0]])
    return {
        "of": of,
        "over": over,
        "per_seed": {str(seed): values for seed, values in per_seed.items()},
        "mean": {m: statistics.fmean(per_seed[s][m] for s in seeds) for m in metrics},
        "min": {m: min(per_seed[s][m] for s in seeds) for m in metrics},
    }


def _data_facts(dataset: Any) -> Record:
    """Counts without RecBole's padding id."""
    facts = {"users": int(dataset.user_num) - 1, "items": int(dataset.item_num) - 1}
    return facts


def _shown_metrics(models: Mapping[str, Any]) -> list[str]:
    available = list(next(iter(models.values()))["test"]["mean"])
    # On one held-out item recall equals the hit rate, and precision is the hit rate over k.
    return [m for m in available if m.partition("@")[0] not in ("recall", "precision")] or available


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _spread(mean: float | None, std: float | None) -> str:
    return _number(mean) if std is None else f"{_number(mean)} ± {_number(std)}"
