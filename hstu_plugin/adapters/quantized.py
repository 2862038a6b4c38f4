"""What the doors share about quantised models: the report for people and for files, and how much a metric may lose."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hstu_plugin import records
from hstu_plugin._versions import runtime_versions, source_commit
from hstu_plugin.quantize_report import QuantizationReport

RECORD_FORMAT = "hstu-plugin/quantization"
FORMAT_VERSION = 1
DIGEST = "checkpoint_sha256"
_SHOWN_ROWS = 3
# The last part of a metric's name; of all others more is better.
_LESS_IS_BETTER = ("ne", "log_loss", "rmse", "mae", "averagerank")


def quantization_record(report: QuantizationReport, *, commit: str | None = None, **facts: Any) -> dict[str, Any]:
    """The report in JSON types, with where it comes from.

    Args:
        report: of `hstu_plugin.quantize.quantize`.
        commit: to record; default: that of the checkout.
        facts: about model and data, in JSON types.
    """
    return {
        "format": RECORD_FORMAT,
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        "report": report.as_dict(),
        "versions": runtime_versions(),
        "commit": commit or source_commit(),
        "machine": records.machine(),
    }


def losses(report: QuantizationReport) -> dict[str, float]:
    """By metric, by which share it got worse; negative where it got better, without those that were 0."""
    changes = {name: change for name, change in report.metric_changes().items() if not math.isnan(change)}
    return {name: change if less_is_better(name) else -change for name, change in changes.items()}


def less_is_better(metric: str) -> bool:
    """Whether a metric, such as ``ne`` or ``click.ne``, measures an error."""
    return metric.rpartition(".")[2].partition("@")[0] in _LESS_IS_BETTER


def refuse_losses(report: QuantizationReport, most: float) -> None:
    """Refuse a model that lost too much.

    Raises:
        ValueError: names the metric that lost most.
    """
    worse = losses(report)
    worst = max(worse, key=lambda name: worse[name], default=None)
    if worst is not None and worse[worst] > most:
        verb = "rose" if less_is_better(worst) else "fell"
        raise ValueError(
            f"--max-loss: expected no metric to get worse by more than {most:.2%}, but {worst} {verb} by "
            f"{worse[worst]:.2%}; try --ranges search or --dtype int8"
        )


def report_tables(report: QuantizationReport, metric_name: Callable[[str], str]) -> list[Table]:
    """The report for people: tables, rows that lost most, and metrics, when there are any, by ``metric_name``.

    They fit into 80 columns, the width of logs, unless names are very long.
    """
    style: dict[str, Any] = {"title_justify": "left", "box": SIMPLE_HEAD, "pad_edge": False, "min_width": 50}
    by_use = any(table.weighted_sqnr_db is not None for table in report.tables)
    sizes = Table(title="Embedding tables", **style)
    sizes.add_column("table", overflow="fold")
    for column in ("rows x width", "before", "after", "smaller", "SQNR dB", *(["by use"] if by_use else [])):
        sizes.add_column(column, justify="right", no_wrap=True)
    lost = Table(title="Rows that lost most", **style)
    lost.add_column("table", overflow="fold")
    for column in ("row", "SQNR dB", "max error"):
        lost.add_column(column, justify="right", no_wrap=True)
    for table in report.tables:
        cells = [f"{table.rows:,} x {table.dim}", _size(table.bytes_before), _size(table.bytes_after)]
        cells += [f"{table.ratio:.2f}x", f"{table.sqnr_db:.1f}"]
        if by_use:
            cells.append("" if table.weighted_sqnr_db is None else f"{table.weighted_sqnr_db:.1f}")
        sizes.add_row(table.name, *cells)
        for worst in table.worst_rows[:_SHOWN_ROWS]:
            lost.add_row(table.name, str(worst.row), f"{worst.sqnr_db:.1f}", f"{worst.max_error:.3g}")
    shown = [sizes, *([lost] if lost.row_count else [])]
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


def digest(path: Path) -> str:
    """SHA-256 of a file, by which quantised tables know their checkpoint."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(count: int) -> str:
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:,.0f} {units[0]}" if units[0] == "B" else f"{value:,.1f} {units[0]}"
