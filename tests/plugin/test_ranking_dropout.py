"""Ids that training takes for unknown."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hstu_plugin.ranking_dropout import IdDropout

from .ranking_cases import make_batch, make_features

FEATURES = make_features()


def test_only_the_named_columns_lose_ids() -> None:
    batch = make_batch(FEATURES)
    before = batch.history.items.clone(), batch.candidates.items.clone(), batch.users.clone()
    dropped = IdDropout(FEATURES, {"item": 1.0, "region": 1.0})(batch)
    assert not dropped.history.items[:, 0].any() and not dropped.candidates.items[:, 0].any()
    assert torch.equal(dropped.history.items[:, 1], before[0][:, 1])
    assert not dropped.users[:, 1].any() and torch.equal(dropped.users[:, 0], before[2][:, 0])
    # The batch, and so the log it may share its tensors with, stays as it was.
    for tensor, old in zip((batch.history.items, batch.candidates.items, batch.users), before, strict=True):
        assert torch.equal(tensor, old)
    assert torch.equal(dropped.labels, batch.labels)


def test_the_rate_is_met_and_follows_the_seed() -> None:
    batch = make_batch(FEATURES)
    batch.history.items[:, 0] = 1
    drop, kept = IdDropout(FEATURES, {"item": 0.3}), []
    for seed in range(200):
        torch.manual_seed(seed)
        kept.append(drop(batch).history.items[:, 0].float())
    torch.manual_seed(0)
    assert torch.equal(drop(batch).history.items[:, 0].float(), kept[0])
    # 3,600 draws: five standard deviations are 0.038.
    assert torch.stack(kept).mean().item() == pytest.approx(0.7, abs=0.038)


def test_without_rates_the_batch_is_untouched() -> None:
    batch = make_batch(FEATURES)
    same = IdDropout(FEATURES, {"item": 0.0})(batch)
    assert same.history.items is batch.history.items and same.users is batch.users


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"iten": 0.1}, r"id_dropout: expected item or user features \(item, author, age, region\), got 'iten'"),
        ({"item": 1.5}, "id_dropout.item: expected a probability, got 1.5"),
        ({"item": True}, "id_dropout.item: expected a probability, got True"),
    ],
)
def test_wrong_rates_are_refused(rates: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IdDropout(FEATURES, rates)
