"""README tables of cached scoring, of what ULTRA-HSTU saves, of the streaming experiment and of load balance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import balance_quality, cost_report, mfalcon, synthetic_streaming
from benchmarks.ledger import read

RECORDS = {
    "mfalcon": "benchmarks/results/mfalcon.csv",
    "cost": "benchmarks/results/cost.csv",
    "streaming": "benchmarks/results/synthetic-streaming.json",
    "balance": "benchmarks/results/balance-quality.json",
}
_SCORED = ("naive", "full", "mfalcon-graphs", "graphs")
Table = tuple[list[str], list[list[str]], list[str]]


def cached_scoring(root: Path) -> list[Table]:
    """Candidates per second, median and 99th percentile of a request: from vectors on the device, and from the host."""
    found = [r for r in read(root / RECORDS["mfalcon"], mfalcon.COLUMNS) if r["model"] == "hstu"]
    newest = {(int(r["history"]), int(r["candidates"]), r["way"], r["transfers"] == "True"): r for r in found}
    cases = sorted({key[:2] for key in newest})
    tables = []
    for transfers in (False, True):
        rows = [
            [str(length), str(count), *(_speed(newest.get((length, count, way, transfers))) for way in _SCORED)]
            for length, count in cases
        ]
        start = "from host memory to scores on the host" if transfers else "from vectors on the device"
        header = ["history", "candidates", *(f"`{way}`" for way in _SCORED)]
        shown = [r for key, r in newest.items() if key[2] in _SCORED and key[3] == transfers]
        facts = sorted({_where(r) + f"; {r['layers']} layers, d {r['dim']}, {r['dtype']}" for r in shown})
        samples = [int(r["samples"]) for r in shown] or [0]
        read_as = f"{min(samples)} to {max(samples)} requests a cell, and of few the p99 is near the slowest"
        what = f"Candidates per second (p50 / p99 of a request, ms; {read_as}), {start}"
        tables.append((header, rows, [f"{what}. {'; '.join(facts)}."]))
    return tables


def _speed(row: dict[str, str] | None) -> str:
    if row is None:
        return "-"
    rate = float(row["candidates_per_s"])
    shown = f"{rate / 1e6:.2f} M" if rate >= 1e6 else f"{rate / 1e3:.0f} k"
    return f"{shown} ({float(row['p50_ms']):.2f} / {float(row['p99_ms']):.2f})"


def _where(row: dict[str, Any]) -> str:
    return f"{row['device']}, torch {row['torch']}, commit {row['commit'][:7]}"


def cost(root: Path) -> str:
    """Cost of one history by model, as ``benchmarks/results/cost.md`` has it."""
    rows = read(root / RECORDS["cost"], cost_report.COLUMNS)
    newest = {(row["phase"], row["model"], int(row["tokens"])): row for row in rows}
    facts = sorted({f"{_where(row)}, Triton {row['triton']}" for row in newest.values()})
    return cost_report.markdown(newest).rstrip("\n") + f"\n\n{'; '.join(facts)}.\n"


def streaming(root: Path) -> str:
    """Hit rates of the three sides by the length of the stream."""
    found = json.loads((root / RECORDS["streaming"]).read_text(encoding="utf-8"))
    seeds = sorted({run["seed"] for run in found["runs"]})
    longest = max(size["tuning_records"] for size in found["sizes"])
    first = found["sizes"][0]["models"]
    holds = []
    for metric in ("hr@50", "hr@10"):
        ordered = [s["records"] for s in found["sizes"] if all(gap[metric]["least"] > 0 for gap in s["gaps"])]
        at = f"at {' and '.join(f'{records:,}' for records in ordered)} records" if ordered else "nowhere"
        holds.append(f"{metric.upper()} {at}")
    order = f"The order {' < '.join(first)} holds with every seed for {', for '.join(holds)}."
    note = f"{order} {len(seeds)} seeds; rates tried on streams of at most {longest:,} records. {_where(found)}."
    return synthetic_streaming.markdown(found["sizes"]) + f"\n\n{note}\n"


def balance(root: Path) -> str:
    """Quality and load of a training with and without load-balanced stochastic length."""
    found = json.loads((root / RECORDS["balance"]).read_text(encoding="utf-8"))
    settings = found["runs"][0]["settings"]
    epochs = sorted({run["epochs"] for run in found["runs"]})
    note = (
        f"Recipe {settings['recipe']}, {' to '.join(map(str, epochs))} epochs, {settings['ranks']} simulated ranks, "
        f"alpha {settings['alpha']}. {'; '.join(sorted({_where(run) for run in found['runs']}))}."
    )
    return balance_quality.markdown(found["ways"]) + f"\n\n{note}\n"
