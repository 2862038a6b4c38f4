"""``python -m benchmarks.stages``: where the time of a kernel goes, by taking one stage out at a time.

    run         time the kernels with and without each stage, in turns; and a backward's host time part by part
    compile     call everything once and time nothing; --slice I/N: a part of the stages, for processes side by side
    report      a table and a chart from the recorded rows

A kernel without a stage computes wrong numbers on purpose. It is a copy: the shipped modules are never touched.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.attention.cases import choose
from benchmarks.ledger import RESULTS, LedgerError, append
from benchmarks.machine import provenance
from benchmarks.stages.host import WHOLE_PART, host_parts
from benchmarks.stages.measure import COLUMNS, PART, WrongCopy, call_once, run_study
from benchmarks.stages.patching import WHOLE
from benchmarks.stages.report import write_report
from benchmarks.stages.studies import BACKWARD, HOST_CASES, STUDIES, Study

LEDGER = RESULTS / "stages.csv"
_PATH = click.Path(path_type=Path, dir_okay=False)
_study = click.option("--study", "pattern", help="Only studies whose name (case and direction) contains this.")


@click.group(help=__doc__, context_settings={"max_content_width": 110})
def main() -> None:
    pass


@main.command()
@_study
@click.option("--host/--no-host", default=True, show_default=True, help="Also the host time of a backward.")
@click.option("--seconds", default=0.1, show_default=True, help="Aim for each stage.")
@click.option("--output", type=_PATH, default=LEDGER, show_default=True, help="CSV to append to.")
@click.option("--commit", help="To record. Default: that of this checkout.")
@click.option("--dry-run", is_flag=True, help="Record nothing.")
def run(pattern: str | None, host: bool, seconds: float, output: Path, commit: str | None, dry_run: bool) -> None:
    """Time the kernels with and without each stage."""
    device = _device()
    about = provenance(device, commit)

    def record(row: dict[str, Any]) -> None:
        share = f"{100 * row['share']:5.1f} %"
        click.echo(
            f"{row['case']:26} {row['direction']:8} {row['kind']:8} {row['p50_ms']:8.4f} ms {share} {row['stage']}"
        )
        if not dry_run:
            append(output, COLUMNS, [about | row])

    with tempfile.TemporaryDirectory() as folder:
        for study in _chosen(pattern):
            for row in _rows(study, device, Path(folder), seconds):
                record(row)
    for name in HOST_CASES if host else ():
        if pattern and pattern not in f"{name} host":
            continue
        whole = 0.0
        case = next(case for case in choose((), name) if case.name == name)
        for part, microseconds in host_parts(case, device, seconds=4 * seconds):
            whole = microseconds if part == WHOLE_PART else whole
            kind = WHOLE.name if part == WHOLE_PART else PART
            row = {"case": name, "direction": BACKWARD, "kernel": "host", "stage": part, "kind": kind}
            record(row | {"p50_ms": microseconds / 1e3, "share": microseconds / whole})


@main.command("compile")
@_study
@click.option("--slice", "part", default="0/1", show_default=True, help="I/N: every N-th stage from the I-th on.")
def compile_command(pattern: str | None, part: str) -> None:
    """Call everything once."""
    try:
        index, of = (int(number) for number in part.split("/"))
    except ValueError:
        raise click.ClickException(f"--slice: expected I/N such as 0/4, got {part}") from None
    device = _device()
    studies = _chosen(pattern)
    pairs = [(study, stage) for study in studies for stage in (WHOLE, *study.stages) if stage is WHOLE or stage.edits]
    pairs = pairs[index::of]
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for study in studies:
            stages = [stage for of_study, stage in pairs if of_study is study]
            if stages:
                wrong += call_once(study, stages, device, _place(Path(folder), study))
    click.echo(f"{len(pairs)} called")
    if wrong:
        raise click.ClickException("; ".join(wrong))


@main.command()
@click.option("--input", "source", type=_PATH, default=LEDGER, show_default=True)
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, show_default=True)
@click.option("--device", "device_name", help="Only rows whose device contains this; default: that of the last row.")
def report(source: Path, output: Path, device_name: str | None) -> None:
    """Write stages.md and its chart from the recorded rows."""
    try:
        for path in write_report(source, output, device_name):
            click.echo(path)
    except LedgerError as error:
        raise click.ClickException(str(error)) from None


def _rows(study: Study, device: torch.device, folder: Path, seconds: float) -> list[dict[str, object]]:
    try:
        return list(run_study(study, device, _place(folder, study), seconds=seconds, say=click.echo))
    except WrongCopy as error:
        raise click.ClickException(str(error)) from None


def _place(folder: Path, study: Study) -> Path:
    return folder / study.name.replace(" ", "-")


def _chosen(pattern: str | None) -> list[Study]:
    chosen = [study for study in STUDIES if pattern is None or pattern in study.name]
    if not chosen and not (pattern and any(pattern in f"{name} host" for name in HOST_CASES)):
        names = ", ".join(study.name for study in STUDIES)
        raise click.ClickException(f"--study: expected a part of one of {names}; got {pattern}")
    return chosen


def _device() -> torch.device:
    if not torch.cuda.is_available():
        raise click.ClickException("expected a CUDA device, found none: the kernels' stages are timed on a GPU alone")
    return torch.device("cuda", torch.cuda.current_device())


if __name__ == "__main__":
    main()
