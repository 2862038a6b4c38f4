"""A made-up data set, small enough to train on in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

USERS, ITEMS, LENGTH = 30, 25, 12


def write_atomic(root: Path, name: str = "tiny") -> Path:
    """Users walk through the items in circles; returns the data_path."""
    rng = np.random.default_rng(0)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(USERS):
        item, time = int(rng.integers(ITEMS)), 1_600_000_000 + int(rng.integers(10_000))
        for _ in range(LENGTH):
            lines.append(f"u{user}\ti{item}\t{time}")
            item, time = (item + 1 + int(rng.integers(2))) % ITEMS, time + int(rng.integers(1, 100_000))
    folder = root / name
    folder.mkdir(parents=True)
    (folder / f"{name}.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    titles = [
        "item_id:token\tmovie_title:token_seq\trelease_year:token",
        *(f"i{i}\tThe {i}th\t19{i:02d}" for i in range(ITEMS)),
    ]
    (folder / f"{name}.item").write_text("\n".join(titles) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def atomic_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data_path of the data set ``tiny``."""
    return write_atomic(tmp_path_factory.mktemp("atomic"))


@pytest.fixture
def cli() -> CliRunner:
    return CliRunner()


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RecBole writes logs to the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def run_record(label: str = "HSTU", seed: int = 1, ndcg: float = 0.1, **changes: Any) -> dict[str, Any]:
    """A record as a run writes it."""
    history = [
        {
            "epoch": e,
            "train_loss": 5.0 - e,
            "train_seconds": 2.0 if e else 9.0,
            "valid_score": ndcg - (e - 1) ** 2 / 100,
        }
        for e in range(3)
    ]
    record = {
        "format": "hstu-plugin/run",
        "format_version": 1,
        "created": "2024-01-01T00:00:00+00:00",
        "label": label,
        "model": label,
        "dataset": "tiny",
        "seed": seed,
        "device": "cpu",
        "protocol": {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"}, "topk": [10]},
        "user_config": {},
        "config": {},
        "data": {"users": USERS, "items": ITEMS},
        "parameters": 10,
        "epochs": 3,
        "best_epoch": 1,
        "valid_metric": "NDCG@10",
        "best_valid_score": ndcg,
        "valid": {"hit@10": 2 * ndcg, "ndcg@10": ndcg},
        "test": {"hit@10": 2 * ndcg, "ndcg@10": ndcg},
        "seconds_per_pass": 2.0,
        "train_seconds": 13.0,
        "total_seconds": 15.0,
        "history": history,
        "files": {},
        "versions": {"python": "3.11", "torch": "2.13"},
        "machine": {"cpu": "a CPU", "cpus_usable": 2, "threads": 2, "gpus": []},
    }
    return {**record, **changes}
