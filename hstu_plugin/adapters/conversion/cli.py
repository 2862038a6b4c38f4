"""``hstu-torchrec-data``: data sets and configurations of the trainer, from the files that the other doors read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from hstu_plugin.adapters.conversion.files import Dataset

_PATH = click.Path(path_type=Path)
_out = click.option("--out", type=_PATH, required=True, help="Folder to write; it must not exist.")
_set = click.option("--set", "words", multiple=True, metavar="NAME=VALUE", help="Replace a setting of the recipe.")
_epochs = click.option("--epochs", type=click.IntRange(min=1), help="Passes over the data.  [default: the recipe's]")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="hstu-plugin", prog_name="hstu-torchrec-data")
def main() -> None:
    """Write the trainer's data set and configuration: the same rows, ids and recipe as in the other doors.

    Then: torchx run -s local_cwd hstu.train --config OUT/config.yaml
    """


@main.command()
@click.argument("source", type=_PATH, metavar="INPUT.parquet|csv|inter")
@click.option("--recipe", default="ml-1m", show_default=True, help="RecBole recipe of the package, or a YAML file.")
@click.option("--user", help="Column of the user.  [default: user_id, or another usual name]")
@click.option("--item", help="Column of the item.  [default: item_id, or another usual name]")
@click.option("--time", help="Column of the time.  [default: timestamp, or another usual name]")
@click.option("--time-unit", "unit", type=click.Choice(["s", "ms"]), default="s", show_default=True)
@click.option("--sep", "separator", help="Separator of text files.  [default: comma for .csv, else tab]")
@_epochs
@_set
@_out
def retrieval(source: Path, recipe: str, epochs: int | None, words: tuple[str, ...], out: Path, **columns: Any) -> None:
    """Leave-one-out rows of a log of interactions, for next-item retrieval.

    Rows, order and test items are those of hstu-recbole under the same recipe.
    """
    with _readable_errors():
        from hstu_plugin.adapters.conversion.retrieval import convert_retrieval, read_recipe
        from hstu_plugin.adapters.ranking.settings import merge, parse_overrides

        values = merge(read_recipe(recipe), parse_overrides(words))
        if epochs is not None:
            values["epochs"] = epochs
        written = convert_retrieval(source, values, out, columns=columns)
    _tell(written)


@main.command()
@click.argument("recipe")
@click.option("--data", "directory", type=_PATH, required=True, help="Folder of the files that the schema names.")
@click.option("--model", default="ultra-hstu", show_default=True, help="hstu or ultra-hstu.")
@_epochs
@_set
@_out
def ranking(recipe: str, directory: Path, model: str, epochs: int | None, words: tuple[str, ...], out: Path) -> None:
    """Windows of a ranking data set, by a recipe of hstu-rank (kuairand, ml-1m-ratings, or a file).

    Splits, labels, vocabularies and windows are those of hstu-rank under the same recipe, which stops early; this
    trainer runs all epochs.
    """
    with _readable_errors():
        from hstu_plugin.adapters.conversion.ranking import convert_ranking
        from hstu_plugin.adapters.ranking.settings import find_recipe, parse_overrides, read_recipe

        found = read_recipe(find_recipe(recipe))
        overrides: Mapping[str, Any] = {**parse_overrides(words), **({} if epochs is None else {"epochs": epochs})}
        written = convert_ranking(found, found.settings(model, overrides), directory, out)
    _tell(written)


def _tell(written: Dataset) -> None:
    rows = ", ".join(f"{count:,} {part}" for part, count in written.rows.items())
    click.echo(f"{rows} rows. Train: torchx run -s local_cwd hstu.train --config {written.config}")


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Errors about input as one line."""
    try:
        yield
    except (ValueError, FileNotFoundError, FileExistsError, ImportError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
