"""Metrics from sums and pooled scores, so that they do not depend on how the data was cut into ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hstu_plugin.ranking_config import RankingConfig, TaskKind

_CLIP = 1e-7


class RetrievalMetrics:
    """HR@k, NDCG@k, MRR@k and MRR of held-out items from their ranks among all items, 1 for the best."""

    def __init__(self, top_k: Sequence[int]) -> None:
        self.top_k = tuple(top_k)
        self.sums = torch.zeros(3 * len(self.top_k) + 2, dtype=torch.float64)

    def add(self, ranks: Tensor) -> None:
        """Ranks ``[n]``, >= 1; half ranks where scores tie."""
        ranks = ranks.double().cpu()
        gains = 1 / torch.log2(ranks + 1)
        for i, k in enumerate(self.top_k):
            found = ranks <= k
            self.sums[3 * i] += found.sum()
            self.sums[3 * i + 1] += gains[found].sum()
            self.sums[3 * i + 2] += (1 / ranks[found]).sum()
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
            named[f"hr@{k}"], named[f"ndcg@{k}"], named[f"mrr@{k}"] = means[3 * i : 3 * i + 3]
        return named


class RankingMetrics:
    """AUC, GAUC, log loss and normalised entropy of binary tasks, RMSE, MAE and NE of regressions; all ranks' scores.

    As `hstu_plugin.adapters.ranking.metrics` defines them. GAUC, the mean of the users' own AUC weighted by their rows,
    is there where the rows' users are known.
    """

    def __init__(self, ranking: RankingConfig) -> None:
        self.ranking = ranking
        self.parts: list[Tensor] = []
        self.users: list[Tensor] = []

    def add(self, scores: Tensor, labels: Tensor, users: Tensor | None = None) -> None:
        """Logits or values, and labels, ``[n, num_tasks]``; NaN labels are left out. ``users [n]`` int64."""
        self.parts.append(torch.stack([scores.detach().float().cpu(), labels.float().cpu()]))
        if users is not None:
            self.users.append(users.cpu())

    def result(self, group: dist.ProcessGroup) -> dict[str, float]:
        """Over all ranks; every rank of the gloo ``group`` calls it. Scores of all ranks meet on every rank."""
        tasks = len(self.ranking.tasks)
        own = torch.cat([torch.zeros(2, 0, tasks), *self.parts], dim=1)
        pooled = gather_rows(own.transpose(0, 1).contiguous(), group).transpose(0, 1)
        users = gather_rows(torch.cat([torch.zeros(0, dtype=torch.int64), *self.users]), group)
        named: dict[str, float] = {"examples": float(pooled.shape[1])}
        for k, task in enumerate(self.ranking.tasks):
            known = ~pooled[1, :, k].isnan()
            scores, labels = pooled[0, known, k].double(), pooled[1, known, k].double()
            if task.kind is TaskKind.REGRESSION:
                found = _regression(scores, labels)
            else:
                found = _binary(scores, labels)
                if users.numel():
                    found["gauc"] = grouped_auc(scores, labels, users[known])
            named |= {f"{task.name}/{name}": value for name, value in found.items()}
        return named


def _binary(scores: Tensor, labels: Tensor) -> dict[str, float]:
    # A confident mistake costs a finite amount, as in the ranking door.
    predictions = scores.sigmoid().clamp(_CLIP, 1 - _CLIP)
    loss = float(torch.nn.functional.binary_cross_entropy(predictions, labels)) if labels.numel() else math.nan
    share = float(labels.mean())
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share) if 0 < share < 1 else math.nan
    return {"auc": auc(scores, labels), "logloss": loss, "ne": loss / entropy}


def _regression(scores: Tensor, labels: Tensor) -> dict[str, float]:
    squared, variance = float((scores - labels).square().mean()), float(labels.var(correction=0))
    return {
        "rmse": squared**0.5,
        "mae": float((scores - labels).abs().mean()),
        "ne": squared / variance if variance > 0 else math.nan,
    }


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


def grouped_auc(scores: Tensor, labels: Tensor, groups: Tensor) -> float:
    """Mean AUC of the groups that have both labels, weighted by their rows; NaN where there is none."""
    by_score = scores.argsort(stable=True)
    order = by_score[groups[by_score].argsort(stable=True)]
    scores, positive, groups = scores[order], labels[order] > 0.5, groups[order]
    _, group, sizes = torch.unique_consecutive(groups, return_inverse=True, return_counts=True)
    pairs = torch.stack([group.double(), scores.double()])
    _, value, ties = torch.unique_consecutive(pairs, dim=1, return_inverse=True, return_counts=True)
    # Mean rank of each group of ties inside its own group, counted from 1.
    ranks = (ties.cumsum(0) - (ties - 1) / 2)[value] - (sizes.cumsum(0) - sizes)[group]
    ups = torch.zeros(sizes.numel(), dtype=torch.float64).index_add_(0, group, positive.double())
    won = torch.zeros_like(ups).index_add_(0, group, ranks.double() * positive)
    both = (ups > 0) & (ups < sizes)
    areas = (won - ups * (ups + 1) / 2) / (ups * (sizes - ups))
    weights = sizes.double() * both
    return float((areas.nan_to_num() * weights).sum() / weights.sum()) if bool(both.any()) else math.nan


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
