"""``hstu-rank``: train, test and compare rankers on tables with labels.

Only the standard library and click are imported until a command runs, so that help is instant.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hstu_plugin.adapters.input_errors import raised_by_us

if TYPE_CHECKING:
    from rich.console import Console

_PATH = click.Path(path_type=Path)
_WIDE = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_recipe = click.argument("recipe")
_data = click.option("--data", required=True, type=_PATH, help="Directory with the files that the schema names.")
_device = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")


@click.group(context_settings=_WIDE)
@click.version_option(package_name="hstu-plugin", prog_name="hstu-rank")
def main() -> None:
    """HSTU, ULTRA-HSTU and baselines as multi-task rankers.

    \b
      hstu-rank recipes                                             what comes with the package
      hstu-rank train kuairand --data DIR                           the recipe's model
      hstu-rank train kuairand --data DIR --model hstu,dlrm --seeds 1,2,3
      hstu-rank train my.yaml --data DIR --set learning_rate=0.002 --set hstu.mask.max_attn_len=64
    """
    # Read when torch is loaded, later: sleeping threads do not starve the other programs of a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _numbers(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"expected whole numbers such as 1,2,3, got {text!r}") from None
    if len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise click.BadParameter(f"expected different numbers >= 0, got {text!r}")
    return numbers


@main.command(short_help="Train and test models; finished runs are not repeated, unfinished ones go on.")
@_recipe
@_data
@click.option("--model", "models", help="Model, or several with commas.  [default: the recipe's]")
@click.option("--seeds", default="1", show_default=True, callback=_numbers, help="Each model once for each.")
@click.option("--set", "words", multiple=True, metavar="NAME=VALUE", help="A setting over the recipe's; repeatable.")
@click.option("--label", help="Name of the runs in tables and folders.  [default: the model's]")
@click.option("--output-dir", type=_PATH, help="Where to write.  [default: runs/rank-RECIPE]")
@_device
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on from the last finished epoch.")
@click.option("--force", is_flag=True, help="Repeat runs that were made with other settings.")
@click.option("--commit", help="Commit to record.  [default: what git says]")
@click.option(
    "--progress/--no-progress",
    default=lambda: sys.stderr.isatty(),
    show_default="on a terminal",
    help="Show progress bars.",
)
def train(
    recipe: str,
    data: Path,
    models: str | None,
    seeds: tuple[int, ...],
    words: Sequence[str],
    label: str | None,
    output_dir: Path | None,
    progress: bool,
    **options: Any,
) -> None:
    """Train and test under a RECIPE: a name of `hstu-rank recipes`, or a YAML file."""
    names = models.split(",") if models else [None]
    if label and len(names) > 1:
        raise click.UsageError("--label: goes with one model only")
    console = _console()
    with _readable_errors():
        from hstu_plugin.adapters.ranking import launch, report, settings

        request = launch.Request(
            recipe=recipe,
            data=data,
            output_dir=output_dir or Path("runs") / f"rank-{Path(recipe).stem}",
            models=names,
            seeds=seeds,
            overrides=settings.parse_overrides(words),
            label=label,
            show_progress=progress,
            **options,
        )
        records = launch.execute(request, lambda line: console.print(line, highlight=False, soft_wrap=True))
        console.print(report.comparison_tables(report.compare(records)))
    console.print(f"Files: {request.output_dir}/", highlight=False, soft_wrap=True)


@main.command(short_help="Test a trained run again.")
@_recipe
@_data
@click.argument("run", type=_PATH)
@click.option("--split", type=click.Choice(["train", "valid", "test"]), default="test", show_default=True)
@click.option("--output", type=_PATH, help="Also write the metrics to this JSON file.")
@click.option("--tables", type=_PATH, help="Quantised tables of this run to use, from hstu-rank quantize.")
@_device
def evaluate(
    recipe: str, data: Path, run: Path, split: str, output: Path | None, tables: Path | None, device: str
) -> None:
    """Metrics of a finished RUN (its folder), as JSON."""
    with _readable_errors():
        from hstu_plugin.adapters.ranking import launch
        from hstu_plugin.records import plain, write_json

        metrics = plain(launch.evaluate(recipe, data, run, split=split, device=device, tables_file=tables))
        if output:
            write_json(output, metrics)
    click.echo(json.dumps(metrics, indent=1))


@main.command(short_help="Quantise the embedding tables of a trained run, with metrics before and after.")
@_recipe
@_data
@click.argument("run", type=_PATH)
@click.option("--dtype", type=click.Choice(["int4", "int8", "fp8"]), default="int4", show_default=True)
@click.option(
    "--ranges",
    type=click.Choice(["min_max", "search"]),
    default="min_max",
    show_default=True,
    help="Range of a row: FBGEMM's bytes, or the one of least error (search: recommended for int4).",
)
@click.option(
    "--split", type=click.Choice(["valid", "test"]), default="test", show_default=True, help="Of the metrics."
)
@click.option("--calibrate", is_flag=True, help="Count on the validation split which rows are used, and weight by it.")
@click.option("--skip", multiple=True, metavar="PATTERN", help="Tables to leave alone; repeatable.")
@click.option("--max-loss", type=click.FloatRange(0), help="Fail when a metric gets worse by more than this share.")
@click.option("--output", type=_PATH, help="File to write.  [default: best-DTYPE.safetensors in RUN]")
@click.option("--report", "report_file", type=_PATH, help="Also write the report to this JSON file.")
@click.option("--commit", help="To record in --report.  [default: that of the checkout]")
@_device
def quantize(
    recipe: str,
    data: Path,
    run: Path,
    dtype: str,
    ranges: str,
    split: str,
    calibrate: bool,
    skip: tuple[str, ...],
    max_loss: float | None,
    output: Path | None,
    report_file: Path | None,
    commit: str | None,
    device: str,
) -> None:
    """Quantise the tables of a finished RUN (its folder); the run itself stays as it is.

    \b
      hstu-rank quantize kuairand --data DIR runs/rank-kuairand/hstu-seed1 --max-loss 0.005
    """
    with _readable_errors():
        from hstu_kernels.int4 import RowRange
        from hstu_plugin.adapters import quantized
        from hstu_plugin.adapters.ranking import quantize as job
        from hstu_plugin.quantize import QuantizeConfig
        from hstu_plugin.records import write_json

        config = QuantizeConfig(ranges=RowRange(ranges), skip=skip or QuantizeConfig.skip)
        done = job.quantize_run(
            recipe, data, run, dtype, output=output, config=config, split=split, calibrate=calibrate, device=device
        )
        console = _console()
        for table in quantized.report_tables(done.report, job.metric_name):
            console.print(table)
        for written in (done.tables_file, report_file):
            if written is not None:
                console.print(f"Wrote {written}", highlight=False, soft_wrap=True)
        if report_file:
            write_json(report_file, done.record(commit))
        if max_loss is not None:
            quantized.refuse_losses(done.report, max_loss)


@main.command(short_help="List the recipes that come with the package.")
def recipes() -> None:
    """List the recipes that come with the package, with their files."""
    from hstu_plugin.adapters.ranking import settings

    for name, path in settings.recipes().items():
        click.echo(f"{name:20} {path}")


@main.command("report", short_help="Show finished runs side by side.")
@click.argument("files", type=_PATH, nargs=-1, required=True, metavar="RUN...")
@click.option("--markdown", is_flag=True, help="Print a table for a README.")
@click.option("--record", type=_PATH, help="Write the comparison to this JSON file.")
@click.option("--curve", type=_PATH, help="Draw the learning curves into this PNG.")
def report_command(files: Sequence[Path], markdown: bool, record: Path | None, curve: Path | None) -> None:
    """Show finished runs (folders, or their result.json) side by side, or a recorded comparison."""
    with _readable_errors():
        from hstu_plugin.adapters.ranking import report
        from hstu_plugin.records import write_json

        read = [report.read_record(path, (report.RUN_FORMAT, report.COMPARISON_FORMAT)) for path in files]
        runs = [one for one in read if one["format"] == report.RUN_FORMAT]
        comparisons = [one for one in read if one["format"] == report.COMPARISON_FORMAT]
        for name, given in (("record", record), ("curve", curve)):
            if given and not runs:
                raise click.UsageError(f"--{name}: none of the files is a run")
        if runs:
            comparisons.append(report.compare(runs))
        if record:
            write_json(record, comparisons[-1])
        if curve:
            report.learning_curve(runs, curve)
        for comparison in comparisons:
            if markdown:
                click.echo(report.comparison_markdown(comparison))
            else:
                _console().print(report.comparison_tables(comparison))


def _console() -> Console:
    from rich.console import Console

    return Console()


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Errors about input as one line; errors in the code keep their traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if not raised_by_us(error):
            raise
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
