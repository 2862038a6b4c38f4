"""Markdown tables and PNG charts from the recorded rows: the newest row of each case and contender counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.attention.measure import BACKWARD, CALL, COLUMNS, FORWARD, GRAPH, UNPLANNED
from benchmarks.ledger import LedgerError, read

Row = dict[str, str]
_LEGEND = """\
Median milliseconds [20th, 80th percentile] of device events over rotating inputs, and TFLOP/s of useful work: causal
attention as published elsewhere, `2 * sum(L^2) / 2 * H * (Dqk + Dv)`; other masks by their exact number of visible
pairs; a backward counts 2.5 times its forward. Softmax baselines compute another function with the same two products
for a pair.
"""
_KEY = ("device", "dtype", "case", "contender", "direction", "mode")
_LENGTH_SERIES = ("full", "semi-local prefix", "semi-local tail", "truncated")


def write_report(source: Path, folder: Path, device: str | None = None) -> list[Path]:
    """Write ``attention.md`` and charts into ``folder``; returns the files.

    Raises:
        LedgerError: nothing is recorded, or nothing for ``device``.
    """
    rows = newest(read(source, COLUMNS))
    device = device or (rows[-1]["device"] if rows else "")
    rows = [row for row in rows if device in row["device"]]
    if not rows:
        raise LedgerError(f"{source}: no rows of a device named {device!r}")
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "attention.md"
    charts = _charts(rows, folder)
    text.write_text(markdown(rows, [chart.name for chart in charts]), encoding="utf-8")
    return [text, *charts]


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each case, contender, direction and mode, in order of the file."""
    kept: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in _KEY)
        kept.pop(key, None)
        kept[key] = row
    return list(kept.values())


def markdown(rows: Sequence[Row], charts: Sequence[str] = ()) -> str:
    """The report of rows of one device."""
    parts = ["# Attention: recorded speeds\n", _provenance(rows)]
    for group in dict.fromkeys(row["group"] for row in rows):
        of_group = [row for row in rows if row["group"] == group]
        parts += [f"\n## {group}\n", _speed_table([row for row in of_group if row["mode"] == CALL])]
        if any(row["mode"] == GRAPH for row in of_group):
            parts += ["\nMicroseconds of a plain call, of a replay in a CUDA graph, and of the host for a call:\n"]
            parts += [_small_table(of_group)]
    slopes = length_slopes(rows)
    if slopes:
        parts += ["\n## Growth with length\n", "Slope of log time against log length; 1 is linear, 2 quadratic.\n"]
        body = [[*key, f"{slope:.2f}", f"{low} to {high}"] for key, (slope, low, high) in slopes.items()]
        parts += [_table(["contender", "series", "direction", "slope", "lengths"], body)]
    for title, comparison in (("Cost of the bias", bias_ratios(rows)), ("Cached targets", cached_ratios(rows))):
        if comparison:
            parts += [f"\n## {title}\n", _table(*comparison)]
    parts += [f"\n![{name.removesuffix('.png')}]({name})\n" for name in charts]
    return "\n".join(parts)


def length_slopes(rows: Sequence[Row]) -> dict[tuple[str, str, str], tuple[float, int, int]]:
    """Least-squares slope, shortest and longest length, by contender, series and direction; three lengths at least."""
    points: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows:
        if row["mode"] == CALL and row["series"] in _LENGTH_SERIES and row["group"] in _LENGTH_GROUPS:
            key = row["contender"], row["series"], row["direction"]
            points.setdefault(key, {})[int(row["length"])] = float(row["p50_ms"])
    slopes = {}
    for key, found in points.items():
        if len(found) < 3:
            continue
        xs, ys = [math.log(x) for x in found], [math.log(y) for y in found.values()]
        mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
        rise = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
        slopes[key] = rise / sum((x - mean_x) ** 2 for x in xs), min(found), max(found)
    return slopes


_LENGTH_GROUPS = ("length", "semi_local", "truncated")


def bias_ratios(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]] | None:
    """Time and memory with each bias relative to the same case without one."""
    found = [row for row in rows if row["group"] == "biased" and row["mode"] == CALL]
    plain = {(row["contender"], row["direction"]): row for row in found if row["bias"] == "none"}
    body = []
    for row in found:
        base = plain.get((row["contender"], row["direction"]))
        if base is None or row is base:
            continue
        time = float(row["p50_ms"]) / float(base["p50_ms"])
        memory = f"{float(row['peak_mib']) / float(base['peak_mib']):.3f}" if base["peak_mib"] else ""
        body.append([row["contender"], row["bias"], row["direction"], f"{time:.2f}", memory])
    return (["contender", "bias", "direction", "time / without", "memory / without"], body) if body else None


def cached_ratios(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]] | None:
    """How much faster cached targets are than the forward over history and candidates."""
    found = {
        (row["case"], row["contender"]): float(row["p50_ms"])
        for row in rows
        if row["group"] == "targets" and row["direction"] == FORWARD and row["mode"] == CALL
    }
    body = []
    for (case, contender), time in found.items():
        full = found.get((case, contender.removesuffix("-cached")))
        if contender.endswith("-cached") and full is not None:
            body.append([case, contender, f"{full:.3f}", f"{time:.3f}", f"{full / time:.1f}"])
    return (["case", "contender", "full forward, ms", "cached, ms", "times faster"], body) if body else None


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
        body.append([*cells, memory[-1] if memory else ""])
    header = ["case", "contender", "forward, ms", "TFLOP/s", "backward, ms", "TFLOP/s", "peak MiB"]
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
        host = found[case, contender, direction, CALL]["host_us"]
        body.append([*cells, f"{float(host):.1f}" if host else ""])
    return _table(["case", "contender", "direction", "call", "graph", "call without a plan", "host"], body)


def _milliseconds(row: Row) -> str:
    return " ".join([f"{float(row['p50_ms']):.4g}", f"[{float(row['p20_ms']):.4g}, {float(row['p80_ms']):.4g}]"])


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _charts(rows: Sequence[Row], folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    calls = [row for row in rows if row["mode"] == CALL]
    dense = [row for row in calls if row["group"] in ("causal", "length") and row["qk_dim"] == "128"]
    against = [row for row in calls if row["group"] in _LENGTH_GROUPS and row["batch"] == "4"]
    charts = [
        _chart(dense, "tflops_convention", "TFLOP/s, causal", "contender", folder / "attention-tflops.png"),
        _chart(against, "p50_ms", "milliseconds, batch of 4", "series", folder / "attention-time.png", log=True),
    ]
    return [chart for chart in charts if chart is not None]


def _chart(rows: Sequence[Row], column: str, label: str, by: str, path: Path, *, log: bool = False) -> Path | None:
    """One panel for each direction, one line for each contender (and series)."""
    from matplotlib import pyplot

    if not rows:
        return None
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    for panel, direction in zip(panels, (FORWARD, BACKWARD), strict=True):
        lines: dict[str, dict[int, float]] = {}
        for row in rows:
            if row["direction"] == direction:
                name = row["contender"] if by == "contender" else f"{row['contender']}, {row['series']}"
                lines.setdefault(name, {})[int(row["length"])] = float(row[column])
        for name, points in lines.items():
            xs = sorted(points)
            panel.plot(xs, [points[x] for x in xs], marker="o", label=name)
        panel.set_xscale("log", base=2)
        if log:
            panel.set_yscale("log")
        else:
            panel.set_ylim(bottom=0)
        panel.set(title=direction, xlabel="sequence length", ylabel=label)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return path
