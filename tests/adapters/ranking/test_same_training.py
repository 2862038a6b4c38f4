"""The ranking door and TorchRec's trainer from the same weights on the same batches: the same losses, step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchrec", reason="TorchRec is not installed: make install-torchrec")

from hstu_plugin.adapters.conversion.ranking import drawn_order
from hstu_plugin.adapters.ranking import trainer as door
from hstu_plugin.adapters.ranking.models import make_model
from hstu_plugin.adapters.ranking.trainer import RankTrainer
from hstu_plugin.adapters.torchrec.loop import Trainer
from hstu_plugin.adapters.torchrec.options_file import options_from_dict
from hstu_plugin.ranking_model import RankingModel

from .test_torchrec_door import CPU, NAMES, alone, both_doors, copy_weights

__all__ = ["alone"]

WORDS = (
    "head_users=true",
    "head_dropout=0.0",
    "epochs=2",
    "learning_rate=0.01",
    "table_learning_rate=0.003",
    "weight_decay=0.5",
    "table_weight_decay=2.0",
    "betas=[0.7, 0.9]",
    "warmup_steps=3",
    "lr_schedule=cosine",
    "valid_every=2",
)


@pytest.mark.parametrize("model", ["ultra-hstu", "hstu"])
@pytest.mark.parametrize("clip", ["null", "0.05"], ids=["unclipped", "clipped"])
def test_two_epochs_have_the_same_losses_and_metrics(
    model: str, clip: str, recipe: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, settings, config = both_doors(recipe, data_dir, tmp_path / "out", model, *WORDS, f"clip_norm={clip}")
    torch.manual_seed(3)
    core = make_model(settings, data)
    assert isinstance(core, RankingModel)
    config["data"] |= {"shuffle": False, "data_shards": 1}
    config["run"] |= {"tensorboard": False, "log_every": 1}
    trainer = Trainer(options_from_dict(config), device=CPU)
    copy_weights(core, trainer, config)

    theirs = RankTrainer(core, data, settings, seed=1, device=CPU)
    steps: list[float] = []

    def watched(*given: Any) -> Any:
        found = multi_task_loss(*given)
        steps.append(float(found[0]))
        return found

    multi_task_loss = door.multi_task_loss
    monkeypatch.setattr(door, "multi_task_loss", watched)
    order = drawn_order(len(theirs.windows("train", training=True)))
    monkeypatch.setattr(door.torch, "randperm", lambda windows: order)
    theirs.fit()
    monkeypatch.undo()

    result = trainer.train()
    lines = (tmp_path / "out" / "run" / "losses.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["loss"] for line in lines] == pytest.approx(steps, rel=2e-5)
    assert len(steps) > 10 and max(steps) / min(steps) > 1.1
    for task, metrics in theirs.evaluate("test").items():
        compared = {NAMES[name]: value for name, value in metrics.items() if name in NAMES}
        found = {name: result["metrics"][f"{task}/{name}"] for name in compared}
        assert compared == pytest.approx(found, rel=1e-4)
