"""RecBole's own settings, looked at before any data is read.

RecBole finds most mistakes in them late, and some never: it replaces an unknown ``learner`` by Adam, trains nothing
where ``epochs`` is negative, and looks ``valid_metric`` up behind the first epoch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

LEARNERS = ("adam", "adamw", "sgd", "adagrad", "rmsprop", "sparse_adam")
# The smallest whole number that each may be.
_WHOLE = {"epochs": 1, "train_batch_size": 1, "eval_batch_size": 1, "stopping_step": 0, "seed": 0}


def check_settings(values: Mapping[str, Any], metrics: Collection[str]) -> None:
    """Raise for the first setting of RecBole's that no training can use.

    Args:
        values: the final configuration; absent keys and ``None`` are RecBole's affair.
        metrics: names that RecBole can compute, in lower case.

    Raises:
        ValueError: names the key, what was expected and what came.
    """
    for key, least in _WHOLE.items():
        value = values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{key}: expected an int >= {least}, got {value!r}")
    rate = values.get("learning_rate")
    if rate is not None and not (_is_number(rate) and rate > 0):
        raise ValueError(f"learning_rate: expected a number > 0, got {rate!r}")
    decay = values.get("weight_decay")
    if decay is not None and not (_is_number(decay) and decay >= 0):
        raise ValueError(f"weight_decay: expected a number >= 0, got {decay!r}")
    learner = values.get("learner")
    if learner is not None and str(learner).lower() not in LEARNERS:
        raise ValueError(f"learner: expected one of {', '.join(LEARNERS)}, got {learner!r}")
    _check_metrics(values, metrics)


def _check_metrics(values: Mapping[str, Any], known: Collection[str]) -> None:
    asked = values.get("metrics") or []
    asked = [asked] if isinstance(asked, str) else list(asked)
    names = [str(name).lower() for name in asked]
    for name, given in zip(names, asked, strict=True):
        if name not in known:
            hint = "; the hit rate is called Hit" if name == "hr" else ""
            raise ValueError(f"metrics: expected some of {', '.join(sorted(known))}, got {given!r}{hint}")
    valid = values.get("valid_metric")
    if valid is None or not names or not _is_validated(values):
        return
    name, at, k = str(valid).lower().partition("@")
    sizes = values.get("topk") or []
    sizes = [str(size) for size in (sizes if isinstance(sizes, list | tuple) else [sizes])]
    if name not in names or (at and k not in sizes):
        raise ValueError(
            f"valid_metric: expected one of metrics ({', '.join(map(str, asked))}), for a list of the best followed by "
            f"@ and one of topk ({', '.join(sizes)}), got {valid!r}"
        )


def _is_validated(values: Mapping[str, Any]) -> bool:
    split = (values.get("eval_args") or {}).get("split") or {}
    parts = split.get("RS")
    return split.get("LS") != "test_only" and (not isinstance(parts, list) or len(parts) < 3 or parts[1] > 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
