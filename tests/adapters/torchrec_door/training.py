"""Small data sets, configurations and launched trainings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).resolve().parents[3]
ITEMS, USERS, NOW = 60, 96, 1_700_000_000


def histories(seed: int = 0, users: int = USERS) -> dict[str, list[Any]]:
    """Users who walk through the items with a stride of their own: there is something to learn."""
    draw = np.random.default_rng(seed)
    columns: dict[str, list[Any]] = {name: [] for name in ("item_id", "kind", "time", "held_out", "asked_at")}
    for _ in range(users):
        count = int(draw.integers(1, 14))
        start, stride = int(draw.integers(ITEMS - 1)), int(draw.integers(1, 4))
        walk = [1 + (start + i * stride) % (ITEMS - 1) for i in range(count + 1)]
        times = (NOW + draw.integers(1, 9000, count + 1).cumsum()).tolist()
        columns["item_id"].append(walk[:-1])
        columns["kind"].append([item % 5 for item in walk[:-1]])
        columns["time"].append(times[:-1])
        columns["held_out"].append(walk[-1])
        columns["asked_at"].append(times[-1])
    return columns


def write_retrieval(folder: Path, files: int = 3, group: int = 9) -> None:
    """``train`` and ``eval`` folders of parquet files with several row groups each."""
    for name, seed in (("train", 0), ("eval", 1)):
        (folder / name).mkdir(parents=True)
        columns = histories(seed)
        for f in range(files):
            part = {key: values[f::files] for key, values in columns.items()}
            pq.write_table(pa.table(part), folder / name / f"part-{f}.parquet", row_group_size=group)


def retrieval_options(folder: Path, **run: Any) -> dict[str, Any]:
    """Without dropout, so that a step is the same on any number of ranks."""
    return {
        "task": "retrieval",
        "schema": {
            "side": ["kind"],
            "candidate": "held_out",
            "request_time": "asked_at",
            "negative": "negative",
            "tables": [
                {"name": "item", "num_embeddings": ITEMS, "features": ["item_id", "held_out", "negative"]},
                {"name": "kind", "num_embeddings": 5, "features": ["kind"]},
            ],
        },
        "model": {"embedding_dim": 16, "num_layers": 1, "max_seq_len": 16, "dropout": 0.0},
        "retrieval": {"loss": "sampled_softmax", "num_negatives": 16, "temperature": 0.1},
        "data": {
            "train": str(folder / "train"),
            "eval": str(folder / "eval"),
            "batch_size": 16,
            "data_shards": 4,
            "bucket_steps": 3,
        },
        "optim": {"dense_lr": 0.01, "tables": "adagrad", "table_lr": 0.1, "clip_norm": 1.0},
        "run": {
            "output_dir": str(folder / "out"),
            "epochs": 2,
            "log_every": 1,
            "timeout_s": 60,
            "top_k": [1, 10],
            "tensorboard": False,
            **run,
        },
    }


def write_config(path: Path, options: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(options), encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def command(config: Path, ranks: int, *more: str) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    script = ["-m", "hstu_plugin.adapters.torchrec.train", "--config", str(config), *more]
    return [sys.executable, *launch, *script]


def train(
    config: Path, ranks: int, *more: str, expect: int = 0, timeout: int = 240
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(config, ranks, *more), env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss; the last word on a step that was run twice."""
    lines = (folder / "losses.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))
