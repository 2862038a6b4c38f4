"""A table and a chart from the recorded rows: the newest run of each study counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.ledger import read_of_device
from benchmarks.stages.measure import ALONE, COLUMNS, WITHOUT
from benchmarks.stages.patching import WHOLE

Row = dict[str, str]
Study = tuple[str, str, str]
_LEGEND = """\
Each kernel was copied, one stage was taken out of the copy's source, and all copies were timed in turns, as replays of
CUDA graphs over rotating inputs. What a copy without a stage computes is wrong on purpose. A share is what the whole
takes more than the kernel without the stage, and of what is timed alone its own time, of the whole. Shares do not add
up: stages run beside each other, a stage may hide another, and without one the compiler arranges the rest anew. A
negative share is such a rearrangement.
"""
_HOST = """\
Host time of a backward, each part timed alone on calls whose kernels are compiled and remembered (medians, the parts in
turns, in the caller's thread). Indented parts belong to the one above.
"""


def write_report(source: Path, folder: Path, device: str | None = None) -> list[Path]:
    """Write ``stages.md`` and ``stages.png`` into ``folder``; returns what was written.

    Raises:
        LedgerError: nothing is recorded, or nothing for ``device``.
    """
    rows = read_of_device(source, COLUMNS, device)
    studies = newest_runs(rows)
    folder.mkdir(parents=True, exist_ok=True)
    text, chart = folder / "stages.md", folder / "stages.png"
    drawn = _draw(studies, chart)
    text.write_text(markdown(studies, chart.name if drawn else None), encoding="utf-8")
    return [text, chart] if drawn else [text]


def newest_runs(rows: Sequence[Row]) -> dict[Study, list[Row]]:
    """By case, direction, and whether the host was timed: the rows of the latest run that holds some."""
    found: dict[Study, list[Row]] = {}
    for row in rows:
        key = (row["case"], row["direction"], "host" if row["kernel"] == "host" else "device")
        if key in found and found[key][0]["taken_at"] != row["taken_at"]:
            del found[key]
        found.setdefault(key, []).append(row)
    return found


def markdown(studies: dict[Study, list[Row]], chart: str | None = None) -> str:
    """The report of rows of one device."""
    rows = [row for found in studies.values() for row in found]

    def distinct(name: str) -> str:
        return ", ".join(dict.fromkeys(row[name] for row in rows if row[name]))

    commits = ", ".join(commit[:9] for commit in distinct("commit").split(", "))
    about = (
        f"{distinct('device')}; torch {distinct('torch')}; Triton {distinct('triton')}; commits {commits}; bfloat16."
    )
    parts = ["# Where the time of a kernel goes\n", f"{about}\n\n{_LEGEND}"]
    for (case, direction, where), found in studies.items():
        if where == "host":
            continue
        body = [_cells(row) for row in found]
        parts += [f"\n## {case}, {direction}: {found[0]['kernel']}\n"]
        parts += [_table(["", "ms [20th, 80th percentile]", "share of the whole"], body)]
    hosts = {case: found for (case, _, where), found in studies.items() if where == "host"}
    if hosts:
        named = list(dict.fromkeys(row["stage"] for found in hosts.values() for row in found))
        times = {(case, row["stage"]): float(row["p50_ms"]) * 1e3 for case, found in hosts.items() for row in found}
        body = [
            [_indented(part), *(f"{times[case, part]:.1f}" if (case, part) in times else "" for case in hosts)]
            for part in named
        ]
        parts += [f"\n## Host, microseconds\n\n{_HOST}\n", _table(["part", *hosts], body)]
    if chart:
        parts += [f"\n![stages]({chart})\n"]
    return "\n".join(parts)


def _cells(row: Row) -> list[str]:
    word = {WHOLE.name: "whole", WITHOUT: f"without {row['stage']}", ALONE: f"{row['stage']} alone"}[row["kind"]]
    spread = f"{float(row['p50_ms']):.4g} [{float(row['p20_ms']):.4g}, {float(row['p80_ms']):.4g}]"
    return [word, spread, "" if row["kind"] == WHOLE.name else f"{100 * float(row['share']):.1f} %"]


def _indented(part: str) -> str:
    depth = len(part) - len(part.lstrip())
    return "&nbsp;" * 2 * depth + part.lstrip()


def _draw(studies: dict[Study, list[Row]], path: Path) -> bool:
    """One panel of bars for each study; whether there was any."""
    panels = {key: [row for row in found if row["kind"] in (WITHOUT, ALONE)] for key, found in studies.items()}
    panels = {key: found for key, found in panels.items() if found and key[2] != "host"}
    if not panels:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [len(found) + 1 for found in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, 0.28 * sum(heights) + 0.6 * len(panels)), height_ratios=heights, squeeze=False
    )
    for ((case, direction, _), found), axis in zip(panels.items(), axes[:, 0], strict=True):
        names = [row["stage"] + (" alone" if row["kind"] == ALONE else "") for row in found]
        colours = ["C1" if row["kind"] == ALONE else "C0" for row in found]
        axis.barh(names, [100 * float(row["share"]) for row in found], color=colours)
        axis.invert_yaxis()
        axis.set_title(f"{case}, {direction}", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3, axis="x")
    axes[-1, 0].set_xlabel("% of the whole: taken off without the stage (blue), timed alone (orange)", fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return True


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
