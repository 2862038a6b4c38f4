"""``python -m benchmarks.layer``: a training step of a stack of layers, checked, timed, recorded, reported.

A step is forward, backward and a fused AdamW step under bfloat16 autocast with float32 weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from benchmarks.layer.columns import COLUMNS
from benchmarks.layer.memory import Choice, backward, choices, step_of, stored_tensors
from benchmarks.layer.models import (
    CONTENDERS,
    Batch,
    Case,
    cases,
    exact,
    is_softmax,
    make_batch,
    plain,
    training_flops,
)
from benchmarks.layer.parts import COLUMNS as PART_COLUMNS
from benchmarks.layer.parts import measure_parts
from benchmarks.ledger import RESULTS, LedgerError, append, read
from benchmarks.machine import measure_ceilings, provenance
from hstu_kernels import UnsupportedBackend
from hstu_kernels.dispatch import choose_backend
from hstu_plugin.config import Variant

LEDGER, PARTS_LEDGER = RESULTS / "layer.csv", RESULTS / "layer-parts.csv"
_PATH = click.Path(path_type=Path, dir_okay=False)


class Wrong(Exception):
    """A contender's gradients are too far from float32."""


@click.group(help=__doc__, context_settings={"max_content_width": 110})
def main() -> None:
    pass


@main.command()
@click.option("--contender", "names", multiple=True, type=click.Choice(list(CONTENDERS)), help="Default: all.")
@click.option("--case", "chosen", multiple=True, type=click.Choice(["full", "jagged"]), help="Default: both.")
@click.option("--layers", default=8, show_default=True)
@click.option("--variant", type=click.Choice(list(Variant)), default=Variant.ULTRA, show_default=True)
@click.option("--device", default=None, help="Default: cuda where there is one, else cpu.")
@click.option("--seconds", default=1.0, show_default=True, help="Aim for each measurement.")
@click.option("--tiny", is_flag=True, help="A few rows, to try the command.")
@click.option("--output", type=_PATH, default=LEDGER, show_default=True, help="CSV to append to.")
@click.option("--commit", help="To record. Default: that of this checkout.")
@click.option("--dry-run", is_flag=True, help="Record nothing.")
def run(
    names: tuple[str, ...],
    chosen: tuple[str, ...],
    layers: int,
    variant: str,
    device: str | None,
    seconds: float,
    tiny: bool,
    output: Path,
    commit: str | None,
    dry_run: bool,
) -> None:
    """Time a training step. Gradients are checked first; one that is wrong ends the run."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ceilings = measure_ceilings(place, seconds=min(seconds, 0.3))
    about = provenance(place, commit) | {"matmul_tflops": ceilings.matmul_tflops, "copy_tbs": ceilings.copy_tbs}
    for case in cases(layers=layers, variant=variant, tiny=tiny):
        if chosen and case.name not in chosen:
            continue
        batch = make_batch(case, place)
        for name in names or CONTENDERS:
            torch.compiler.reset()
            try:
                error = _check(name, case, batch)
                row = about | _describe(case) | {"contender": name, "relative_error": error}
                row |= _measure(name, case, batch, seconds)
            except Wrong as wrong:
                raise click.ClickException(str(wrong)) from None
            except (UnsupportedBackend, torch.OutOfMemoryError) as reason:
                click.echo(f"{case.name:7} {name:20} not measured: {str(reason).splitlines()[0]}")
                continue
            except Exception as reason:
                # A release may not compile what is not ours; our own must not fail.
                if not is_softmax(name):
                    raise
                lines = str(reason).splitlines() or [""]
                click.echo(f"{case.name:7} {name:20} not measured: {type(reason).__name__}: {lines[0]}")
                continue
            click.echo(
                f"{case.name:7} {name:20} {row['p50_ms']:9.3f} ms [{row['p20_ms']:.3f}, {row['p80_ms']:.3f}] "
                f"{row['tflops']:.4g} TFLOP/s" + (f" peak {row['peak_mib']:.0f} MiB" if row["peak_mib"] else "")
            )
            if not dry_run:
                append(output, COLUMNS, [row])


@main.command()
@click.option("--case", "chosen", type=click.Choice(["full", "jagged"]), default="jagged", show_default=True)
@click.option("--layers", default=8, show_default=True)
@click.option("--variant", type=click.Choice(list(Variant)), default=Variant.ULTRA, show_default=True)
@click.option("--device", default=None, help="Default: cuda where there is one, else cpu.")
@click.option("--seconds", default=0.3, show_default=True, help="Aim for each measurement.")
@click.option("--tiny", is_flag=True, help="A few rows, to try the command.")
@click.option("--tensors/--no-tensors", default=True, show_default=True, help="List what one layer stores.")
def memory(
    chosen: str, layers: int, variant: str, device: str | None, seconds: float, tiny: bool, tensors: bool
) -> None:
    """Peak and time of a step for each choice of what is rebuilt, eager first; and each stored tensor of one layer."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    case = next(case for case in cases(layers=layers, variant=variant, tiny=tiny) if case.name == chosen)
    batch = make_batch(case, place)
    unit = batch.x.numel() * 2
    click.echo(f"u: one matrix {list(batch.x.shape)} in bfloat16, {unit / 2**20:.4g} MiB")
    for choice in (Choice("eager", ()), *choices("triton")):
        try:
            choose_backend(choice.backend, place, batch.x.dtype)
        except UnsupportedBackend as reason:
            click.echo(f"{choice.backend} not measured: {str(reason).splitlines()[0]}")
            break
        peak, spread = step_of(choice.model(case).to(place).train(), batch, seconds)
        peaks = "" if peak is None else f"peak {peak:8.1f} MiB {peak * 2**20 / unit:6.2f} u"
        click.echo(f"{choice.name:40} {spread.p50:9.3f} ms {peaks}")
        if tensors:
            single = replace(case, config=replace(case.config, num_layers=1))
            for kind in stored_tensors(choice.model(single).to(place).train(), batch):
                click.echo(f"    {kind.count} x {list(kind.shape)} {kind.dtype}: {kind.nbytes / unit:.3f} u")


@main.command()
@click.option(
    "--contender", "names", multiple=True, type=click.Choice(["triton", "eager"]), default=("triton", "eager")
)
@click.option("--case", "chosen", type=click.Choice(["full", "jagged"]), default="full", show_default=True)
@click.option("--layers", default=8, show_default=True)
@click.option("--variant", type=click.Choice(list(Variant)), default=Variant.ULTRA, show_default=True)
@click.option("--device", default=None, help="Default: cuda where there is one, else cpu.")
@click.option("--tiny", is_flag=True, help="A few rows, to try the command.")
@click.option("--output", type=_PATH, default=PARTS_LEDGER, show_default=True, help="CSV to append to.")
@click.option("--commit", help="To record. Default: that of this checkout.")
@click.option("--dry-run", is_flag=True, help="Record nothing.")
def parts(
    names: tuple[str, ...],
    chosen: str,
    layers: int,
    variant: str,
    device: str | None,
    tiny: bool,
    output: Path,
    commit: str | None,
    dry_run: bool,
) -> None:
    """Device time of a step by part, as the profiler finds it: attention, products, the rest, the optimiser."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    case = next(case for case in cases(layers=layers, variant=variant, tiny=tiny) if case.name == chosen)
    batch = make_batch(case, place)
    about = provenance(place, commit) | {"case": chosen, "variant": variant, "layers": layers}
    for name in names:
        try:
            found = measure_parts(CONTENDERS[name](case).to(place).train(), batch)
        except UnsupportedBackend as reason:
            click.echo(f"{name:7} not measured: {str(reason).splitlines()[0]}")
            continue
        whole = sum(found.values())
        for part, spent in found.items():
            click.echo(f"{chosen:7} {name:7} {spent:9.3f} ms {100 * spent / whole:5.1f} % {part}")
        if not dry_run:
            own = about | {"contender": name}
            rows = [own | {"part": part, "ms": ms, "share": ms / whole} for part, ms in found.items()]
            append(output, PART_COLUMNS, rows)


@main.command()
@click.option("--input", "source", type=_PATH, default=LEDGER, show_default=True)
@click.option("--output", type=_PATH, default=RESULTS / "layer.md", show_default=True)
def report(source: Path, output: Path) -> None:
    """Write a table of the newest rows of the device of the last row."""
    try:
        rows = read(source, COLUMNS)
    except LedgerError as error:
        raise click.ClickException(str(error)) from None
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(markdown(rows), encoding="utf-8")
    click.echo(output)


def markdown(rows: list[dict[str, str]]) -> str:
    """Step time and memory of the newest rows, and both relative to our eager backend."""
    device = rows[-1]["device"]
    newest = {(r["case"], r["variant"], r["layers"], r["contender"]): r for r in rows if r["device"] == device}
    last = rows[-1]
    text = (
        f"# Layers: a recorded training step\n\n{device}; torch {last['torch']}; Triton {last['triton']}; commit "
        f"{last['commit'][:9]}; in the same run a bf16 product of {float(last['matmul_tflops']):.3g} TFLOP/s. Forward, "
        "backward and fused AdamW under bfloat16 autocast. `sdpa-compiled` and `sdpa-varlen-compiled` are the same "
        "layers around flash attention, which is softmax: the jagged batch padded, and by sequence offsets.\n\n"
    )
    header = ["case", "variant", "layers", "contender", "step, ms", "TFLOP/s", "peak MiB", "faster", "memory"]
    lines = [header, ["---"] * len(header)]
    for (case, variant, layers, contender), row in newest.items():
        base = newest.get((case, variant, layers, "eager"))
        ratios = ["", ""]
        if base is not None:
            ratios[0] = f"{float(base['p50_ms']) / float(row['p50_ms']):.2f}"
            ratios[1] = f"{float(row['peak_mib']) / float(base['peak_mib']):.2f}" if row["peak_mib"] else ""
        time = f"{float(row['p50_ms']):.4g} [{float(row['p20_ms']):.4g}, {float(row['p80_ms']):.4g}]"
        lines.append([case, variant, layers, contender, time, row["tflops"], row["peak_mib"], *ratios])
    return text + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _describe(case: Case) -> dict[str, object]:
    config = case.config
    return {
        "case": case.name,
        "variant": config.variant.value,
        "layers": config.num_layers,
        "width": config.embedding_dim,
        "heads": config.num_heads,
        "head_dim": config.attention_dim,
        "batch": len(case.lengths),
        "total_rows": sum(case.lengths),
    }


def _measure(name: str, case: Case, batch: Batch, seconds: float) -> dict[str, object]:
    peak, spread = step_of(CONTENDERS[name](case).to(batch.x.device).train(), batch, seconds)
    gflop = training_flops(case) / 1e9
    times = {"p20_ms": spread.p20, "p50_ms": spread.p50, "p80_ms": spread.p80, "samples": spread.samples}
    return times | {"gflop": gflop, "tflops": gflop / spread.p50, "peak_mib": peak}


def _check(name: str, case: Case, batch: Batch) -> float:
    """Relative error of the gradients against float32, which may be twice that of plain PyTorch under autocast."""
    if name.startswith("triton"):
        # Here, since a compiler would wrap the refusal in one of its own.
        choose_backend("triton", batch.x.device, batch.x.dtype)

    def gradients(make: Callable[[Case], nn.Module], *, autocast: bool) -> Tensor:
        torch.manual_seed(0)
        model = make(case).to(batch.x.device).eval()
        backward(model, batch, autocast=autocast)
        found = [p.grad for p in model.parameters() if p.grad is not None]
        return torch.cat([grad.detach().double().flatten() for grad in found])

    truth = gradients(functools.partial(exact, name), autocast=False)

    def error(make: Callable[[Case], nn.Module]) -> float:
        return float((gradients(make, autocast=True) - truth).norm() / truth.norm())

    found, allowed = error(CONTENDERS[name]), 2 * error(functools.partial(plain, name)) + 1e-3
    # Written so that NaN fails.
    if not found <= allowed:
        raise Wrong(f"{name}, {case.name}: gradients are off by {found:.3g} of their norm, allowed {allowed:.3g}")
    return found


if __name__ == "__main__":
    main()
