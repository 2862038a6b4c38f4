"""``hstu-recbole``: train as RecBole's run_recbole.py does, and what one wants before and after a training.

Only the standard library and click are imported until a command runs, so that help is instant.
"""

from __future__ import annotations

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

    from hstu_plugin.adapters.recbole.launch import Request

_PATH = click.Path(path_type=Path)
# RecBole's own options pass through untouched.
_OPEN = {"ignore_unknown_options": True}
_WIDE = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

_progress = click.option(
    "--progress/--no-progress",
    default=lambda: sys.stderr.isatty(),
    show_default="on a terminal",
    help="Show progress bars.",
)


class _TrainByDefault(click.Group):
    """``hstu-recbole --model=HSTU`` means ``hstu-recbole train --model=HSTU``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = (*self.commands, *self.get_help_option_names(ctx), "--version")
        if args and args[0] not in own and args[0].startswith("-"):
            args = ["train", *args]
        return super().parse_args(ctx, args)


class _Numbers(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.4
    """``1,2,3``, without repeats."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"expected whole numbers such as 1,2,3, got {value!r}", param, ctx)
        if len(set(numbers)) < len(numbers) or min(numbers) < 0:
            self.fail(f"expected different numbers >= 0, got {value!r}", param, ctx)
        return numbers


@click.group(cls=_TrainByDefault, context_settings=_WIDE)
@click.version_option(package_name="hstu-plugin", prog_name="hstu-recbole")
def main() -> None:
    """HSTU and every other RecBole model, from the command line.

    \b
      hstu-recbole demo                                       the whole of it in minutes, on MovieLens-100K
      hstu-recbole --model=HSTU --dataset=ml-100k             as RecBole's run_recbole.py
      hstu-recbole --recipe ml-1m --learning_rate=0.002       a recipe, and a setting over it

    Options without a command mean the command `train`; `hstu-recbole train --help` lists them.
    """
    # Read when torch is loaded, later. By default OpenMP's threads spin while they wait for each other; on two cores
    # one other busy program then makes a training fifteen times as slow; sleeping threads lose their fair share only.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@main.command(short_help="Train and evaluate a model; the command when none is given.", context_settings=_OPEN)
@click.option("--model", help="Model: HSTU, or any of RecBole's.  [default: HSTU]")
@click.option("--dataset", help="Data set: dataset/NAME/NAME.inter.  [default: the recipe's or file's, else ml-100k]")
@click.option("--config_files", "--config-files", default="", metavar='"A.yaml B.yaml"', help="YAML files of settings.")
@click.option("--recipe", help="Settings that come with the package; `hstu-recbole recipes` lists them.")
@click.option("--seeds", type=_Numbers(), help="Train once for each and report mean and spread.")
@click.option(
    "--output-dir", "--output_dir", type=_PATH, help="Where to write.  [default: runs/<dataset>-<model>-<time>]"
)
@click.option("--resume", metavar="auto|PATH", help="Go on from a checkpoint; auto: the newest of an unfinished run.")
@_progress
@click.option("--verbose", is_flag=True, help="Show all settings and messages of RecBole.")
@click.option("--nproc", default=1, hidden=True)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[--NAME=VALUE]...")
def train(words: Sequence[str], seeds: tuple[int, ...] | None, nproc: int, **options: Any) -> None:
    """Train and evaluate; any setting of RecBole or of the model is an option, such as --learning_rate=0.01.

    Order of strength: command line, config files, recipe, the plugin's defaults for the model, RecBole's.
    """
    if nproc > 1:
        raise click.UsageError(
            "--nproc: this command trains in one process: RecBole's metrics are wrong when several share the users. "
            "To keep several GPUs busy, start one command for each, with --gpu_id=0, --gpu_id=1, ...; to train one "
            "model on several, make data with hstu-torchrec-data and start torchx run hstu.train (docs/torchrec.md)"
        )
    console = _console()
    with _readable_errors():
        from hstu_plugin.adapters.recbole import launch, report

        request = _request(console, words, **options)
        if seeds and ("seed" in _names(words) or request.resume):
            raise click.UsageError("--seeds: goes neither with --seed nor with --resume")
        console.print(report.config_table(request.layers()))
        if seeds:
            records = launch.execute_seeds(request, seeds)
            console.print(report.comparison_table(report.compare_records(records)))
        else:
            console.print(report.metrics_table(launch.execute(request).record))
    console.print(f"Files: {request.output_dir}/", highlight=False, soft_wrap=True)


@main.command(short_help="Train, compare and recommend on MovieLens-100K.")
@click.option("--epochs", type=click.IntRange(1), help="At most this many.  [default: the recipe's]")
@click.option("--user", default="1", show_default=True, help="Whose recommendations to show.")
@click.option("--topk", type=click.IntRange(1), default=10, show_default=True, help="How many.")
@click.option("--output-dir", type=_PATH, help="Where to write.  [default: runs/ml-100k-HSTU-<time>]")
@_progress
@click.option("--verbose", is_flag=True, help="Show all messages of RecBole.")
def demo(**options: Any) -> None:
    """Train HSTU on MovieLens-100K, compare it, and recommend films."""
    with _readable_errors():
        from hstu_plugin.adapters.recbole import demo as job

        job.demo(_console(), **options)


@main.command(short_help="Train several models under one protocol.", context_settings=_OPEN)
@click.option("--dataset", help="Data set.  [default: the recipe's]")
@click.option(
    "--recipe", help="Its protocol holds for all models, its model settings for HSTU.  [default: the data set's]"
)
@click.option(
    "--models",
    default="HSTU,SASRec,Pop",
    show_default=True,
    help="Models, each NAME or LABEL=NAME; Pop ranks by number of interactions.",
)
@click.option("--seeds", type=_Numbers(), default="1,2,3", show_default=True, help="Each model once for each.")
@click.option(
    "--set", "overrides", multiple=True, metavar="LABEL.NAME=VALUE", help="A setting of one model; repeatable."
)
@click.option("--time-epochs", type=click.IntRange(1), help="Only measure the time of this many passes over the data.")
@click.option("--deltas/--no-deltas", default=True, help="Difference of the first two models, seed by seed.")
@click.option("--output-dir", type=_PATH, help="Where to write and to go on.  [default: runs/compare-<dataset>]")
@click.option("--record", type=_PATH, help="Also write the comparison to this file.")
@click.option("--timing", type=_PATH, help="Take the seconds of a pass from this comparison made with --time-epochs.")
@click.option("--note", help="A sentence on how the runs were made, kept in the comparison.")
@click.option("--force", is_flag=True, help="Repeat runs that were finished with other settings.")
@_progress
@click.option("--verbose", is_flag=True, help="Show all messages of RecBole.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[--NAME=VALUE]...")
def compare(**options: Any) -> None:
    """Train several models under one protocol; finished runs are not repeated.

    Settings given as --NAME=VALUE hold for all models.
    """
    with _readable_errors():
        from hstu_plugin.adapters.recbole import compare as job

        job.compare(_console(), **options)


@main.command(short_help="Rank the held-out items with a saved model.")
@click.argument("checkpoint", type=_PATH)
@click.option(
    "--split", type=click.Choice(["test", "valid"]), default="test", show_default=True, help="Which held-out items."
)
@click.option("--output", type=_PATH, help="Also write the metrics to this JSON file.")
def evaluate(checkpoint: Path, split: str, output: Path | None) -> None:
    """Rank again with a saved model (a checkpoint, or the directory of its run)."""
    with _readable_errors():
        from hstu_plugin.adapters.recbole import saved

        saved.evaluate(_console(), checkpoint, split=split, output=output)


@main.command(short_help="Recommend with a saved model.")
@click.argument("checkpoint", type=_PATH)
@click.option("--user", required=True, multiple=True, help="User as in the data; repeatable.")
@click.option("--topk", type=click.IntRange(1), default=10, show_default=True, help="How many items.")
@click.option("--include-seen", is_flag=True, help="Recommend items that the user has had as well.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def recommend(checkpoint: Path, user: Sequence[str], topk: int, include_seen: bool, as_json: bool) -> None:
    """Recommend with a saved model, as of each user's held-out last interaction."""
    with _readable_errors():
        from hstu_plugin.adapters.recbole import saved

        saved.recommend(_console(), checkpoint, users=user, topk=topk, include_seen=include_seen, as_json=as_json)


@main.command(short_help="List the settings that come with the package.")
def recipes() -> None:
    """List the settings that come with the package."""
    from rich.table import Table

    from hstu_plugin.adapters.recbole import settings

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, path in settings.recipes().items():
        table.add_row(name, settings.describe_recipe(path))
    console = _console()
    console.print(table)
    console.print("Train with one: hstu-recbole --recipe NAME", highlight=False, soft_wrap=True)


@main.command(short_help="Show recorded runs side by side.")
@click.argument("files", type=_PATH, nargs=-1, required=True, metavar="FILE...")
@click.option("--markdown", is_flag=True, help="Print a table for a README.")
@click.option("--curve", type=_PATH, help="Draw the learning curves of all runs into this PNG.")
@click.option("--record", type=_PATH, help="Write the comparison of all runs to this JSON file.")
@click.option("--others", type=_PATH, help="Take the models that the runs lack from this recorded comparison.")
@click.option("--note", help="A sentence on how the runs were made, kept in the recorded comparison.")
def report(
    files: Sequence[Path],
    markdown: bool,
    curve: Path | None,
    record: Path | None,
    others: Path | None,
    note: str | None,
) -> None:
    """Show recorded runs (result.json) side by side, or a recorded comparison."""
    with _readable_errors():
        from hstu_plugin.adapters.recbole import curves
        from hstu_plugin.adapters.recbole import report as reports

        read = [reports.read_json(path / "result.json" if path.is_dir() else path) for path in files]
        runs = [record for record in read if record["format"] == reports.RUN_FORMAT]
        comparisons = [record for record in read if record["format"] == reports.COMPARISON_FORMAT]
        if curve and not runs:
            raise click.UsageError("--curve: none of the files is a run; comparisons hold no epochs")
        console = _console()
        for name, given in (("record", record), ("others", others)):
            if given and not runs:
                raise click.UsageError(f"--{name}: none of the files is a run")
        if runs:
            compared = reports.compare_records(runs)
            if others:
                reports.take_others(compared, reports.read_json(others, reports.COMPARISON_FORMAT))
            if note:
                compared["note"] = note
            if record:
                reports.write_json(record, compared)
        if len(runs) == 1 and not markdown and not others:
            console.print(reports.metrics_table(runs[0]))
        elif runs:
            comparisons.append(compared)
        for comparison in comparisons:
            if markdown:
                click.echo(reports.comparison_markdown(comparison))
            else:
                console.print(reports.comparison_table(comparison))
        if curve:
            console.print(f"Wrote {curves.learning_curve(runs, curve)}", highlight=False, soft_wrap=True)


def _request(
    console: Console,
    words: Sequence[str],
    *,
    model: str | None,
    dataset: str | None,
    config_files: str,
    recipe: str | None,
    output_dir: Path | None,
    resume: str | None,
    progress: bool,
    verbose: bool,
) -> Request:
    from hstu_plugin.adapters.recbole import launch, settings

    settings.parse_tokens(words)
    recipe_files = (settings.recipe_path(recipe),) if recipe else ()
    user_files = tuple(Path(name) for name in config_files.split())
    in_files = settings.read_settings([*recipe_files, *user_files])
    chosen_model = model or str(in_files.get("model", "HSTU"))
    chosen_dataset = dataset or str(in_files.get("dataset", "ml-100k"))
    checkpoint = None
    if resume == "auto":
        root = output_dir.parent if output_dir else Path("runs")
        checkpoint = launch.newest_checkpoint(chosen_dataset, chosen_model, root)
        if checkpoint is None:
            console.print(
                f"--resume auto: no unfinished run of {chosen_model} on {chosen_dataset} in {root}/; starting anew"
            )
        else:
            console.print(f"Resuming from {checkpoint}", highlight=False, soft_wrap=True)
            output_dir = output_dir or checkpoint.parent.parent
    elif resume:
        checkpoint = Path(resume)
        if not checkpoint.is_file():
            raise click.UsageError(f"--resume: no such file: {checkpoint}")
    return launch.Request(
        model=chosen_model,
        dataset=chosen_dataset,
        output_dir=output_dir or launch.new_output_dir(chosen_dataset, chosen_model),
        recipes=recipe_files,
        config_files=user_files,
        argv=tuple(words),
        named=frozenset(key for key, given in (("model", model), ("dataset", dataset)) if given),
        resume=checkpoint,
        progress=progress,
        verbose=verbose,
    )


def _names(words: Sequence[str]) -> set[str]:
    return {word.removeprefix("--").partition("=")[0] for word in words}


def _console() -> Console:
    from rich.console import Console

    return Console()


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Errors about input as one line; errors in the code keep their traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        if not raised_by_us(error):
            raise
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
