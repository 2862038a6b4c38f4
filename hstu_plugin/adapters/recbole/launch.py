"""One training from request to files: run it, record it, draw it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hstu_plugin.adapters.recbole import report, settings

if TYPE_CHECKING:
    from hstu_plugin.adapters.recbole.runner import RunResult

RECORD = "result.json"
CURVE = "learning_curve.png"
CHECKPOINTS = "checkpoints"
# As a checkpoint to resume from: the newest of the same settings in the output directory, if there is one.
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to train and where to leave it.

    Attributes:
        model: a name that RecBole finds.
        dataset: name of the data set.
        output_dir: directory of the run's files.
        recipes, config_files: YAML files, weakest first; recipes are ours, files the user's.
        chosen: settings over the files that a command of ours chose.
        argv: the user's ``--name=value`` words, over everything else.
        resume: checkpoint to go on from, or AUTO.
        label: the run's name in tables; default: the model's.
        named: which of ``model`` and ``dataset`` the user named as options.
        progress: show progress bars.
        verbose: let RecBole say all it has to say.
    """

    model: str
    dataset: str
    output_dir: Path
    recipes: tuple[Path, ...] = ()
    config_files: tuple[Path, ...] = ()
    chosen: Mapping[str, Any] = field(default_factory=dict)
    argv: tuple[str, ...] = ()
    resume: Path | str | None = None
    label: str | None = None
    named: frozenset[str] = frozenset()
    progress: bool = True
    verbose: bool = False

    @property
    def name(self) -> str:
        """The run's name in tables."""
        return self.label or self.model

    def layers(self) -> list[tuple[str, dict[str, Any]]]:
        """Who set what, the strongest first."""
        names = {"model": self.name, "dataset": self.dataset}
        yours: dict[str, Any] = {**settings.read_settings(self.config_files), **settings.parse_tokens(self.argv)}
        yours |= {key: name for key, name in names.items() if key in self.named}
        recipe = settings.read_settings(self.recipes)
        # What neither the user nor the recipe says was chosen by the command.
        rest = {key: name for key, name in names.items() if key not in yours and recipe.get(key) != name}
        return [
            ("you", yours),
            ("command", {**self.chosen, **rest}),
            ("recipe", recipe),
            ("plugin", settings.model_defaults(self.model)),
        ]

    def asked(self) -> dict[str, Any]:
        """All that differs from the defaults of the plugin and RecBole; equal requests ask for equal runs."""
        merged: dict[str, Any] = {}
        for origin, values in reversed(self.layers()):
            if origin != "plugin":
                merged.update(values)
        return {key: report.plain(value) for key, value in merged.items()}


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run that has ended: its record, where its files are, and what RecBole holds in memory."""

    record: report.Record
    output_dir: Path
    result: RunResult


def new_output_dir(dataset: str, model: str, root: Path = Path("runs"), now: datetime | None = None) -> Path:
    """A name that no run has taken: ``<root>/<dataset>-<model>-<time>``."""
    stem = f"{dataset}-{model}-{(now or datetime.now()).strftime('%Y%m%d-%H%M%S')}"
    candidates = (root / (stem if n == 1 else f"{stem}-{n}") for n in range(1, 10_000))
    return next(path for path in candidates if not path.exists())


def newest_checkpoint(dataset: str, model: str, root: Path = Path("runs")) -> Path | None:
    """The latest checkpoint of this model on this data set among unfinished runs."""
    found = [
        path
        for run in root.glob(f"{dataset}-{model}-*")
        if not (run / RECORD).exists()
        for path in (run / CHECKPOINTS).glob("*.pth")
    ]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def execute(request: Request) -> Finished:
    """Train, evaluate, and write the record and the learning curve.

    Raises:
        SettingsError: settings that cannot be read.
        whatever RecBole or the model raises on settings or data that cannot work.
    """
    from hstu_plugin.adapters.recbole import curves, runner

    # RecBole puts the dictionary over the files, and the user's file must win over what is only convenient here.
    named = {**settings.read_settings(request.config_files), **settings.parse_tokens(request.argv)}
    place = {} if "checkpoint_dir" in named else {"checkpoint_dir": str(request.output_dir / CHECKPOINTS)}
    request.output_dir.mkdir(parents=True, exist_ok=True)
    with _short_log(request.verbose):
        result = runner.run(
            request.model,
            request.dataset,
            [str(path) for path in (*request.recipes, *request.config_files)],
            {**place, **request.chosen},
            argv=request.argv,
            resume=request.resume,
            show_progress=request.progress,
        )
    files = {"curve": CURVE, "checkpoints": CHECKPOINTS}
    record = report.run_record(result, user_config=request.asked(), label=request.name, files=files)
    if record["history"]:
        curves.learning_curve([record], request.output_dir / CURVE)
    report.write_json(request.output_dir / RECORD, record)
    return Finished(record=record, output_dir=request.output_dir, result=result)


def execute_seeds(request: Request, seeds: Sequence[int]) -> list[report.Record]:
    """The same run with several seeds, each in ``seed-<n>``; writes the comparison and a common curve."""
    from hstu_plugin.adapters.recbole import curves

    records = []
    for seed in seeds:
        one = replace(request, chosen={**request.chosen, "seed": seed}, output_dir=request.output_dir / f"seed-{seed}")
        records.append(execute(one).record)
    report.write_json(request.output_dir / "comparison.json", report.compare_records(records))
    curves.learning_curve(records, request.output_dir / CURVE)
    return records


@contextmanager
def _short_log(verbose: bool) -> Iterator[None]:
    """On the console only warnings and a line for each epoch's training and validation; the log file has it all."""
    root = logging.getLogger()
    hook = _ConsoleHook()
    if not verbose:
        root.addFilter(hook)
    try:
        yield
    finally:
        root.removeFilter(hook)


class _ConsoleHook(logging.Filter):
    """RecBole makes its handlers in the middle of a run; this meets them at the first message."""

    def filter(self, record: logging.LogRecord) -> bool:
        for handler in logging.getLogger().handlers:
            if type(handler) is logging.StreamHandler and not any(isinstance(f, _EpochsOnly) for f in handler.filters):
                handler.addFilter(_EpochsOnly())
        return True


class _EpochsOnly(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        # RecBole colours the words, hence not startswith.
        return record.levelno >= logging.WARNING or bool(re.match(r"(\x1b\[[\d;]*m)*epoch \d", str(record.msg)))
