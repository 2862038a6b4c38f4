"""A made-up data set: some users like some kinds of items, which only their history tells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

USERS, ITEMS, EVENTS = 60, 30, 24

SCHEMA: dict[str, Any] = {
    "name": "tiny",
    "events": {"file": "events.parquet", "context": ["page"]},
    "past": {"file": "past.parquet", "items": "items", "last_time": "last"},
    "items": {"file": "items.parquet", "key": "item_id", "features": ["kind", {"column": "length", "buckets": 4}]},
    "users": {"file": "users.parquet", "key": "user_id", "include_id": True, "features": ["age"]},
    "actions": {
        "types": ["click", {"name": "liked", "column": "rating", "at_least": 4}],
        "intensities": [{"name": "watched", "column": "seconds", "per": "length", "boundaries": [0.2, 0.5, 0.9]}],
        "contexts": ["device"],
    },
    "series": ["city"],
    "tasks": [
        {"name": "click"},
        {"name": "rating", "kind": "regression", "weight": 0.5, "loss": "huber"},
    ],
    "split": {"valid": 0.2, "test": 0.2},
}
RECIPE: dict[str, Any] = {
    "schema": "tiny.schema.yaml",
    "embedding_dim": 16,
    "num_layers": 1,
    "num_heads": 2,
    "dropout": 0.0,
    "head_dims": [16],
    "max_history": 20,
    "max_candidates": 4,
    "epochs": 3,
    "batch_size": 32,
    "learning_rate": 0.01,
    # Fewer windows for hstu, each a whole series: smaller steps make up for it.
    "models": {
        "hstu": {"train_candidates": 16, "batch_size": 8},
        "ultra-hstu": {"hstu": {"mask": {"max_attn_len": 8}}},
    },
}


def tables() -> dict[str, pd.DataFrame]:
    """Each user likes even items, odd items, or none of it; times are in file order over all users."""
    rng = np.random.default_rng(0)
    taste = rng.integers(0, 2, USERS)
    rows = []
    for user in range(USERS):
        for _ in range(EVENTS):
            item = int(rng.integers(ITEMS))
            liked = item % 2 == taste[user]
            click = float(rng.random() < (0.9 if liked else 0.1))
            rating = (
                np.nan if rng.random() < 0.3 else float(np.clip(round(rng.normal(4.2 if liked else 2.0, 0.6)), 1, 5))
            )
            rows.append(
                (f"u{user}", item, click, rating, 60.0 * click * rng.random(), "ab"[user % 2], "p", "xy"[item % 2])
            )
    names = ["user_id", "item_id", "click", "rating", "seconds", "city", "device", "page"]
    events = pd.DataFrame(rows, columns=names)
    events["timestamp"] = 1_600_000_000 + rng.permutation(len(events)) * 97.0
    events["length"] = 60.0
    events = events.sort_values("timestamp", ignore_index=True)
    past = pd.DataFrame({"user_id": [f"u{u}" for u in range(0, USERS, 3)], "last": 1_599_999_000})
    past["items"] = [list(range(u % 5)) for u in range(len(past))]
    items = pd.DataFrame({"item_id": range(ITEMS), "kind": [f"k{i % 3}" for i in range(ITEMS)], "length": 10.0})
    items["length"] += np.arange(ITEMS)
    users = pd.DataFrame({"user_id": [f"u{u}" for u in range(USERS)], "age": [u % 4 for u in range(USERS)]})
    return {"events": events, "past": past, "items": items, "users": users}


def write_data(folder: Path, **changed: pd.DataFrame) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in {**tables(), **changed}.items():
        frame.to_parquet(folder / f"{name}.parquet")
    return folder


def write_recipe(folder: Path, *, schema: dict[str, Any] | None = None, **changed: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.schema.yaml").write_text(yaml.safe_dump(SCHEMA if schema is None else schema), encoding="utf-8")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**RECIPE, **changed}), encoding="utf-8")
    return folder / "tiny.yaml"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("ranking"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe")


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Small tensors: one thread is faster than two that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
