"""A trained RecBole model with quantised tables: made from a checkpoint, kept beside it, loaded again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hstu_kernels.int4 import RowFormat
from hstu_plugin.adapters.quantized import DIGEST, digest, quantization_record
from hstu_plugin.adapters.recbole import runner
from hstu_plugin.adapters.recbole.saved import find_checkpoint
from hstu_plugin.quantize import QuantizeConfig, count_accesses, quantize
from hstu_plugin.quantize_report import QuantizationReport
from hstu_plugin.quantized_files import TableFileError, apply_tables, load_tables, quantized_tables, save_tables

if TYPE_CHECKING:
    from hstu_plugin.adapters.recbole.runner import LoadedRun


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedRun:
    """What `quantize_run` did.

    Attributes:
        checkpoint: the file of the model.
        tables_file: where the quantised tables lie.
        loaded: the run, its model with the quantised tables.
        report: bytes, errors and metrics.
        split: on which the metrics were computed, ``None`` when they were not.
    """

    checkpoint: Path
    tables_file: Path
    loaded: LoadedRun
    report: QuantizationReport
    split: str | None

    def record(self, commit: str | None = None) -> dict[str, Any]:
        """The report in JSON types, with where it comes from; ``commit`` in place of the checkout's."""
        config = self.loaded.config
        return quantization_record(
            self.report,
            commit=commit,
            model=config["model"],
            dataset=config["dataset"],
            seed=config["seed"],
            checkpoint=str(self.checkpoint),
            tables_file=str(self.tables_file),
            split=self.split,
        )


def quantize_run(
    path: Path,
    dtype: RowFormat | str = RowFormat.INT4,
    *,
    output: Path | None = None,
    config: QuantizeConfig | None = None,
    split: str | None = None,
    calibrate: bool = False,
) -> QuantizedRun:
    """Quantise the tables of a trained model, ours or a stock one, and write them.

    Args:
        path: checkpoint, or directory of a run.
        dtype: format of the rows.
        output: file to write; default beside the checkpoint, ``<name>-<dtype>.safetensors``.
        config: which tables and ranges.
        split: ``test`` or ``valid``: rank its held-out items before and after.
        calibrate: count how often each row is looked up, on the validation split, or on the training data where
            nothing is held out for validation.

    Raises:
        FileNotFoundError, CheckpointError: there is no checkpoint, or it cannot be used.
        ValueError: tables that cannot be quantised, or a split that holds nothing out.
    """
    row_format, checkpoint = RowFormat.parse(dtype), find_checkpoint(path)
    loaded = runner.load(checkpoint)
    counts = None
    if calibrate:
        with count_accesses(loaded.model) as counts:
            _run_batches(loaded)
    evaluate = None if split is None else lambda _: _metrics(loaded, split, "split")
    done = quantize(loaded.model, row_format, config=config, frequencies=counts, evaluate=evaluate)
    target = output or checkpoint.with_name(f"{checkpoint.stem}-{row_format}.safetensors")
    target.parent.mkdir(parents=True, exist_ok=True)
    notes = {
        "checkpoint": checkpoint.name,
        DIGEST: digest(checkpoint),
        "model": str(loaded.config["model"]),
        "dataset": str(loaded.config["dataset"]),
    }
    save_tables(target, quantized_tables(done.module), notes=notes)
    return QuantizedRun(checkpoint=checkpoint, tables_file=target, loaded=loaded, report=done.report, split=split)


def load_quantized(model_file: str | os.PathLike[str], tables_file: str | os.PathLike[str]) -> LoadedRun:
    """A trained model with its quantised tables, read again from the two files.

    Args:
        model_file: checkpoint, or directory of a run.
        tables_file: written by `quantize_run` from this very checkpoint.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        TableFileError: the tables cannot be used, or were made from another checkpoint.
    """
    checkpoint = find_checkpoint(Path(model_file))
    file = load_tables(tables_file)
    if file.notes.get(DIGEST) != digest(checkpoint):
        raise TableFileError(
            f"tables {os.fspath(tables_file)!r}: expected tables made from {str(checkpoint)!r}, but they were made "
            f"from another state of {file.notes.get('checkpoint', 'an unknown checkpoint')!r}; run hstu-quantize again"
        )
    loaded = runner.load(checkpoint)
    apply_tables(loaded.model, file.tables)
    return loaded


def _run_batches(loaded: LoadedRun) -> None:
    if loaded.evaluate("valid"):
        return
    with torch.no_grad():
        for interaction in loaded.train_data:
            loaded.model.calculate_loss(interaction.to(loaded.config["device"]))


def _metrics(loaded: LoadedRun, split: str, name: str) -> dict[str, float]:
    metrics = loaded.evaluate(split)
    if not metrics:
        raise ValueError(f"{name}: this model was trained with a split that holds nothing out for {split!r}")
    return metrics
