"""Losses of multi-task ranking."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hstu_plugin.ranking_config import RankingConfig, RegressionLoss, TaskConfig, TaskKind


def multi_task_loss(scores: Tensor, labels: Tensor, ranking: RankingConfig) -> tuple[Tensor, Tensor]:
    """Weighted sum over tasks of the mean loss over the rows that have the task's label.

    Args:
        scores: ``[R, num_tasks]`` logits of binary tasks, values of regressions.
        labels: ``[R, num_tasks]`` float, binary ones in ``[0, 1]``; NaN where missing.
        ranking: the tasks.

    Returns:
        The scalar loss, in at least float32, and the tasks' own mean losses ``[num_tasks]``, detached; 0 for a task
        without any label, which then gives zero gradients.

    Raises:
        ValueError: shapes do not agree.
    """
    wanted = (scores.shape[0], len(ranking.tasks))
    if scores.shape != wanted or labels.shape != wanted:
        raise ValueError(
            f"scores, labels: expected [R, {wanted[1]}] each, got {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    known = ~labels.isnan()
    counts = known.sum(0).clamp(min=1)
    # The label of a missing one is never used; NaN there would reach the gradient through 0 * NaN.
    filled = labels.nan_to_num(0.0).to(scores.dtype)
    losses = [_losses(scores[:, k], filled[:, k], task) for k, task in enumerate(ranking.tasks)]
    means = (torch.stack(losses, 1) * known).sum(0) / counts
    weights = torch.tensor([task.weight for task in ranking.tasks], dtype=means.dtype, device=means.device)
    return (means * weights).sum(), means.detach()


def _losses(scores: Tensor, labels: Tensor, task: TaskConfig) -> Tensor:
    if task.kind is TaskKind.BINARY:
        return F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
    if task.loss is RegressionLoss.HUBER:
        return F.huber_loss(scores, labels, reduction="none", delta=task.huber_delta)
    return F.mse_loss(scores, labels, reduction="none")
