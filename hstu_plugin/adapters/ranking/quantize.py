"""A trained ranker with quantised tables: made from a run's best weights, kept beside them, tested again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hstu_kernels.int4 import RowFormat
from hstu_plugin.adapters.quantized import DIGEST, digest, quantization_record
from hstu_plugin.adapters.ranking.dataset import load, without_actions
from hstu_plugin.adapters.ranking.models import make_model
from hstu_plugin.adapters.ranking.report import SHOWN
from hstu_plugin.adapters.ranking.schema import read_schema
from hstu_plugin.adapters.ranking.settings import RankSettings, find_recipe, from_plain, read_recipe
from hstu_plugin.adapters.ranking.trainer import BEST, Metrics, RankTrainer, pick_device, read_checkpoint
from hstu_plugin.quantize import QuantizeConfig, count_accesses, quantize
from hstu_plugin.quantize_report import QuantizationReport
from hstu_plugin.quantized_files import TableFileError, apply_tables, load_tables, quantized_tables, save_tables


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedRun:
    """What `quantize_run` did.

    Attributes:
        folder: of the run.
        tables_file: where the quantised tables lie.
        trainer: its model has the quantised tables.
        report: bytes, errors and metrics, these by ``task.metric``.
        split: on which the metrics were computed.
    """

    folder: Path
    tables_file: Path
    trainer: RankTrainer
    report: QuantizationReport
    split: str | None

    def record(self, commit: str | None = None) -> dict[str, Any]:
        """The report in JSON types, with where it comes from; ``commit`` in place of the checkout's."""
        return quantization_record(
            self.report,
            commit=commit,
            model=str(self.trainer.settings.model),
            dataset=self.trainer.data.name,
            seed=self.trainer.seed,
            checkpoint=str(self.folder / BEST),
            tables_file=str(self.tables_file),
            split=self.split,
        )


def quantize_run(
    recipe: str,
    data: Path,
    folder: Path,
    dtype: RowFormat | str = RowFormat.INT4,
    *,
    output: Path | None = None,
    config: QuantizeConfig | None = None,
    split: str | None = "test",
    calibrate: bool = False,
    device: str = "auto",
) -> QuantizedRun:
    """Quantise the embedding tables of a finished run's best weights, and write them.

    Args:
        recipe, data: as of the training. folder: of the run.
        dtype: format of the rows.
        output: file to write; default ``best-<dtype>.safetensors`` in the run's folder.
        config: which tables and ranges.
        split: ``valid`` or ``test``: metrics on it before and after; ``None`` for none.
        calibrate: count on the validation split how often each row is looked up.
        device: auto, cpu or cuda.

    Raises:
        CheckpointError: the run has no checkpoint, or belongs to other data.
        ValueError: tables that cannot be quantised, or a model without any.
    """
    row_format = RowFormat.parse(dtype)
    trainer = restored(recipe, data, folder, device=device)
    counts = None
    if calibrate:
        with count_accesses(trainer.model) as counts:
            trainer.evaluate("valid")

    def metrics(_: nn.Module) -> dict[str, float]:
        assert split is not None
        return quality(trainer.evaluate(split))

    done = quantize(
        trainer.model, row_format, config=config, frequencies=counts, evaluate=None if split is None else metrics
    )
    target = output or folder / f"{Path(BEST).stem}-{row_format}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    notes = {
        "checkpoint": BEST,
        DIGEST: digest(folder / BEST),
        "model": str(trainer.settings.model),
        "dataset": trainer.data.name,
    }
    save_tables(target, quantized_tables(done.module), notes=notes)
    return QuantizedRun(folder=folder, tables_file=target, trainer=trainer, report=done.report, split=split)


def restored(
    recipe: str, data: Path, folder: Path, *, device: str = "auto", tables_file: Path | None = None
) -> RankTrainer:
    """A finished run's model with its best weights, and with quantised tables where their file is given.

    Raises:
        CheckpointError: the run has no checkpoint, or belongs to other data.
        TableFileError: the tables cannot be used, or were made from other weights.
    """
    path = folder / BEST
    state = read_checkpoint(path)
    settings: RankSettings = from_plain({**state["settings"]})
    loaded = load(read_schema(read_recipe(find_recipe(recipe)).schema), data)
    loaded = without_actions(loaded, settings.without_actions)
    trainer = RankTrainer(
        make_model(settings, loaded), loaded, settings, seed=int(state["seed"]), device=pick_device(device)
    )
    trainer.restore(state, path)
    if tables_file is not None:
        file = load_tables(tables_file)
        if file.notes.get(DIGEST) != digest(path):
            raise TableFileError(
                f"tables {str(tables_file)!r}: expected tables made from {str(path)!r}, but they were made from other "
                "weights; run hstu-rank quantize again"
            )
        apply_tables(trainer.model, file.tables)
    return trainer


def quality(metrics: Metrics) -> dict[str, float]:
    """What says how good a model is, by ``task.metric``; metrics that a split does not determine are left out."""
    return {
        f"{task}.{name}": value
        for task, own in metrics.items()
        for name in SHOWN
        if (value := own.get(name)) is not None
    }


def metric_name(name: str) -> str:
    """``click.ne`` as people read it."""
    task, _, metric = name.rpartition(".")
    return f"{task} {SHOWN[metric]}"
