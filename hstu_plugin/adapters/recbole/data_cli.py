"""``hstu-data``: make and check RecBole's atomic files."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from hstu_plugin.adapters.recbole.atomic import Summary, TimeUnit


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="hstu-plugin", prog_name="hstu-data")
def main() -> None:
    """Make and check RecBole's atomic data files."""


@main.command("to-atomic")
@click.argument("source", type=click.Path(path_type=Path), metavar="INPUT.parquet|csv")
@click.option("--user", help="Column of the user.  [default: user_id, or another usual name]")
@click.option("--item", help="Column of the item.  [default: item_id, or another usual name]")
@click.option("--time", help="Column of the time.  [default: timestamp, or another usual name]")
@click.option("--rating", help="Column of the rating.  [default: rating, if there is one]")
@click.option("--no-rating", is_flag=True, help="Leave the rating out.")
@click.option("--name", help="Name of the data set.  [default: from the file's name]")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("dataset"), show_default=True, help="Parent directory."
)
@click.option("--time-unit", type=click.Choice(["s", "ms"]), default="s", show_default=True, help="Unit of the times.")
@click.option("--sep", "separator", help="Separator of text files.  [default: comma for .csv, else tab]")
@click.option("--drop-duplicates", is_flag=True, help="Drop rows that repeat user, item and time of an earlier row.")
@click.option("--force", is_flag=True, help="Replace an existing data set of that name.")
def to_atomic(source: Path, name: str | None, out: Path, drop_duplicates: bool, force: bool, **options: Any) -> None:
    """Turn a table with user, item and time columns into dataset/NAME/NAME.inter.

    Columns may carry RecBole's types (user_id:token) or not. Rows are written user by user in order of time; rows
    of the same time keep the order of the input. Text times must be numbers; Parquet may also hold date-times.
    """
    from hstu_plugin.adapters.recbole import atomic

    chosen = name or source.name.split(".")[0]
    if not chosen or any(mark in chosen for mark in "/\\\t\n") or chosen.startswith("."):
        raise click.UsageError(f"--name: expected the name of a directory, got {chosen!r}")
    target = out / chosen / f"{chosen}.inter"
    if target.exists() and not force:
        raise click.ClickException(f"{target} exists; replace it with --force")
    try:
        data = atomic.load(
            source,
            **{role: options[role] for role in ("user", "item", "time", "rating", "separator")},
            with_rating=not options["no_rating"],
            unit=options["time_unit"],
        )
        found = atomic.summarize(data)
        if drop_duplicates:
            data = atomic.without_repeats(data)
        data = atomic.chronological(data)
        written = atomic.write_inter(data, target)
    except atomic.DataError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{error.filename or target}: {error.strerror}") from None
    _show(atomic.summarize(data), chosen)
    if found.repeated_rows:
        done = "dropped" if drop_duplicates else "kept; --drop-duplicates leaves them out"
        click.echo(f"{found.repeated_rows:,} rows repeat user, item and time of an earlier row: {done}.")
    extra = " --timestamp_unit=ms" if written == "ms" else ""
    if extra:
        click.echo("Times are no whole seconds: they are written in milliseconds, and a training must be told so.")
    click.echo(f"Wrote {target}. Train on it: hstu-recbole --dataset={chosen} --data_path={out}{extra}")


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--time-unit", type=click.Choice(["s", "ms"]), default="s", show_default=True, help="Unit of the times.")
def check(directory: Path, time_unit: TimeUnit) -> None:
    """Check an atomic data set, such as dataset/ml-1m."""
    from hstu_plugin.adapters.recbole import atomic

    try:
        data, remarks = atomic.check_directory(directory, time_unit)
    except atomic.DataError as error:
        raise click.ClickException(str(error)) from None
    summary = atomic.summarize(data)
    _show(summary, directory.resolve().name)
    if not summary.chronological:
        remarks.append(
            "rows of a user are not in order of time; our models sort them, stock RecBole does so only to 64 s"
        )
    if summary.repeated_rows:
        remarks.append(f"{summary.repeated_rows:,} rows repeat user, item and time of an earlier row")
    for remark in remarks:
        click.echo(f"Note: {remark}.")
    click.echo("The data set can be used.")


def _show(summary: Summary, name: str) -> None:
    from rich.console import Console
    from rich.table import Table

    def day(seconds: float) -> str:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")

    table = Table(title=name, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_row("", "")
    table.add_row("users", f"{summary.users:,}")
    table.add_row("items", f"{summary.items:,}")
    table.add_row("interactions", f"{summary.interactions:,}")
    table.add_row("density", f"{summary.density:.4%}")
    table.add_row("from, to", f"{day(summary.first_second)}, {day(summary.last_second)}")
    table.add_row("adjacent pairs with one time", f"{summary.tied_pairs:.1%}")
    table.add_row("repeated (user, item) pairs", f"{summary.repeated_pairs:,}")
    for quantile, length in summary.lengths.items():
        table.add_row(f"interactions of a user, {quantile}", f"{length:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
