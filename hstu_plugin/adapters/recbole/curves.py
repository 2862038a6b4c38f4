"""The learning curve as a picture: training loss and validation metric over the epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hstu_plugin.adapters.recbole.report import metric_name

# Readable for people who do not tell red from green, and in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


def learning_curve(records: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw one line per run; the epoch whose weights are kept is marked.

    Args:
        records: run records; several seeds, or several models, share the axes.
        path: the PNG to write.

    Raises:
        ValueError: no records.
    """
    if not records:
        raise ValueError("records: expected at least one run, got none")
    # The object interface: no global figure, no display, nothing to close.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    validated = any(_points(r, "valid_score")[0] for r in records)
    figure = Figure(figsize=(9.6 if validated else 5.2, 3.8), dpi=130, layout="constrained")
    axes = figure.subplots(1, 2 if validated else 1, squeeze=False)[0]
    for index, record in enumerate(records):
        colour = _COLOURS[index % len(_COLOURS)]
        _draw(axes[0], *_points(record, "train_loss"), colour, _name(record, records))
        if validated:
            epochs, scores = _points(record, "valid_score")
            best = int(record["best_epoch"]) + 1 if record.get("best_epoch") is not None else 0
            top = dict(zip(epochs, scores, strict=True)).get(best)
            name = _name(record, records)
            _draw(axes[1], epochs, scores, colour, name if top is None else f"{name}: {top:.4f}")
            if top is not None:
                _mark_best(axes[1], best, top, colour, text=len(records) == 1)
    # RecBole's figure: the batches' mean losses, added up.
    axes[0].set_title("Training loss, sum over batches", loc="left", fontsize=11)
    if validated:
        axes[1].set_title(f"Validation {metric_name(records[0]['valid_metric'].lower())}", loc="left", fontsize=11)
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    if len(records) > 1:
        # Of several runs the numbers would lie over each other: they go into the legend.
        axes[-1].legend(frameon=False, fontsize=9, loc="lower right" if validated else "upper right")
    figure.suptitle(_heading(records), fontsize=12, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def _draw(axis: Any, epochs: list[int], values: list[float], colour: str, name: str) -> None:
    # A single point is invisible as a line.
    axis.plot(epochs, values, color=colour, linewidth=1.8, label=name, marker="o" if len(epochs) < 3 else None)


def _mark_best(axis: Any, epoch: int, value: float, colour: str, *, text: bool) -> None:
    axis.plot([epoch], [value], marker="o", markersize=7, color=colour, markeredgecolor="white", zorder=5)
    if not text:
        return
    axis.annotate(
        f"{value:.4f}",
        (epoch, value),
        xytext=(0, 7),
        textcoords="offset points",
        ha="center",
        fontsize=9,
        color=colour,
    )
    # Room for the number above the highest point.
    axis.margins(y=0.12)


def _points(record: Mapping[str, Any], key: str) -> tuple[list[int], list[float]]:
    """Epochs counted from 1, as people count, with the epochs that have this value."""
    rows = [(int(e["epoch"]) + 1, float(e[key])) for e in record["history"] if e.get(key) is not None]
    return [e for e, _ in rows], [v for _, v in rows]


def _name(record: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    one_label = len({r["label"] for r in records}) == 1
    return f"seed {record['seed']}" if one_label else f"{record['label']}, seed {record['seed']}"


def _heading(records: Sequence[Mapping[str, Any]]) -> str:
    labels = list(dict.fromkeys(str(r["label"]) for r in records))
    return f"{', '.join(labels)} on {records[0]['dataset']}"
