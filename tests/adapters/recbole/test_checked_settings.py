"""RecBole's own settings, looked at before a run."""

from __future__ import annotations

from typing import Any

import pytest

from hstu_plugin.adapters.recbole.checked_settings import check_settings

METRICS = ("hit", "ndcg", "mrr", "auc")
GOOD: dict[str, Any] = {
    "epochs": 3,
    "train_batch_size": 8,
    "eval_batch_size": 8,
    "stopping_step": 0,
    "seed": 0,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "learner": "AdamW",
    "metrics": ["Hit", "NDCG"],
    "topk": [5, 10],
    "valid_metric": "NDCG@10",
    "eval_args": {"split": {"LS": "valid_and_test"}},
}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"learning_rate": None, "learner": None, "epochs": None},
        {"metrics": "AUC", "valid_metric": "AUC"},
        {"topk": 10},
        # Nothing is validated, so nobody looks the metric up.
        {"valid_metric": "MRR@7", "eval_args": {"split": {"LS": "test_only"}}},
        {"valid_metric": "MRR@7", "eval_args": {"split": {"RS": [0.9, 0.0, 0.1]}}},
    ],
)
def test_settings_that_work_pass(changed: dict[str, Any]) -> None:
    check_settings({**GOOD, **changed}, METRICS)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": -1}, r"^epochs: expected an int >= 1, got -1$"),
        ({"epochs": "abc"}, r"^epochs: expected an int >= 1, got 'abc'$"),
        ({"train_batch_size": 0}, r"^train_batch_size: expected an int >= 1, got 0$"),
        ({"eval_batch_size": True}, r"^eval_batch_size: expected an int >= 1, got True$"),
        ({"seed": 1.5}, r"^seed: expected an int >= 0, got 1.5$"),
        ({"learning_rate": -1}, r"^learning_rate: expected a number > 0, got -1$"),
        ({"learning_rate": float("nan")}, r"^learning_rate: expected a number > 0, got nan$"),
        ({"weight_decay": "much"}, r"^weight_decay: expected a number >= 0, got 'much'$"),
        ({"learner": "foo"}, r"^learner: expected one of adam, .*, got 'foo'$"),
        ({"metrics": ["HR"]}, r"^metrics: expected some of auc, hit, mrr, ndcg, got 'HR'; the hit rate is called Hit$"),
        ({"valid_metric": "MRR@10"}, r"^valid_metric: expected one of metrics \(Hit, NDCG\).*got 'MRR@10'$"),
        ({"valid_metric": "NDCG@20"}, r"one of topk \(5, 10\), got 'NDCG@20'$"),
        ({"valid_metric": "MRR@7", "eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}}}, r"^valid_metric: "),
    ],
)
def test_mistakes_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings({**GOOD, **changed}, METRICS)
