"""A ranker of converted data, trained on one process and on two: the same losses and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchrec", reason="TorchRec is not installed: make install-torchrec")

from torchrec_door.training import losses, result, train, write_config

from .test_torchrec_door import both_doors

pytestmark = pytest.mark.slow
WORDS = ("head_users=true", "head_dropout=0.0", "learning_rate=0.01", "valid_every=2")


@pytest.mark.parametrize("tables", ["dense_adamw", "rowwise_adagrad"], ids=["replicated", "sharded"])
@pytest.mark.parametrize("model", ["ultra-hstu", "hstu"])
def test_one_process_and_two_have_the_same_losses_and_metrics(
    tables: str, model: str, recipe: Path, data_dir: Path, tmp_path: Path
) -> None:
    _, _, config = both_doors(recipe, data_dir, tmp_path / "out", model, *WORDS)
    assert config["optim"]["tables"] == "dense_adamw"
    config["optim"] |= {"tables": tables, "table_weight_decay": 0.1}
    config["model"]["dropout"] = 0.0
    config["data"] |= {"data_shards": 2, "id_dropout": {}}
    run = {"tensorboard": False, "log_every": 1, "epochs": 2, "max_steps": 12}
    if tables != "dense_adamw":
        config["sharding"] = {"item_id": ["row_wise"]}
    found: list[tuple[dict[int, float], dict[str, Any]]] = []
    for ranks in (1, 2):
        folder = tmp_path / f"run-{ranks}"
        config["run"] |= run | {"output_dir": str(folder)}
        said = train(write_config(tmp_path / f"{ranks}.yaml", config), ranks).stdout
        assert ("replicated" if tables == "dense_adamw" else "row_wise") in said
        found.append((losses(folder), result(folder)["metrics"]))
    (alone, metrics), (both, of_both) = found
    assert len(alone) > 5 and max(alone.values()) / min(alone.values()) > 1.05
    assert both == pytest.approx(alone, rel=1e-4)
    assert of_both == pytest.approx(metrics, rel=1e-3)
