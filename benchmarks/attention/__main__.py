"""``python -m benchmarks.attention``: check, time, record, report.

    run         our kernels, and those named by --against in the same run
    baselines   plain PyTorch compiled, softmax attention, public HSTU kernels that are installed
    check       correctness alone
    report      tables, charts, and what must be reached beside what was recorded

``run`` and ``baselines`` first check every chosen case against float64. What is wrong is not timed, and if it is ours
nothing is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.attention.batches import make_batch
from benchmarks.attention.cases import GROUPS, Case, choose, tiny
from benchmarks.attention.check import Red, check
from benchmarks.attention.contenders import BASELINES, Binder, ours, ours_cached
from benchmarks.attention.measure import BACKWARD, COLUMNS, FORWARD, describe, measure
from benchmarks.attention.report import write_report
from benchmarks.attention.unavailable import Unavailable
from benchmarks.ledger import RESULTS, LedgerError, append
from benchmarks.machine import measure_ceilings, provenance
from hstu_kernels import UnsupportedBackend

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LEDGER = RESULTS / "attention.csv"
LAYERS = RESULTS / "layer.csv"
_PATH = click.Path(path_type=Path, dir_okay=False)


def _choice_options(command: Callable[..., None]) -> Callable[..., None]:
    """What all commands that compute share: the cases and where they run."""
    options = [
        click.option("--group", "groups", multiple=True, type=click.Choice(GROUPS), help="Default: all. Repeatable."),
        click.option("--case", "pattern", help="Only cases whose name contains this."),
        click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True),
        click.option("--device", default=None, help="Default: cuda where there is one, else cpu."),
        click.option("--tiny", "small", is_flag=True, help="Cut every case down to a few rows, to try the command."),
    ]
    return _with(command, options)


def _time_options(command: Callable[..., None]) -> Callable[..., None]:
    """What ``run`` and ``baselines`` share: how long to measure, and what to record."""
    options = [
        click.option("--direction", type=click.Choice(["both", FORWARD, BACKWARD]), default="both", show_default=True),
        click.option("--seconds", default=0.3, show_default=True, help="Aim for each measurement."),
        click.option("--output", type=_PATH, default=LEDGER, show_default=True, help="CSV to append to."),
        click.option("--commit", help="To record. Default: that of this checkout."),
        click.option("--dry-run", is_flag=True, help="Record nothing."),
        click.option("--keep-going", is_flag=True, help="Time and record what is right although ours is wrong."),
    ]
    return _with(command, options)


def _with(command: Callable[..., None], options: list[Callable[..., Any]]) -> Callable[..., None]:
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


@click.group(help=__doc__, context_settings={"max_content_width": 110})
def main() -> None:
    pass


_backend = click.option("--backend", help="Repeatable by commas. Default: triton on cuda, else eager.")
_against = click.option(
    "--against", multiple=True, type=click.Choice(list(BASELINES)), help="In the same run. Repeatable."
)


@main.command()
@_backend
@_against
@_choice_options
@_time_options
def run(backend: str | None, against: tuple[str, ...], device: str | None, **options: Any) -> None:
    """Measure our kernels, and others beside them."""
    place = _device(device)
    _measure_all(_ours(backend, place), _named(against), place, **options)


@main.command()
@click.option("--contender", "names", multiple=True, type=click.Choice(list(BASELINES)), help="Default: all.")
@_choice_options
@_time_options
def baselines(names: tuple[str, ...], device: str | None, **options: Any) -> None:
    """Measure what our kernels are compared with."""
    _measure_all({}, _named(names or tuple(BASELINES)), _device(device), **options)


@main.command("check")
@_backend
@_against
@_choice_options
def check_command(
    backend: str | None,
    against: tuple[str, ...],
    device: str | None,
    groups: tuple[str, ...],
    pattern: str | None,
    dtype: str,
    small: bool,
) -> None:
    """Compare with float64 and time nothing. Compiles what a measurement needs, where kernels are cached."""
    place = _device(device)
    ours, others = _ours(backend, place), _named(against)
    wrong = _check_all(ours, others, _chosen(groups, pattern, small), place, DTYPES[dtype]).wrong
    if wrong:
        raise click.ClickException(f"{len(wrong)} wrong: {', '.join(dict.fromkeys(wrong))}")


@main.command()
@click.option("--input", "source", type=_PATH, default=LEDGER, show_default=True)
@click.option("--layers", type=_PATH, default=LAYERS, show_default=True, help="Rows of benchmarks.layer.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, show_default=True)
@click.option("--device", "device_name", help="Only rows whose device contains this; default: that of the last row.")
def report(source: Path, layers: Path, output: Path, device_name: str | None) -> None:
    """Write attention.md and its charts from the recorded rows; print what must be reached, missed floors first."""
    try:
        written, floors = write_report(source, layers, output, device_name)
    except (LedgerError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    for floor in sorted(floors, key=lambda floor: (False, None, True).index(floor.met)):
        click.echo(floor.line())
    met = [floor.met for floor in floors]
    click.echo(f"{met.count(True)} met, {met.count(False)} missed, {met.count(None)} not measured")
    for path in written:
        click.echo(path)


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _ours(backend: str | None, device: torch.device) -> dict[str, Binder]:
    names = (backend or ("triton" if device.type == "cuda" else "eager")).split(",")
    contenders: dict[str, Binder] = {}
    for name in names:
        contenders |= {name: ours(name), f"{name}-cached": ours_cached(name)}
    return contenders


def _named(names: tuple[str, ...]) -> dict[str, Binder]:
    return {name: BASELINES[name] for name in names}


def _chosen(groups: tuple[str, ...], pattern: str | None, small: bool) -> list[Case]:
    cases = choose(groups, pattern)
    if not cases:
        raise click.ClickException(f"no case matches --group {groups} --case {pattern}")
    return [tiny(case) for case in cases] if small else cases


def _measure_all(
    own: dict[str, Binder],
    others: dict[str, Binder],
    device: torch.device,
    *,
    groups: tuple[str, ...],
    pattern: str | None,
    direction: str,
    dtype: str,
    seconds: float,
    small: bool,
    output: Path,
    commit: str | None,
    dry_run: bool,
    keep_going: bool,
) -> None:
    cases = _chosen(groups, pattern, small)
    directions = (FORWARD, BACKWARD) if direction == "both" else (direction,)
    checked = _check_all(own, {}, cases, device, DTYPES[dtype])
    if checked.wrong and not keep_going:
        raise click.ClickException(f"{len(checked.wrong)} wrong, nothing is timed")
    if own and not checked.errors:
        raise click.ClickException("none of our kernels can run any of these cases here")
    ceilings = measure_ceilings(device, seconds=seconds)
    click.echo(f"ceilings: {ceilings.matmul_tflops:.4g} TFLOP/s bf16, {ceilings.copy_tbs:.4g} TB/s copied")
    about = provenance(device, commit) | {"matmul_tflops": ceilings.matmul_tflops, "copy_tbs": ceilings.copy_tbs}
    contenders = others | own
    rows: list[dict[str, object]] = []
    for case in cases:
        # Case by case: foreign code that loses the device takes only the cases behind it along.
        rivals = _check_all({}, others, [case], device, DTYPES[dtype])
        checked.errors.update(rivals.errors)
        checked.wrong.extend(rivals.wrong)
        names = [name for name in (*own, *others) if (case.name, name) in checked.errors]
        if not names:
            continue
        batch = make_batch(case, device, DTYPES[dtype])
        for name in names:
            bound = contenders[name](batch)
            for measured in measure(bound, batch, directions, seconds=seconds):
                error = checked.errors[case.name, name]
                row = about | describe(case, DTYPES[dtype]) | measured | {"relative_error": error}
                _show(row)
                if "note" not in row:
                    rows.append(row)
        # One case at a time in the file, so that a run that is cut off keeps what it has.
        if not dry_run:
            append(output, COLUMNS, rows)
            rows = []
    if checked.wrong:
        raise click.ClickException(f"{len(checked.wrong)} wrong: {', '.join(dict.fromkeys(checked.wrong))}")
    if not checked.errors:
        raise click.ClickException("no contender can run any of these cases here")


@dataclass(frozen=True, slots=True)
class _Checked:
    """Relative errors of what is right, by case and contender; contenders that were wrong, once for each case."""

    errors: dict[tuple[str, str], float]
    wrong: list[str]


def _check_all(
    own: dict[str, Binder], others: dict[str, Binder], cases: list[Case], device: torch.device, dtype: torch.dtype
) -> _Checked:
    checked = _Checked({}, [])
    for case in cases:
        batch = make_batch(case, device, dtype)
        for name, bind in {**others, **own}.items():
            try:
                error = check(bind(batch), batch)
            except Red as red:
                checked.wrong.append(name)
                click.echo(f"WRONG {red}", err=True)
            except (Unavailable, UnsupportedBackend, torch.OutOfMemoryError) as reason:
                if not getattr(reason, "by_design", False):
                    click.echo(f"  not measured: {name}, {case.name}: {str(reason).splitlines()[0]}")
            except Exception as reason:
                # Foreign code may refuse a case in its own way; ours must not.
                if name in own:
                    raise
                lines = str(reason).splitlines() or [""]
                click.echo(f"  not measured: {name}, {case.name}: {type(reason).__name__}: {lines[0]}")
                _insist_on_the_device(device, name, case)
            else:
                checked.errors[case.name, name] = error
                click.echo(f"  right: {name}, {case.name}: relative error {error:.2e}")
    return checked


def _insist_on_the_device(device: torch.device, name: str, case: Case) -> None:
    """After an illegal access every later call fails, with a message that names the wrong one."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise click.ClickException(
            f"{name} lost the device at {case.name}; what was recorded before it stays. "
            f"Measure this case and those behind it without --against {name}"
        ) from error


def _show(row: dict[str, object]) -> None:
    label = f"{row['case']:28} {row['contender']:18} {row['direction']:8} {row['mode']:9}"
    if "note" in row:
        click.echo(f"{label} {row['note']}")
        return
    host = f"  host {row['host_us']:6.1f} us" if "host_us" in row else ""
    if "p50_ms" not in row:
        click.echo(f"{label} {host.strip()}")
        return
    peak = f"  peak {row['peak_mib']:.0f} MiB" if row.get("peak_mib") is not None else ""
    speed = f"{row['tflops_convention']:7.4g} TFLOP/s"
    spread = f"[{row['p20_ms']:.4f}, {row['p80_ms']:.4f}]"
    click.echo(f"{label} {row['p50_ms']:9.4f} ms {spread} {speed}{host}{peak}")


if __name__ == "__main__":
    main()
