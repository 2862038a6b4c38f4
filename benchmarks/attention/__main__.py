"""``python -m benchmarks.attention``: check, time, record, report.

    run         our kernels
    baselines   plain PyTorch compiled, softmax attention, public HSTU kernels that are installed
    report      tables and charts from the recorded rows

``run`` and ``baselines`` first check every chosen case against float64 and record nothing if one is wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
_PATH = click.Path(path_type=Path, dir_okay=False)


def _choice_options(command: Callable[..., None]) -> Callable[..., None]:
    """What ``run`` and ``baselines`` share."""
    options = [
        click.option("--group", "groups", multiple=True, type=click.Choice(GROUPS), help="Default: all. Repeatable."),
        click.option("--case", "pattern", help="Only cases whose name contains this."),
        click.option("--direction", type=click.Choice(["both", FORWARD, BACKWARD]), default="both", show_default=True),
        click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True),
        click.option("--device", default=None, help="Default: cuda where there is one, else cpu."),
        click.option("--seconds", default=0.3, show_default=True, help="Aim for each measurement."),
        click.option("--tiny", "small", is_flag=True, help="Cut every case down to a few rows, to try the command."),
        click.option("--output", type=_PATH, default=LEDGER, show_default=True, help="CSV to append to."),
        click.option("--commit", help="To record. Default: that of this checkout."),
        click.option("--dry-run", is_flag=True, help="Record nothing."),
        click.option("--keep-going", is_flag=True, help="Time and record what is right although something is wrong."),
    ]
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


@click.group(help=__doc__, context_settings={"max_content_width": 110})
def main() -> None:
    pass


@main.command()
@click.option("--backend", default=None, help="Repeatable by commas. Default: triton on cuda, else eager.")
@_choice_options
def run(backend: str | None, device: str | None, **options: Any) -> None:
    """Measure our kernels."""
    place = _device(device)
    names = (backend or ("triton" if place.type == "cuda" else "eager")).split(",")
    contenders: dict[str, Binder] = {}
    for name in names:
        contenders |= {name: ours(name), f"{name}-cached": ours_cached(name)}
    _measure_all(contenders, place, **options)


@main.command()
@click.option("--contender", "names", multiple=True, type=click.Choice(list(BASELINES)), help="Default: all.")
@_choice_options
def baselines(names: tuple[str, ...], device: str | None, **options: Any) -> None:
    """Measure what our kernels are compared with."""
    chosen = {name: bind for name, bind in BASELINES.items() if not names or name in names}
    _measure_all(chosen, _device(device), **options)


@main.command()
@click.option("--input", "source", type=_PATH, default=LEDGER, show_default=True)
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, show_default=True)
@click.option("--device", "device_name", help="Only rows whose device contains this; default: that of the last row.")
def report(source: Path, output: Path, device_name: str | None) -> None:
    """Write attention.md and its charts from the recorded rows."""
    try:
        written = write_report(source, output, device_name)
    except LedgerError as error:
        raise click.ClickException(str(error)) from None
    for path in written:
        click.echo(path)


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _measure_all(
    contenders: dict[str, Binder],
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
    cases = choose(groups, pattern)
    if not cases:
        raise click.ClickException(f"no case matches --group {groups} --case {pattern}")
    cases = [tiny(case) for case in cases] if small else cases
    directions = (FORWARD, BACKWARD) if direction == "both" else (direction,)
    errors, wrong = _check_all(contenders, cases, device, DTYPES[dtype])
    if wrong and not keep_going:
        raise click.ClickException(f"{len(wrong)} wrong, nothing is timed")
    if not errors:
        raise click.ClickException("no contender can run any of these cases here")
    ceilings = measure_ceilings(device, seconds=seconds)
    click.echo(f"ceilings: {ceilings.matmul_tflops:.4g} TFLOP/s bf16, {ceilings.copy_tbs:.4g} TB/s copied")
    about = provenance(device, commit) | {"matmul_tflops": ceilings.matmul_tflops, "copy_tbs": ceilings.copy_tbs}
    rows: list[dict[str, object]] = []
    for case in cases:
        names = [name for name in contenders if (case.name, name) in errors]
        if not names:
            continue
        batch = make_batch(case, device, DTYPES[dtype])
        for name in names:
            bound = contenders[name](batch)
            for measured in measure(bound, batch, directions, seconds=seconds):
                row = about | describe(case, DTYPES[dtype]) | measured | {"relative_error": errors[case.name, name]}
                _show(row)
                if "note" not in row:
                    rows.append(row)
        # One case at a time in the file, so that a run that is cut off keeps what it has.
        if not dry_run:
            append(output, COLUMNS, rows)
            rows = []
    if wrong:
        raise click.ClickException(f"{len(wrong)} wrong")


def _check_all(
    contenders: dict[str, Binder], cases: list[Case], device: torch.device, dtype: torch.dtype
) -> tuple[dict[tuple[str, str], float], list[str]]:
    """Relative errors of what is right, by case and contender; the complaints about what is wrong."""
    errors: dict[tuple[str, str], float] = {}
    wrong: list[str] = []
    for case in cases:
        batch = make_batch(case, device, dtype)
        for name, bind in contenders.items():
            try:
                error = check(bind(batch), batch)
            except Red as red:
                wrong.append(str(red))
                click.echo(f"WRONG {red}", err=True)
            except (Unavailable, UnsupportedBackend, torch.OutOfMemoryError) as reason:
                if not getattr(reason, "by_design", False):
                    click.echo(f"  not measured: {name}, {case.name}: {str(reason).splitlines()[0]}")
            except Exception as reason:
                # Foreign code may refuse a case in its own way; ours must not.
                if name not in BASELINES or name == "eager":
                    raise
                lines = str(reason).splitlines() or [""]
                click.echo(f"  not measured: {name}, {case.name}: {type(reason).__name__}: {lines[0]}")
            else:
                errors[case.name, name] = error
                click.echo(f"  right: {name}, {case.name}: relative error {error:.2e}")
    return errors, wrong


def _show(row: dict[str, object]) -> None:
    label = f"{row['case']:28} {row['contender']:18} {row['direction']:8} {row['mode']:9}"
    if "note" in row:
        click.echo(f"{label} {row['note']}")
        return
    host = f"  host {row['host_us']:6.1f} us" if "host_us" in row else ""
    peak = f"  peak {row['peak_mib']:.0f} MiB" if row.get("peak_mib") is not None else ""
    speed = f"{row['tflops_convention']:7.4g} TFLOP/s"
    spread = f"[{row['p20_ms']:.4f}, {row['p80_ms']:.4f}]"
    click.echo(f"{label} {row['p50_ms']:9.4f} ms {spread} {speed}{host}{peak}")


if __name__ == "__main__":
    main()
