"""Metrics from sums and pooled scores, so that they do not depend on how the data was cut into ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hstu_plugin.ranking_config import RankingConfig, TaskKind


class RetrievalMetrics:
    """HR@k, NDCG@k and MRR of held-out items from their ranks among all items, 1 for the best."""

    def __init__(self, top_k: Sequence[int]) -> None:
        self.top_k = tuple(top_k)
        self.sums = torch.zeros(2 * len(self.top_k) + 2, dtype=torch.float64)

    def add(self, ranks: Tensor) -> None:
        """Ranks ``[n]``, >= 1; half ranks where scores tie."""
        ranks = ranks.double().cpu()
        gains = 1 / torch.log2(ranks + 1)
        for i, k in enumerate(self.top_k):
            self.sums[2 * i] += (ranks <= k).sum()
            self.sums[2 * i + 1] += gains[ranks <= k].sum()
        self.sums[-2] += (1 / ranks).sum()
        self.sums[-1] += ranks.numel()

    def result(self, group: dist.ProcessGroup) -> dict[str, float]:
        """Over all ranks; every rank of the gloo ``group`` calls it."""
        sums = self.sums.clone()
        dist.all_reduce(sums, group=group)
        count = float(sums[-1])
        means = (sums / max(count, 1.0)).tolist()
        named = {"examples": count, "mrr": means[-2]}
        for i, k in enumerate(self.top_k):
            named[f"hr@{k}"], named[f"ndcg@{k}"] = means[2 * i], means[2 * i + 1]
        return named


class RankingMetrics:
    """AUC, log loss and normalised entropy of binary tasks, RMSE of regressions, from the scores of all ranks.

    Normalised entropy is the log loss by that of always predicting the mean label.
    """

    def __init__(self, ranking: RankingConfig) -> None:
        self.ranking = ranking
        self.parts: list[Tensor] = []

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Logits or values, and labels, ``[n, num_tasks]``; NaN labels are left out."""
        self.parts.append(torch.stack([scores.detach().float().cpu(), labels.float().cpu()]))

    def result(self, group: dist.ProcessGroup) -> dict[str, float]:
        """Over all ranks; every rank of the gloo ``group`` calls it. Scores of all ranks meet on every rank."""
        tasks = len(self.ranking.tasks)
        own = torch.cat([torch.zeros(2, 0, tasks), *self.parts], dim=1)
        pooled = gather_rows(own.transpose(0, 1).contiguous(), group).transpose(0, 1)
        named: dict[str, float] = {"examples": float(pooled.shape[1])}
        for k, task in enumerate(self.ranking.tasks):
            known = ~pooled[1, :, k].isnan()
            scores, labels = pooled[0, known, k].double(), pooled[1, known, k].double()
            if task.kind is TaskKind.REGRESSION:
                named[f"{task.name}/rmse"] = float((scores - labels).square().mean().sqrt())
                continue
            named[f"{task.name}/auc"] = auc(scores, labels)
            loss = float(torch.nn.functional.binary_cross_entropy_with_logits(scores, labels))
            named[f"{task.name}/logloss"] = loss
            share = float(labels.mean())
            entropy = -share * math.log(share) - (1 - share) * math.log(1 - share) if 0 < share < 1 else math.nan
            named[f"{task.name}/ne"] = loss / entropy
        return named


def auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve, ties counted half; NaN where one class is missing."""
    positive = labels > 0.5
    ups, downs = int(positive.sum()), int((~positive).sum())
    if ups == 0 or downs == 0:
        return math.nan
    _, group, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    # Mean rank of each group of ties.
    ranks = counts.cumsum(0).double() - (counts - 1).double() / 2
    return (float(ranks[group][positive].sum()) - ups * (ups + 1) / 2) / (ups * downs)


def gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows ``[n, ...]`` of all ranks, on every rank, in the order of the ranks; CPU tensors."""
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([rows.shape[0]]), group=group)
    most = max(int(count) for count in counts)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])
