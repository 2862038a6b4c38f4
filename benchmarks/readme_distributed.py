"""README tables of training on several GPUs, of the trainings through TorchX, and of exported scoring."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

_RESULTS = "benchmarks/results"
_SCALING, _LONG, _EXPORT = "distributed", "mfu-ultra", "export"
# Name in TorchX's record, in that of the other door, shown; by data set.
_RETRIEVAL = (("hr@10", "hit@10", "HR@10"), ("ndcg@10", "ndcg@10", "NDCG@10"))
_RANKING = tuple(
    (f"{task}/{metric}", (task, metric), f"{task.replace('_', ' ')} {metric.upper()}")
    for task in ("click", "long_view", "like")
    for metric in ("auc", "gauc", "ne")
)


def distributed(root: Path) -> str:
    """Scaling and model FLOPs utilisation, TorchX beside the other doors, latency of the exported scorer."""
    return "\n".join(_part(*part) for part in (_scaling(root), _torchx(root), _export(root)))


def _scaling(root: Path) -> tuple[list[str], list[list[str]], list[str]]:
    rows, remarks = [], []
    for name in (_SCALING, _LONG):
        record = _read(root, name)
        efficiency = {one["processes"]: one["efficiency"] for one in record["scaling"]}
        for run in record["runs"]:
            sizes, ranks = run["sizes"], run["world_size"]
            low, high = (1e3 * seconds for seconds in run["seconds_per_step_p20_p80"])
            jagged = "" if sizes["shortest"] == sizes["max_seq_len"] else "jagged to "
            rows.append(
                [
                    f"{sizes['variant']}, {sizes['num_layers']} layers, d {sizes['embedding_dim']}, "
                    f"L {jagged}{sizes['max_seq_len']}, {sizes['users']} users a GPU, {sizes['rows'] / 1e6:g}M rows",
                    f"{ranks}",
                    f"{1e3 * run['seconds_per_step']:.1f} ({low:.1f} to {high:.1f})",
                    f"{run['samples_per_second']:,.0f}",
                    f"{efficiency[ranks]:.1%}" if ranks > 1 else "-",
                    f"{run['mfu']:.1%} of {run['matrix_flops_per_second'] / 1e12:.0f} TFLOP/s",
                ]
            )
        remarks.append(f"`{name}`: {_provenance(record, record['runs'][-1])}")
    return ["training step", "GPUs", "ms (20th to 80th percentile)", "samples/s", "efficiency", "MFU"], rows, remarks


def _torchx(root: Path) -> tuple[list[str], list[list[str]], list[str]]:
    rows, remarks = [], []
    retrieval = _read(root, "ml-1m")["models"]["HSTU"]
    ranking = _read(root, "kuairand")["models"]["ultra-hstu"]
    for name, other, metrics in (("ml-1m", retrieval, _RETRIEVAL), ("kuairand", ranking, _RANKING)):
        records = _seeds(root, f"torchx-{name}")
        for ours, theirs, shown in metrics:
            test = other["test"]
            found = (
                test[theirs[0]][theirs[1]]
                if isinstance(theirs, tuple)
                else {part: test[part][theirs] for part in ("mean", "std")}
            )
            values = [record["metrics"][ours] for record in records]
            # As the other doors' reports: of these seeds, not an estimate for others.
            spread = statistics.pstdev(values) if len(values) > 1 else None
            here = _of_seeds(statistics.mean(values), spread, len(values))
            rows.append([name, shown, here, _of_seeds(found["mean"], found["std"], len(other["seeds"]))])
        first = records[0]
        seeds = ", ".join(str(record["options"]["run"]["seed"]) for record in records)
        named = "seed" if len(records) == 1 else "seeds"
        remarks.append(f"`{name}`: {named} {seeds}; {first['step']:,} steps; {_provenance(first, first)}")
    return ["data", "metric", "through `torchx run`", "`hstu-recbole`, `hstu-rank`"], rows, remarks


def _export(root: Path) -> tuple[list[str], list[list[str]], list[str]]:
    record = _read(root, _EXPORT)
    rows = []
    for name, found in record["contenders"].items():
        if "ms" not in found:
            reason = found.get("failed") or found["not measured"]
            rows.append([name, "-", reason.partition(";")[0]])
            continue
        error = found.get("relative_error")
        rows.append([name, f"{found['ms']:.2f}", "-" if error is None else f"{error:.0e}"])
    sizes = record["sizes"]
    facts = (
        f"{sizes['users']} users of at most {sizes['history']} events, {sizes['candidates']} candidates each, "
        f"{sizes['layers']} layers, d {sizes['dim']}, {record['dtype']}; {_provenance(record, record)}"
    )
    return ["scoring path", "ms", "relative error against jagged"], rows, [facts]


def _of_seeds(mean: float, spread: float | None, seeds: int) -> str:
    around = "" if spread is None else f" ± {spread:.4f}"
    return f"{mean:.4f}{around} ({seeds} {'seed' if seeds == 1 else 'seeds'})"


def _seeds(root: Path, name: str) -> list[dict[str, Any]]:
    """The records ``name``, ``name-2``, ``name-3`` ...: one training with other seeds.

    Raises:
        ValueError: they are not of one code, or differ in more than the seed.
    """
    further = sorted((root / _RESULTS).glob(f"{name}-[0-9].json"))
    records = [_read(root, name), *(_read(root, path.stem) for path in further)]
    for path, record in zip(further, records[1:], strict=True):
        if _training(record) != _training(records[0]):
            raise ValueError(f"{path.name}: expected commit and options of {name}.json; record all seeds anew")
    return records


def _training(record: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What all seeds have in common."""
    options = record["options"]
    run = {key: value for key, value in options["run"].items() if key not in ("seed", "output_dir")}
    return record["commit"], options | {"run": run}


def _read(root: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / _RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _provenance(record: dict[str, Any], run: dict[str, Any]) -> str:
    device = run.get("device") or ", ".join(run["machine"]["gpus"]) or run["machine"]["cpu"]
    command = f"; `{record['command']}`" if "command" in record else ""
    note = f" {record['note']}" if "note" in record else ""
    return f"{device}, torch {run['versions']['torch']}, commit {run['commit'][:7]}{command}.{note}"


def _part(header: list[str], rows: list[list[str]], remarks: list[str]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return table + "\n" + "".join(f"- {remark}\n" for remark in remarks)
