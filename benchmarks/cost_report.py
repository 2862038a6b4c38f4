"""Tables and chart of the rows that ``python -m benchmarks.cost run`` records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.ledger import RESULTS

LEDGER = RESULTS / "cost.csv"
_PROVENANCE = ("taken_at", "commit", "device", "torch", "triton", "python", "cuda")
_CASE = ("model", "tokens", "phase", "events", "candidates", "layers", "dim", "heads")
_SETTINGS = ("window", "tail", "truncate_after", "truncate_to", "dtype", "backend", "histories")
_MEASURED = ("gflops", "gflops_linear", "ms", "ms_least", "ms_most", "samples", "peak_gib")
COLUMNS = (*_PROVENANCE, *_CASE, *_SETTINGS, *_MEASURED)
NAMES = {
    "hstu": "HSTU",
    "hstu-no-bias": "HSTU without relative bias",
    "semi-local": "semi-local attention",
    "ultra": "ULTRA-HSTU",
}
# ULTRA-HSTU (arXiv 2602.16986): changes at 16384 events and 18 layers.
PUBLISHED = {"training": -59.7, "scoring": -90.7}

Row = dict[str, str]


def render(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write ``cost.md`` and ``cost.png``."""
    newest = {(row["phase"], row["model"], int(row["tokens"])): row for row in rows}
    folder.mkdir(parents=True, exist_ok=True)
    text, picture = folder / "cost.md", folder / "cost.png"
    part = text.with_suffix(".part")
    part.write_text(markdown(newest), encoding="utf-8")
    part.replace(text)
    draw(newest, picture)
    return [text, picture]


def markdown(newest: dict[tuple[str, str, int], Row]) -> str:
    """A table for each phase: cost of one history, and its change against HSTU on as many and on twice as many rows."""
    parts = []
    for phase, published in PUBLISHED.items():
        found = {key[1:]: row for key, row in newest.items() if key[0] == phase}
        if not found:
            continue
        first = next(iter(found.values()))
        what = "One training step" if phase == "training" else "Scoring one request"
        parts.append(
            f"{what}, for one history of {first['events']} events and {first['candidates']} candidates; "
            f"{first['layers']} layers, d {first['dim']}, {first['heads']} heads, {first['dtype']}, "
            f"{first['histories']} histories at once, {first['device']}. Published for ULTRA-HSTU: "
            f"{published} % operations.\n"
        )
        parts.append(
            "| model | rows of an event | GFLOP | ms | peak GiB | operations against HSTU, one row | two rows "
            "| times faster than HSTU, one row | two rows |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|"
        )
        for (model, tokens), row in found.items():
            bases = [found.get(("hstu", n)) for n in (1, 2)]
            less = [_percent(row, base) for base in bases]
            faster = ["" if base is None else f"{float(base['ms']) / float(row['ms']):.2f}" for base in bases]
            peak = f"{float(row['peak_gib']):.1f}" if row["peak_gib"] else ""
            cells = [NAMES[model], str(tokens), f"{float(row['gflops']):,.0f}", f"{float(row['ms']):.2f}", peak]
            parts.append(f"| {' | '.join(cells + less + faster)} |")
        ultra = found.get(("ultra", 1))
        if ultra is not None:
            parts.append(
                f"\nULTRA-HSTU: window {ultra['window']}, tail {ultra['tail']}; {ultra['truncate_after']} layers over "
                f"the whole history, the others over the latest {ultra['truncate_to']} events.\n"
            )
    return "\n".join(parts)


def _percent(row: Row, base: Row | None) -> str:
    return "" if base is None else f"{(float(row['gflops']) / float(base['gflops']) - 1) * 100:+.1f} %"


def draw(newest: dict[tuple[str, str, int], Row], output: Path) -> None:
    """Time of one history by model, a panel for each phase."""
    from matplotlib.figure import Figure

    phases = [phase for phase in PUBLISHED if any(key[0] == phase for key in newest)]
    figure = Figure(figsize=(6.4 * max(1, len(phases)), 3.2), layout="constrained")
    panels = figure.subplots(1, max(1, len(phases)), squeeze=False)[0]
    for panel, phase in zip(panels, phases, strict=False):
        found = [(key, row) for key, row in newest.items() if key[0] == phase]
        names = [NAMES[key[1]] + (", two rows" if key[2] == 2 else "") for key, _ in found]
        bars = panel.barh(names, [float(row["ms"]) for _, row in found])
        panel.bar_label(bars, [f"{float(row['ms']):.1f}" for _, row in found], padding=3)
        panel.invert_yaxis()
        panel.margins(x=0.25)
        panel.set(title="training step" if phase == "training" else "scoring", xlabel="ms for one history")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
