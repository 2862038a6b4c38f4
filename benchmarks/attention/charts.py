"""Charts of recorded rows: speed against length beside the peers, time against length for full and sparse masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.attention.cases import TRUNCATED_SHARE
from benchmarks.attention.compare import LENGTH_GROUPS, Row
from benchmarks.attention.measure import BACKWARD, CALL, FORWARD

_Lines = dict[str, dict[int, float]]


def charts(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the PNG files for which there are rows; ``rows`` are the newest ones of one device."""
    calls = [row for row in rows if row["mode"] == CALL]
    # Published shapes hold about as many rows at every length; a batch of 4 throughout is another line.
    published = [row for row in calls if row["group"] == "causal" and row["qk_dim"] == "128"]
    dense = published + [row for row in calls if row["group"] == "length"]
    over_length = [row for row in calls if row["group"] in LENGTH_GROUPS and row["batch"] == "4"]
    over_length += truncated(over_length)
    done = [
        _chart(dense, "tflops_convention", "TFLOP/s, causal, D 128", _by_contender, folder / "attention-tflops.png"),
        _chart(over_length, "p50_ms", "milliseconds, batch of 4", _by_series, folder / "attention-time.png", log=True),
    ]
    return [chart for chart in done if chart is not None]


def truncated(rows: Sequence[Row]) -> list[Row]:
    """Rows of attention over the latest quarter of a sequence, where none are recorded: full ones of that length.

    It is the same call.
    """
    full = [row for row in rows if row["series"] == "full"]
    lengths = {int(row["length"]) for row in full}
    known = {(row["contender"], row["direction"]) for row in rows if row["series"] == "truncated"}
    return [
        {**row, "series": "truncated", "length": str(length)}
        for row in full
        if (length := int(row["length"]) * TRUNCATED_SHARE) in lengths
        and (row["contender"], row["direction"]) not in known
    ]


def _by_contender(row: Row) -> str:
    return f"{row['contender']}, batch of 4" if row["group"] == "length" else row["contender"]


def _by_series(row: Row) -> str:
    return f"{row['contender']}, {row['series']}"


def _chart(
    rows: Sequence[Row], column: str, label: str, name_of: Callable[[Row], str], path: Path, *, log: bool = False
) -> Path | None:
    """One panel for each direction, one line for each name."""
    if not rows:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.6), sharex=True)
    lengths = sorted({int(row["length"]) for row in rows})
    names = list(dict.fromkeys(name_of(row) for row in rows))
    for panel, direction in zip(panels, (FORWARD, BACKWARD), strict=True):
        lines: _Lines = {}
        for row in rows:
            if row["direction"] == direction:
                lines.setdefault(name_of(row), {})[int(row["length"])] = float(row[column])
        for name, points in lines.items():
            xs = sorted(points)
            # The same colour for a name in both panels, although a contender may lack a direction.
            panel.plot(xs, [points[x] for x in xs], marker="o", label=name, color=f"C{names.index(name)}")
        if not log:
            ceiling = float(rows[-1]["matmul_tflops"])
            panel.axhline(ceiling, color="grey", linestyle="--", label="bf16 product in the same run")
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [str(n) for n in lengths])
        if log:
            panel.set_yscale("log")
        else:
            panel.set_ylim(bottom=0)
        panel.set(title=direction, xlabel="sequence length", ylabel=label)
        panel.grid(alpha=0.3, which="both" if log else "major")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=4)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return path
