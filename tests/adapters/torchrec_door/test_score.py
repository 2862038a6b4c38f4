"""Ranking end to end: train on two processes, evaluate, score a file of requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hstu_plugin.adapters.torchrec import keyed_jagged
from hstu_plugin.adapters.torchrec.options_file import options_from_dict
from hstu_plugin.adapters.torchrec.score import main, score_file

from .cases import NOW, RANKING, ranking_model
from .training import ITEMS, result, train, write_config

TASKS = [{"name": "click"}, {"name": "watch", "kind": "regression", "weight": 0.5}]


def rows(count: int = 48, seed: int = 0) -> dict[str, list[Any]]:
    """A click follows an even item."""
    draw = np.random.default_rng(seed)
    names = ("item_id", "action", "time", "age", "tags", "candidate", "candidate_time", "click", "watch")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for _ in range(count):
        events, asked = int(draw.integers(0, 9)), int(draw.integers(0, 5))
        columns["item_id"].append(draw.integers(1, 40, events).tolist())
        columns["action"].append(draw.integers(1, 8, events).tolist())
        columns["time"].append((NOW + draw.integers(1, 900, events).cumsum()).tolist())
        columns["age"].append(int(draw.integers(20)))
        columns["tags"].append(draw.integers(0, 20, int(draw.integers(0, 3))).tolist())
        columns["candidate"].append(draw.integers(1, 40, asked).tolist())
        columns["candidate_time"].append([NOW + 90_000] * asked)
        columns["click"].append([float(item % 2 == 0) for item in columns["candidate"][-1]])
        columns["watch"].append([item / 40 for item in columns["candidate"][-1]])
    return columns


def typed(columns: dict[str, list[Any]]) -> pa.Table:
    kinds = {"age": pa.int64(), "click": pa.list_(pa.float32()), "watch": pa.list_(pa.float32())}
    return pa.table({key: pa.array(v, type=kinds.get(key, pa.list_(pa.int64()))) for key, v in columns.items()})


def plain_options(folder: Path) -> dict[str, Any]:
    for name, seed in (("train", 0), ("eval", 1)):
        (folder / name).mkdir(parents=True)
        pq.write_table(typed(rows(seed=seed)), folder / name / "part.parquet", row_group_size=20)
    schema = {
        "side": ["action"],
        "contextual": ["age", "tags"],
        "candidate": "candidate",
        "candidate_time": "candidate_time",
        "tables": [
            {"name": t.name, "num_embeddings": t.num_embeddings, "features": list(t.features)} for t in RANKING.tables
        ],
    }
    return {
        "task": "ranking",
        "schema": schema,
        "model": {"embedding_dim": 8, "num_heads": 2, "max_seq_len": 12, "dropout": 0.0},
        "ranking": {"tasks": TASKS, "head_dims": [8]},
        "data": {"train": str(folder / "train"), "eval": str(folder / "eval"), "batch_size": 8},
        "optim": {"tables": "rowwise_adagrad", "table_lr": 0.3, "dense_lr": 0.02},
        "run": {"output_dir": str(folder / "out"), "epochs": 4, "log_every": 1, "tensorboard": False},
    }


@pytest.mark.slow
def test_train_then_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    config = write_config(tmp_path / "c.yaml", plain_options(tmp_path))
    train(config, 2)
    metrics = result(tmp_path / "out")["metrics"]
    assert metrics["click/auc"] > 0.7 and metrics["watch/rmse"] < 0.4
    pq.write_table(typed(rows(10, seed=1)), tmp_path / "in.parquet")
    given = ["--config", str(config), "--requests", str(tmp_path / "in.parquet"), "--output"]
    assert main([*given, str(tmp_path / "out.jsonl"), "--micro-batch-size", "3"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["candidate"] for line in lines] == rows(10, seed=1)["candidate"]
    clicks = [(item % 2 == 0, p) for line in lines for item, p in zip(line["candidate"], line["click"], strict=True)]
    assert all(0 < p < 1 for _, p in clicks)
    assert np.mean([p for even, p in clicks if even]) > np.mean([p for even, p in clicks if not even])


def test_scores_are_the_models_whatever_the_file_and_the_micro_batch(tmp_path: Path) -> None:
    options = options_from_dict(plain_options(tmp_path))
    model = ranking_model().eval()
    columns = {key: values for key, values in rows(70).items() if key not in ("click", "watch")}
    pq.write_table(typed(columns), tmp_path / "in.parquet")
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({key: values[r] for key, values in columns.items()}) + "\n" for r in range(70)), "utf-8"
    )

    def tensors(key: str) -> list[torch.Tensor]:
        return [torch.tensor(v if isinstance(v, list) else [v], dtype=torch.int64) for v in columns[key]]

    features = keyed_jagged({key: tensors(key) for key in RANKING.id_keys})
    numbers = keyed_jagged({key: tensors(key) for key in RANKING.number_keys})
    wanted = model.head.core.head.predictions(model(features, numbers)).detach()
    for source, target, size in (("in.parquet", "a.parquet", 1), ("in.jsonl", "b.parquet", 1000)):
        score_file(model, options, tmp_path / source, tmp_path / target, micro_batch_size=size)
        table = pq.read_table(tmp_path / target).to_pydict()
        for k, name in enumerate(("click", "watch")):
            got = torch.tensor([score for request in table[name] for score in request])
            torch.testing.assert_close(got, wanted[:, k], rtol=1e-4, atol=1e-5)


def test_bad_requests(tmp_path: Path) -> None:
    options, model = options_from_dict(plain_options(tmp_path)), ranking_model().eval()
    columns = rows(3)
    columns["candidate"][2], columns["candidate_time"][2] = [ITEMS], [NOW]
    pq.write_table(typed(columns), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=r"in\.parquet: row 2, column 'candidate': expected ids"):
        score_file(model, options, tmp_path / "in.parquet", tmp_path / "out.parquet", micro_batch_size=8)
    assert not (tmp_path / "out.parquet").exists()
    with pytest.raises(ValueError, match="output: expected"):
        score_file(model, options, tmp_path / "in.parquet", tmp_path / "out.csv", micro_batch_size=8)
    with pytest.raises(ValueError, match="requests: expected"):
        score_file(model, options, tmp_path / "in.csv", tmp_path / "out.parquet", micro_batch_size=8)


def test_needs_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = plain_options(tmp_path)
    config = write_config(tmp_path / "c.yaml", {**plain, "task": "retrieval"})
    assert main(["--config", str(config), "--requests", "a.parquet", "--output", "b.parquet"]) == 2
    assert "task: expected ranking" in capsys.readouterr().err
