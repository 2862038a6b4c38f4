"""Bring the tables of README.md up to date with the recorded results: ``python -m benchmarks.update_readme [--check]``.

A table stands between ``<!-- results:NAME begin -->`` and ``<!-- results:NAME end -->``. NAME is a comparison recorded
as ``recbole_configs/results/NAME.json`` or ``benchmarks/results/NAME.json``, or ``versions`` (the releases that fit
together), ``recipes`` (the settings that come with the package), ``summary`` (recorded results beside those of
``benchmarks/published.yaml``), ``passes`` and ``cpu-passes`` (the time of a pass over MovieLens-1M and 100K),
``attention`` (recorded speeds), ``quantized`` (recorded sizes and metrics of quantised models), ``int4`` (recorded
speeds of quantised tables), ``mfalcon`` (cached scoring), ``cost`` (what ULTRA-HSTU saves), ``streaming`` (the
synthetic stream), ``balance`` (quality under load-balanced lengths) or ``distributed`` (TorchRec and TorchX). Those
from ``mfalcon`` on are empty until recorded.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from benchmarks import readme_ranking
from benchmarks.attention.measure import BACKWARD, CALL, FORWARD
from benchmarks.attention.measure import COLUMNS as ATTENTION_COLUMNS
from benchmarks.ledger import read
from benchmarks.readme_distributed import distributed
from benchmarks.readme_int4 import quantized, speed
from hstu_plugin._versions import version_table
from hstu_plugin.adapters.ranking import report as ranking
from hstu_plugin.adapters.recbole import report, settings

ROOT = Path(__file__).resolve().parents[1]
TIMED = ("ml-1m", "ml-1m-large")
OURS = "triton"
FOLDERS = ("recbole_configs/results", "benchmarks/results")

_MARKER = re.compile(r"<!-- results:(\S+) (begin|end) -->")


class MarkerError(ValueError):
    """Markers that do not pair, or name nothing that is recorded."""


def updated(text: str, root: Path = ROOT) -> str:
    """``text`` with every marked block made anew from the results recorded under ``root``.

    Raises:
        MarkerError: there are no markers, they do not pair, or one names nothing that is recorded.
        ReportError: a file of that name is no comparison.
    """
    markers = list(_MARKER.finditer(text))
    if not markers:
        raise MarkerError("expected markers such as <!-- results:versions begin -->, found none")
    names = [marker[1] for marker in markers[::2]]
    for begin, end in zip(markers[::2], [*markers[1::2], None], strict=False):
        if begin[2] != "begin" or end is None or (end[1], end[2]) != (begin[1], "end"):
            at = text.count("\n", 0, begin.start()) + 1
            raise MarkerError(f"line {at}: {begin[0]} has no partner: begin and end must follow each other")
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise MarkerError(f"results:{sorted(twice)[0]} is marked twice")
    parts, done = [], 0
    for begin, end in zip(markers[::2], markers[1::2], strict=True):
        parts += [text[done : begin.end()], "\n", _block(begin[1], root)]
        done = end.start()
    return "".join(parts) + text[done:]


def _block(name: str, root: Path) -> str:
    if name == "versions":
        return _versions()
    if name == "recipes":
        return _recipes()
    if name == "summary":
        return _summary(root)
    if name == "passes":
        return _passes(root)
    if name == "cpu-passes":
        return _cpu_passes(root)
    if name == "attention":
        return _attention(root)
    if name == "quantized":
        return _with_remarks(*quantized(root))
    if name == "int4":
        return "\n".join(_with_remarks(*part) for part in speed(root))
    if name in readme_ranking.RECORDS and not (root / readme_ranking.RECORDS[name]).is_file():
        # Markers may stand before the first record of these long measurements.
        return ""
    if name == "mfalcon":
        return "\n".join(_with_remarks(*part) for part in readme_ranking.cached_scoring(root))
    written = {"cost": readme_ranking.cost, "streaming": readme_ranking.streaming, "balance": readme_ranking.balance}
    written["distributed"] = distributed
    if name in written:
        return written[name](root)
    found = json.loads(_path(name, root).read_text(encoding="utf-8"))
    if found.get("format") == ranking.COMPARISON_FORMAT:
        return ranking.comparison_markdown(found)
    return report.comparison_markdown(_recorded(name, root))


def _passes(root: Path) -> str:
    """Seconds of training and of evaluation for one pass over the data, from the runs that timed them alone."""
    rows, remarks = [], []
    for name in TIMED:
        recorded = _recorded(f"{name}-time", root)
        group = recorded["models"]["HSTU"]
        train, rank = group["seconds_per_pass"], group["seconds_per_evaluation"]
        rows.append([f"`{name}`", f"{train:.2f}", f"{rank:.2f}", f"**{train + rank:.2f}**"])
        remarks.append(f"`{name}`: {report.provenance(recorded)}")
    header = ["recipe", "training, s", "evaluation, s", "pass with evaluation, s"]
    return _with_remarks(header, rows, remarks)


def _cpu_passes(root: Path) -> str:
    """Seconds of one pass of each model over MovieLens-100K on a CPU, all in one run."""
    recorded = _recorded("ml-100k-time", root)
    # Counting the items is no training.
    timed = {label: g["seconds_per_pass"] for label, g in recorded["models"].items() if label != "Pop"}
    slowest = max(timed.values())
    rows = [[label, f"{seconds:.1f}", f"{slowest / seconds:.1f}"] for label, seconds in timed.items()]
    header = ["model", "training, s", "times faster than the slowest"]
    return _table(header, rows) + f"\n{report.provenance(recorded)}\n"


def _attention(root: Path) -> str:
    """TFLOP/s of useful work at the causal shapes, forward / backward.

    Beside other kernels in the last run that has some, and behind the table ours of all later ones.
    """
    rows = read(root / "benchmarks/results/attention.csv", ATTENTION_COLUMNS)
    rows = [row for row in rows if row["group"] == "causal" and row["mode"] == CALL]
    run = [row["taken_at"] for row in rows if row["contender"] != OURS][-1]
    compared = [row for row in rows if row["taken_at"] == run]
    later = [row for row in rows if row["contender"] == OURS and row["taken_at"] > run]
    contenders = list(dict.fromkeys(row["contender"] for row in compared))
    cases = list(dict.fromkeys(row["case"] for row in compared))
    body = [[case, *(_both_ways(compared, case, contender) for contender in contenders)] for case in cases]
    text = _table(["B x L x H x D", *contenders], body) + f"\n{_facts_of(compared)}\n"
    if later:
        found = ", ".join(f"{case} {_both_ways(later, case, OURS)}" for case in cases)
        text += f"\nOurs in later runs without the others ({_facts_of(later)[:-1]}): {found}.\n"
    return text


def _both_ways(rows: Sequence[dict[str, str]], case: str, contender: str) -> str:
    found = [row for row in rows if (row["case"], row["contender"]) == (case, contender)]
    ways = (
        [float(row["tflops_convention"]) for row in found if row["direction"] == way] for way in (FORWARD, BACKWARD)
    )
    return " / ".join(_span(speeds) if speeds else "-" for speeds in ways)


def _span(numbers: Sequence[float]) -> str:
    """The least and the largest, once where they look alike."""
    low, high = (f"{pick(numbers):.0f}" for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def _facts_of(rows: Sequence[dict[str, str]]) -> str:
    facts = sorted({f"{r['device']}, torch {r['torch']}, Triton {r['triton']}, commit {r['commit'][:7]}" for r in rows})
    product = _span([float(row["matmul_tflops"]) for row in rows])
    return f"{'; '.join(facts)}; a bf16 matrix product in the same runs: {product} TFLOP/s."


def _recorded(name: str, root: Path) -> report.Record:
    return report.read_json(_path(name, root), report.COMPARISON_FORMAT)


def _path(name: str, root: Path) -> Path:
    found = [path for folder in FOLDERS if (path := root / folder / f"{name}.json").is_file()]
    if not found:
        known = sorted(path.stem for folder in FOLDERS for path in (root / folder).glob("*.json"))
        names = ["versions", "recipes", "summary", "passes", "cpu-passes", "attention", "quantized", "int4", "mfalcon"]
        names += ["cost", "streaming", "balance", "distributed", *known]
        raise MarkerError(f"results:{name}: expected one of {', '.join(names)}")
    if len(found) > 1:
        raise MarkerError(f"results:{name}: recorded twice, as {' and '.join(map(str, found))}")
    return found[0]


def _summary(root: Path) -> str:
    """HSTU's recorded metrics beside the published ones, and a line on where and how each was recorded."""
    published = yaml.safe_load((root / "benchmarks/published.yaml").read_text(encoding="utf-8"))
    metrics = ("hit@10", "ndcg@10")
    rows, remarks = [], []
    for name, theirs in published.items():
        recorded = _recorded(name, root)
        group = recorded["models"]["HSTU"]
        cells = []
        for metric in metrics:
            mean, std = (group["test"][part][metric] for part in ("mean", "std"))
            # One seed has no spread.
            spread = "" if std is None else f" ± {std:.4f}"
            cells += [f"**{mean:.4f}**{spread}", f"{theirs[metric]:.4f}"]
        rows.append([theirs["title"], str(len(group["seeds"])), *cells, theirs["source"]])
        remarks.append(f"`{name}`: {group['epochs']:.0f} epochs; {report.provenance(recorded)}")
    header = ["data and recipe", "seeds"]
    for metric in metrics:
        header += [report.metric_name(metric), "published"]
    return _table([*header, "published by"], rows) + "\n" + "".join(f"- {remark}\n" for remark in remarks)


def _versions() -> str:
    rows = version_table()
    return _table(list(rows[0]), [list(row.values()) for row in rows])


def _recipes() -> str:
    rows = [[f"`{name}`", settings.describe_recipe(path)] for name, path in settings.recipes().items()]
    return _table(["recipe", "what it is"], rows)


def _with_remarks(header: Sequence[str], rows: Sequence[Sequence[str]], remarks: Sequence[str]) -> str:
    return _table(header, rows) + "\n" + "".join(f"- {remark}\n" for remark in remarks)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the file, or with ``--check`` only look; returns 1 for a file that is stale, exits with 2 on errors."""
    parser = argparse.ArgumentParser(prog="update_readme", description="Bring the tables of a README up to date.")
    parser.add_argument("file", nargs="?", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the file is stale")
    options = parser.parse_args(argv)
    try:
        old = options.file.read_text(encoding="utf-8")
        new = updated(old)
    except OSError as error:
        parser.error(f"{options.file}: {error.strerror}")
    except ValueError as error:
        parser.error(f"{options.file}: {error}")
    if new == old:
        return 0
    if options.check:
        print(f"{options.file} is stale; run `make readme`")
        return 1
    report.write_text(options.file, new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
