"""Metrics of ranking tasks; from scikit-learn where it has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hstu_plugin.ranking_config import TaskConfig, TaskKind

Array = np.ndarray[Any, Any]
# Probabilities are kept this far from 0 and 1, so that one confident mistake costs a finite amount.
_CLIP = 1e-7


def task_metrics(
    tasks: Sequence[TaskConfig], labels: Array, predictions: Array, users: Array
) -> dict[str, dict[str, float | None]]:
    """Metrics by task.

    Binary: ``auc``; ``gauc`` (AUC of each user, weighted by impressions); ``log_loss`` in nats; ``ne``, the log loss
    over that of always predicting the labels' mean; ``mean_label``, ``mean_prediction`` and ``rows``. Regression:
    ``rmse``, ``mae``, ``ne`` (squared error over the labels' variance) and the same last three. None where the labels
    do not allow one, such as an AUC of one class.

    Args:
        labels, predictions: ``[R, tasks]``; labels NaN where missing, predictions as probabilities or values.
        users: ``[R]`` whose impression each row is.
    """
    found: dict[str, dict[str, float | None]] = {}
    for k, task in enumerate(tasks):
        known = np.isfinite(labels[:, k])
        own = labels[known, k].astype(np.float64), predictions[known, k].astype(np.float64)
        if not known.any():
            found[task.name] = {"rows": 0.0}
        elif task.kind is TaskKind.BINARY:
            found[task.name] = _binary(*own, users[known])
        else:
            found[task.name] = _regression(*own)
    return found


def grouped_auc(labels: Array, scores: Array, groups: Array) -> float | None:
    """Mean AUC of the groups with both labels, weighted by their rows; ties count half. None without such a group.

    Args:
        labels: ``[R]`` of 0 and 1. scores: ``[R]``. groups: ``[R]``, such as users.
    """
    order = np.lexsort((scores, groups))
    labels, scores, groups = labels[order], scores[order], groups[order]
    new_group = np.concatenate([[True], groups[1:] != groups[:-1]])[: len(groups)]
    new_value = new_group | np.concatenate([[True], scores[1:] != scores[:-1]])[: len(groups)]
    group = np.cumsum(new_group) - 1
    sizes = np.bincount(group)
    starts = np.cumsum(sizes) - sizes
    # Equal scores of a group share their mean rank, counted from 1 inside the group.
    value = np.cumsum(new_value) - 1
    ranks = np.arange(len(groups)) - starts[group] + 1.0
    ranks = (np.bincount(value, ranks) / np.bincount(value))[value]
    positives = np.bincount(group, labels)
    negatives = sizes - positives
    both = (positives > 0) & (negatives > 0)
    if not both.any():
        return None
    wins = np.bincount(group, ranks * labels) - positives * (positives + 1) / 2
    auc = wins[both] / (positives[both] * negatives[both])
    return float(np.average(auc, weights=sizes[both]))


def _binary(labels: Array, predictions: Array, users: Array) -> dict[str, float | None]:
    from sklearn.metrics import log_loss, roc_auc_score

    mean = float(labels.mean())
    clipped = predictions.clip(_CLIP, 1 - _CLIP)
    loss = float(log_loss(labels, clipped, labels=[0, 1]))
    mixed = 0 < mean < 1
    entropy = -(mean * np.log(mean) + (1 - mean) * np.log(1 - mean)) if mixed else None
    return {
        "auc": float(roc_auc_score(labels, predictions)) if mixed else None,
        "gauc": grouped_auc(labels, predictions, users),
        "log_loss": loss,
        "ne": None if entropy is None else float(loss / entropy),
        **_means(labels, predictions),
    }


def _regression(labels: Array, predictions: Array) -> dict[str, float | None]:
    from sklearn.metrics import mean_absolute_error, mean_squared_error

    squared, variance = float(mean_squared_error(labels, predictions)), float(labels.var())
    return {
        "rmse": squared**0.5,
        "mae": float(mean_absolute_error(labels, predictions)),
        "ne": squared / variance if variance > 0 else None,
        **_means(labels, predictions),
    }


def _means(labels: Array, predictions: Array) -> dict[str, float | None]:
    return {
        "mean_label": float(labels.mean()),
        "mean_prediction": float(predictions.mean()),
        "rows": float(len(labels)),
    }
