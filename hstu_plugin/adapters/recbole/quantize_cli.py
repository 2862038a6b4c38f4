"""``hstu-quantize``: the embedding tables of a trained model in 4 or 8 bits.

Only the standard library and click are imported until the command runs, so that help is instant.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="hstu-plugin", prog_name="hstu-quantize")
@click.argument("run", type=_PATH)
@click.option(
    "--dtype", type=click.Choice(["int4", "int8", "fp8"]), default="int4", show_default=True, help="Format of the rows."
)
@click.option(
    "--ranges",
    type=click.Choice(["min_max", "search"]),
    default="min_max",
    show_default=True,
    help="Range of a row: FBGEMM's bytes, or the one of least error (search: recommended for int4).",
)
@click.option("--output", type=_PATH, help="File to write.  [default: CHECKPOINT-DTYPE.safetensors beside it]")
@click.option("--evaluate", is_flag=True, help="Rank the held-out items before and after.")
@click.option(
    "--split", type=click.Choice(["test", "valid"]), default="test", show_default=True, help="Which held-out items."
)
@click.option("--calibrate", is_flag=True, help="Count which rows are used, and weight by it.")
@click.option(
    "--coverage",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="With --calibrate and --ranges search: share of the accesses whose rows are searched.",
)
@click.option(
    "--table", "tables", multiple=True, metavar="PATTERN", help="Tables to quantise; repeatable.  [default: *]"
)
@click.option(
    "--skip", multiple=True, metavar="PATTERN", help="Tables to leave alone; repeatable.  [default: *position*]"
)
@click.option(
    "--max-loss",
    type=click.FloatRange(0),
    help="With --evaluate: fail when a metric gets worse by more than this share, such as 0.005.",
)
@click.option("--report", "report_file", type=_PATH, help="Also write the report to this JSON file.")
@click.option("--commit", help="To record in --report.  [default: that of the checkout]")
def main(
    run: Path,
    dtype: str,
    ranges: str,
    output: Path | None,
    evaluate: bool,
    split: str,
    calibrate: bool,
    coverage: float,
    tables: tuple[str, ...],
    skip: tuple[str, ...],
    max_loss: float | None,
    report_file: Path | None,
    commit: str | None,
) -> None:
    """Quantise the embedding tables of RUN, a checkpoint or the directory of a run of hstu-recbole.

    Writes the quantised tables as safetensors and shows what they cost. The checkpoint stays as it is.

    \b
      hstu-quantize runs/ml-1m-HSTU-20240101-120000 --evaluate
      hstu-quantize RUN --ranges search --evaluate --max-loss 0.005 --report quantized.json
    """
    # As hstu-recbole does: threads that wait should sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if max_loss is not None and not evaluate:
        raise click.UsageError("--max-loss: goes with --evaluate")
    if coverage < 1 and not (calibrate and ranges == "search"):
        raise click.UsageError("--coverage: goes with --calibrate and --ranges search")
    from rich.console import Console

    from hstu_kernels.int4 import RowRange
    from hstu_plugin.quantize import QuantizeConfig

    console = Console()
    try:
        from hstu_plugin.adapters import quantized
        from hstu_plugin.adapters.recbole import quantize as job
        from hstu_plugin.adapters.recbole import report as records

        config = QuantizeConfig(
            tables=tables or QuantizeConfig.tables,
            skip=skip or QuantizeConfig.skip,
            ranges=RowRange(ranges),
            search_coverage=coverage,
        )
        done = job.quantize_run(
            run, dtype, output=output, config=config, split=split if evaluate else None, calibrate=calibrate
        )
    except (ValueError, OSError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    for table in quantized.report_tables(done.report, records.metric_name):
        console.print(table)
    for name, reason in done.report.kept.items():
        console.print(f"Kept as it is: {name} ({reason})", highlight=False)
    console.print(f"Wrote {done.tables_file}", highlight=False, soft_wrap=True)
    if report_file:
        records.write_json(report_file, done.record(commit))
        console.print(f"Wrote {report_file}", highlight=False, soft_wrap=True)
    if max_loss is not None:
        try:
            quantized.refuse_losses(done.report, max_loss)
        except ValueError as error:
            raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
