"""Metrics of ranking tasks against loops and worked numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hstu_plugin.adapters.ranking.metrics import grouped_auc, task_metrics
from hstu_plugin.ranking_config import TaskConfig, TaskKind

TASKS = (TaskConfig(name="click"), TaskConfig(name="rating", kind=TaskKind.REGRESSION))


def naive_gauc(labels: list[float], scores: list[float], groups: list[int]) -> float | None:
    total, weight = 0.0, 0
    for group in set(groups):
        rows = [i for i, g in enumerate(groups) if g == group]
        pairs = [(i, j) for i in rows for j in rows if labels[i] == 1 and labels[j] == 0]
        if not pairs:
            continue
        wins = sum(1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0 for i, j in pairs)
        total += wins / len(pairs) * len(rows)
        weight += len(rows)
    return total / weight if weight else None


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("levels", [3, 1000])
def test_gauc_equals_the_loop(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    labels = (rng.random(200) < 0.3).astype(float)
    scores, groups = rng.integers(0, levels, 200) / levels, rng.integers(0, 40, 200)
    expected = naive_gauc(labels.tolist(), scores.tolist(), groups.tolist())
    assert grouped_auc(labels, scores, groups) == pytest.approx(expected, abs=1e-12)


def test_gauc_of_one_group_is_auc_and_of_pure_groups_none() -> None:
    labels, scores = np.array([1.0, 0, 1, 0]), np.array([0.9, 0.8, 0.3, 0.1])
    found = task_metrics(TASKS[:1], labels[:, None], scores[:, None], np.zeros(4))["click"]
    assert found["auc"] == found["gauc"] == 0.75
    assert grouped_auc(labels, scores, np.array([0, 1, 0, 1])) is None
    assert grouped_auc(np.zeros(0), np.zeros(0), np.zeros(0)) is None


def test_binary_metrics_by_hand() -> None:
    labels, scores = np.array([[1.0], [0.0], [0.0], [np.nan]]), np.array([[0.5], [0.25], [0.5], [0.9]])
    found = task_metrics(TASKS[:1], labels, scores, np.arange(4))["click"]
    loss = -(math.log(0.5) + math.log(0.75) + math.log(0.5)) / 3
    entropy = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
    assert found["log_loss"] == pytest.approx(loss)
    assert found["ne"] == pytest.approx(loss / entropy)
    assert found["auc"] == pytest.approx(0.75)
    assert (found["rows"], found["mean_label"], found["gauc"]) == (3, pytest.approx(1 / 3), None)


def test_predicting_the_mean_has_entropy_one() -> None:
    labels = (np.arange(50) % 5 == 0).astype(float)[:, None]
    found = task_metrics(TASKS[:1], labels, np.full((50, 1), 0.2), np.zeros(50))["click"]
    assert found["ne"] == pytest.approx(1.0) and found["auc"] == 0.5


def test_regression_metrics_by_hand() -> None:
    labels = np.array([[np.nan, 1.0], [np.nan, 3.0], [np.nan, 5.0]])
    predictions = np.array([[0.1, 2.0], [0.1, 3.0], [0.1, 3.0]])
    found = task_metrics(TASKS, labels, predictions, np.zeros(3))
    assert found["click"] == {"rows": 0.0}
    assert found["rating"]["rmse"] == pytest.approx(math.sqrt(5 / 3))
    assert found["rating"]["mae"] == pytest.approx(1.0)
    assert found["rating"]["ne"] == pytest.approx((5 / 3) / (8 / 3))


def test_one_class_allows_no_auc() -> None:
    found = task_metrics(TASKS[:1], np.ones((3, 1)), np.full((3, 1), 1.0), np.zeros(3))["click"]
    assert found["auc"] is None and found["ne"] is None and found["gauc"] is None
    assert found["log_loss"] is not None and math.isfinite(found["log_loss"])
