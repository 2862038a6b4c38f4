"""Markdown tables and PNG charts from the recorded rows: the newest row of each case and contender counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.attention.charts import charts
from benchmarks.attention.compare import Row, bias_ratios, cached_ratios, length_slopes, newest
from benchmarks.attention.measure import ADDED, BACKWARD, CALL, COLUMNS, EMPTY, FORWARD, GRAPH, UNPLANNED
from benchmarks.floors import HEADER, Floor, judge, load
from benchmarks.layer.columns import COLUMNS as LAYER_COLUMNS
from benchmarks.ledger import read, read_of_device

_LEGEND = """\
Median milliseconds [20th, 80th percentile] of device events over rotating inputs, and TFLOP/s of useful work: causal
attention as published elsewhere, `2 * sum(L^2) / 2 * H * (Dqk + Dv)`; other masks by their exact number of visible
pairs; a backward counts 2.5 times its forward. Softmax baselines compute another function with the same two products
for a pair. The error is the largest relative one of outputs and gradients against float64, in the Frobenius norm.
"""
_HOST = (
    "Of a backward also `empty`, the host time through an operation that does nothing, and `added`, what ours takes "
    "more than that when both run in the caller's thread and take turns; the floor of 60 us judges the latter."
)


def write_report(source: Path, layers: Path, folder: Path, device: str | None = None) -> tuple[list[Path], list[Floor]]:
    """Write ``attention.md`` and charts into ``folder``; returns the files, and the floors beside what was recorded.

    ``layers`` is the ledger of the layer benchmark; without it the floors of layers are not measured.

    Raises:
        LedgerError: nothing is recorded, or nothing for ``device``.
    """
    rows = read_of_device(source, COLUMNS, device)
    device = device or rows[-1]["device"]
    steps = [row for row in read(layers, LAYER_COLUMNS) if device in row["device"]] if layers.is_file() else []
    floors = judge(load(), rows, steps)
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "attention.md"
    drawn = charts(newest(rows), folder)
    text.write_text(markdown(newest(rows), floors, [chart.name for chart in drawn]), encoding="utf-8")
    return [text, *drawn], floors


def markdown(rows: Sequence[Row], floors: Sequence[Floor] = (), drawn: Sequence[str] = ()) -> str:
    """The report of rows of one device."""
    parts = ["# Attention: recorded speeds\n", _provenance(rows)]
    if floors:
        parts += ["\n## What must be reached\n", "Two numbers are forward and backward.\n"]
        parts += [_table(HEADER, [floor.cells() for floor in floors])]
    for group in dict.fromkeys(row["group"] for row in rows):
        of_group = [row for row in rows if row["group"] == group]
        parts += [f"\n## {group}\n", _speed_table([row for row in of_group if row["mode"] == CALL])]
        if any(row["mode"] == GRAPH for row in of_group):
            parts += [
                f"\nMicroseconds of a plain call, of a replay in a CUDA graph, and of the host for a call. {_HOST}\n"
            ]
            parts += [_small_table(of_group)]
    slopes = length_slopes(rows)
    if slopes:
        parts += ["\n## Growth with length\n", "Slope of log time against log length; 1 is linear, 2 quadratic.\n"]
        body = [[*key, f"{slope:.2f}", f"{low} to {high}"] for key, (slope, low, high) in slopes.items()]
        parts += [_table(["contender", "series", "direction", "slope", "lengths"], body)]
    for title, comparison in (("Cost of the bias", bias_ratios(rows)), ("Cached targets", cached_ratios(rows))):
        if comparison:
            parts += [f"\n## {title}\n", _table(*comparison)]
    parts += [f"\n![{name.removesuffix('.png')}]({name})\n" for name in drawn]
    return "\n".join(parts)


def _provenance(rows: Sequence[Row]) -> str:
    def distinct(name: str) -> str:
        return ", ".join(dict.fromkeys(row[name] for row in rows if row[name]))

    ceilings = [float(row["matmul_tflops"]) for row in rows], [float(row["copy_tbs"]) for row in rows]
    ranges = [f"{min(values):.3g} to {max(values):.3g}" for values in ceilings]
    commits = ", ".join(commit[:9] for commit in distinct("commit").split(", "))
    return (
        f"{distinct('device')}; torch {distinct('torch')}; Triton {distinct('triton')}; Python {distinct('python')}; "
        f"commits {commits}; {distinct('dtype')}. In the same runs: bf16 product {ranges[0]} TFLOP/s, device copy "
        f"{ranges[1]} TB/s.\n\n{_LEGEND}"
    )


def _speed_table(rows: Sequence[Row]) -> str:
    by_call: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        by_call.setdefault((row["case"], row["contender"]), {})[row["direction"]] = row
    body = []
    for (case, contender), found in by_call.items():
        cells = [case, contender]
        for direction in (FORWARD, BACKWARD):
            timed = found.get(direction)
            cells += ["", ""] if timed is None else [_milliseconds(timed), f"{float(timed['tflops_convention']):.4g}"]
        memory = [row["peak_mib"] for row in found.values() if row["peak_mib"]]
        errors = [row["relative_error"] for row in found.values() if row["relative_error"]]
        error = f"{float(errors[-1]):.2g}" if errors else ""
        body.append([*cells, memory[-1] if memory else "", error])
    header = ["case", "contender", "forward, ms", "TFLOP/s", "backward, ms", "TFLOP/s", "peak MiB", "error"]
    return _table(header, body)


def _small_table(rows: Sequence[Row]) -> str:
    found = {(row["case"], row["contender"], row["direction"], row["mode"]): row for row in rows}
    body = []
    for case, contender, direction, mode in found:
        if mode != CALL:
            continue
        cells = [case, contender, direction]
        for kind in (CALL, GRAPH, UNPLANNED):
            timed = found.get((case, contender, direction, kind))
            cells.append("" if timed is None else f"{float(timed['p50_ms']) * 1e3:.1f}")
        for kind in (CALL, EMPTY, ADDED):
            row = found.get((case, contender, direction, kind))
            cells.append(f"{float(row['host_us']):.1f}" if row and row["host_us"] else "")
        body.append(cells)
    header = ["case", "contender", "direction", "call", "graph", "call without a plan", "host"]
    return _table([*header, "host, empty", "host, added"], body)


def _milliseconds(row: Row) -> str:
    return " ".join([f"{float(row['p50_ms']):.4g}", f"[{float(row['p20_ms']):.4g}, {float(row['p80_ms']):.4g}]"])


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
