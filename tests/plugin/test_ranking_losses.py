"""Multi-task loss against numbers worked out by hand and a loop."""

from __future__ import annotations

import math

import pytest
import torch

from hstu_plugin.ranking_config import RankingConfig, RegressionLoss, TaskConfig, TaskKind
from hstu_plugin.ranking_losses import multi_task_loss

NAN = math.nan
RANKING = RankingConfig(
    tasks=(
        TaskConfig(name="click", weight=2.0),
        TaskConfig(name="rating", kind=TaskKind.REGRESSION, weight=0.5),
        TaskConfig(name="time", kind=TaskKind.REGRESSION, loss=RegressionLoss.HUBER, huber_delta=2.0),
    )
)


def test_loss_by_hand() -> None:
    scores = torch.tensor([[0.3, 1.0, 1.0], [-1.2, 2.0, 8.0], [2.0, 3.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([[1.0, 3.0, NAN], [0.0, NAN, 1.0], [NAN, 5.0, 1.5]], dtype=torch.float64)
    loss, parts = multi_task_loss(scores, labels, RANKING)
    click = (math.log1p(math.exp(-0.3)) + math.log1p(math.exp(-1.2))) / 2
    rating = (4 + 4) / 2
    time = (2.0 * (7 - 0.5 * 2.0) + 0.5 * 1.5**2) / 2
    assert parts.tolist() == pytest.approx([click, rating, time])
    assert loss.item() == pytest.approx(2 * click + 0.5 * rating + time)


def test_missing_labels_give_no_gradient_and_no_nan() -> None:
    scores = torch.randn(4, 3, requires_grad=True)
    labels = torch.tensor([[1.0, NAN, NAN], [NAN, NAN, 2.0], [NAN] * 3, [0.0, NAN, NAN]])
    loss, parts = multi_task_loss(scores, labels, RANKING)
    loss.backward()
    assert scores.grad is not None
    assert torch.equal(scores.grad != 0, ~labels.isnan())
    assert parts[1] == 0


def test_no_rows_still_reach_the_scores() -> None:
    scores = torch.zeros(0, 3, requires_grad=True)
    loss, _ = multi_task_loss(scores, torch.zeros(0, 3), RANKING)
    loss.backward()
    assert loss.item() == 0 and scores.grad is not None


def test_low_precision_scores_are_judged_in_float32() -> None:
    loss, parts = multi_task_loss(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3), RANKING)
    assert loss.dtype == parts.dtype == torch.float32


def test_shapes_that_do_not_agree_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[R, 3\] each"):
        multi_task_loss(torch.zeros(2, 3), torch.zeros(2, 2), RANKING)
