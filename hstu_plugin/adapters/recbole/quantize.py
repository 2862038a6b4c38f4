"""A trained RecBole model with quantised tables: made from a checkpoint, kept beside it, loaded again."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hstu_kernels.int4 import RowFormat
from hstu_plugin import records
from hstu_plugin._versions import runtime_versions, source_commit
from hstu_plugin.adapters.recbole import runner
from hstu_plugin.adapters.recbole.report import metric_name
from hstu_plugin.adapters.recbole.saved import find_checkpoint
from hstu_plugin.quantize import QuantizeConfig, count_accesses, quantize
from hstu_plugin.quantize_report import QuantizationReport
from hstu_plugin.quantized_files import TableFileError, apply_tables, load_tables, quantized_tables, save_tables

if TYPE_CHECKING:
    from hstu_plugin.adapters.recbole.runner import LoadedRun

RECORD_FORMAT = "hstu-plugin/quantization"
FORMAT_VERSION = 1
_DIGEST = "checkpoint_sha256"


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

    def record(self) -> dict[str, Any]:
        """The report in JSON types, with where it comes from."""
        config = self.loaded.config
        return {
            "format": RECORD_FORMAT,
            "format_version": FORMAT_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": config["model"],
            "dataset": config["dataset"],
            "seed": config["seed"],
            "checkpoint": str(self.checkpoint),
            "tables_file": str(self.tables_file),
            "split": self.split,
            "report": self.report.as_dict(),
            "versions": runtime_versions(),
            "commit": source_commit(),
            "machine": records.machine(),
        }


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
        calibrate: count on the validation split how often each row is looked up.

    Raises:
        FileNotFoundError, CheckpointError: there is no checkpoint, or it cannot be used.
        ValueError: tables that cannot be quantised, or a split that holds nothing out.
    """
    row_format, checkpoint = RowFormat.parse(dtype), find_checkpoint(path)
    loaded = runner.load(checkpoint)
    counts = None
    if calibrate:
        with count_accesses(loaded.model) as counts:
            _metrics(loaded, "valid", "calibrate")
    evaluate = None if split is None else lambda _: _metrics(loaded, split, "split")
    done = quantize(loaded.model, row_format, config=config, frequencies=counts, evaluate=evaluate)
    target = output or checkpoint.with_name(f"{checkpoint.stem}-{row_format}.safetensors")
    target.parent.mkdir(parents=True, exist_ok=True)
    notes = {
        "checkpoint": checkpoint.name,
        _DIGEST: _digest(checkpoint),
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
    if file.notes.get(_DIGEST) != _digest(checkpoint):
        raise TableFileError(
            f"tables {os.fspath(tables_file)!r}: expected tables made from {str(checkpoint)!r}, but they were made "
            f"from another state of {file.notes.get('checkpoint', 'an unknown checkpoint')!r}; run hstu-quantize again"
        )
    loaded = runner.load(checkpoint)
    apply_tables(loaded.model, file.tables)
    return loaded


def report_tables(report: QuantizationReport) -> list[Table]:
    """The report for people: tables, the rows that lost most, and metrics when there are any."""
    style: dict[str, Any] = {"title_justify": "left", "box": SIMPLE_HEAD, "pad_edge": False, "min_width": 50}
    sizes = Table(title="Embedding tables", **style)
    sizes.add_column("table")
    for column in ("rows", "width", "before", "after", "smaller", "SQNR dB", "by use", "max error", "worst rows"):
        sizes.add_column(column, justify="right")
    for table in report.tables:
        sizes.add_row(
            table.name,
            f"{table.rows:,}",
            str(table.dim),
            _size(table.bytes_before),
            f"{_size(table.bytes_after)} {table.format}",
            f"{table.ratio:.2f}x",
            f"{table.sqnr_db:.1f}",
            "" if table.weighted_sqnr_db is None else f"{table.weighted_sqnr_db:.1f}",
            f"{table.max_error:.3g}",
            ", ".join(f"{worst.row} ({worst.sqnr_db:.1f} dB)" for worst in table.worst_rows[:3]),
        )
    shown = [sizes]
    if report.metrics_before:
        metrics = Table(title="Metrics", **style)
        metrics.add_column("metric")
        for column in ("full precision", "quantised", "change"):
            metrics.add_column(column, justify="right")
        for name, change in report.metric_changes().items():
            before, after = report.metrics_before[name], report.metrics_after[name]
            metrics.add_row(metric_name(name), f"{before:.4f}", f"{after:.4f}", f"{change:+.2%}")
        shown.append(metrics)
    return shown


def _metrics(loaded: LoadedRun, split: str, name: str) -> dict[str, float]:
    metrics = loaded.evaluate(split)
    if not metrics:
        raise ValueError(f"{name}: this model was trained with a split that holds nothing out for {split!r}")
    return metrics


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(count: int) -> str:
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:,.0f} {units[0]}" if units[0] == "B" else f"{value:,.1f} {units[0]}"
