"""Metrics against loops and scikit-learn's definitions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from hstu_plugin.adapters.torchrec.metrics import RankingMetrics, RetrievalMetrics, auc, grouped_auc
from hstu_plugin.ranking_config import RankingConfig, TaskConfig


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=30))
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_auc_counts_pairs() -> None:
    draw = torch.Generator().manual_seed(0)
    # Few values: many ties.
    scores = torch.randint(0, 6, (60,), generator=draw).double()
    labels = torch.randint(0, 2, (60,), generator=draw).double()
    ups, downs = scores[labels == 1], scores[labels == 0]
    pairs = (ups[:, None] > downs[None]).double() + 0.5 * (ups[:, None] == downs[None]).double()
    assert auc(scores, labels) == pytest.approx(float(pairs.mean()), abs=1e-12)
    assert math.isnan(auc(scores, torch.ones(60)))


def test_retrieval_metrics(group: dist.ProcessGroup) -> None:
    measures = RetrievalMetrics([1, 3])
    measures.add(torch.tensor([1.0, 3.0]))
    measures.add(torch.tensor([2.5, 9.0]))
    got = measures.result(group)
    assert got["examples"] == 4
    assert got["hr@1"] == 0.25 and got["hr@3"] == 0.75
    assert got["ndcg@3"] == pytest.approx((1 + 0.5 + 1 / math.log2(3.5)) / 4)
    assert got["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 2.5 + 1 / 9) / 4)


def test_ranking_metrics(group: dist.ProcessGroup) -> None:
    ranking = RankingConfig(tasks=(TaskConfig(name="click"), TaskConfig(name="watch", kind="regression")))
    scores = torch.tensor([[2.0, 1.0], [-1.0, 2.0], [0.5, 3.0]])
    labels = torch.tensor([[1.0, 1.5], [0.0, torch.nan], [0.0, 3.0]])
    measures = RankingMetrics(ranking)
    measures.add(scores[:2], labels[:2])
    measures.add(scores[2:], labels[2:])
    got = measures.result(group)
    probabilities = scores[:, 0].sigmoid().tolist()
    loss = -(math.log(probabilities[0]) + math.log(1 - probabilities[1]) + math.log(1 - probabilities[2])) / 3
    entropy = -(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3
    assert got["click/logloss"] == pytest.approx(loss, rel=1e-6)
    assert got["click/ne"] == pytest.approx(loss / entropy, rel=1e-6)
    assert got["click/auc"] == 1.0
    assert got["watch/rmse"] == pytest.approx(math.sqrt(0.25 / 2))
    assert got["examples"] == 3


def test_grouped_auc_is_the_weighted_mean_over_groups_with_both_labels() -> None:
    draw = torch.Generator().manual_seed(3)
    groups = torch.randint(0, 9, (200,), generator=draw)
    labels = torch.randint(0, 2, (200,), generator=draw).double()
    labels[groups == 4] = 1.0
    scores = torch.randint(0, 6, (200,), generator=draw).double()
    wanted = total = 0.0
    for group in range(9):
        own = groups == group
        if 0 < labels[own].sum() < own.sum():
            wanted += float(own.sum()) * auc(scores[own], labels[own])
            total += float(own.sum())
    assert grouped_auc(scores, labels, groups) == pytest.approx(wanted / total, abs=1e-12)
    assert math.isnan(grouped_auc(scores, torch.ones(200), groups))
