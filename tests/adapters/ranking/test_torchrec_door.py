"""The ranking door and TorchRec's trainer: the same rows, and with the same weights the same scores and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from click.testing import CliRunner
from torch import Tensor

pytest.importorskip("torchrec", reason="TorchRec is not installed: make install-torchrec")

from hstu_plugin.adapters.conversion.cli import main
from hstu_plugin.adapters.ranking.dataset import RankingData, load
from hstu_plugin.adapters.ranking.models import make_model
from hstu_plugin.adapters.ranking.schema import read_schema
from hstu_plugin.adapters.ranking.settings import RankSettings, read_recipe
from hstu_plugin.adapters.ranking.trainer import RankTrainer
from hstu_plugin.adapters.torchrec.batch import check_batch
from hstu_plugin.adapters.torchrec.data import RankBatches, plan_stream
from hstu_plugin.adapters.torchrec.loop import Trainer
from hstu_plugin.adapters.torchrec.options_file import options_from_dict
from hstu_plugin.ranking_losses import multi_task_loss
from hstu_plugin.ranking_model import RankingModel
from hstu_plugin.ranking_windows import window_batch

CPU = torch.device("cpu")
NAMES = {"auc": "auc", "gauc": "gauc", "log_loss": "logloss", "ne": "ne", "rmse": "rmse", "mae": "mae"}


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "1")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
        yield
        dist.destroy_process_group()


def both_doors(
    recipe: Path, data_dir: Path, out: Path, model: str, *words: str
) -> tuple[RankingData, RankSettings, dict[str, Any]]:
    """The ranking door's data and settings, and the configuration that the command writes for the trainer."""
    command = ["ranking", str(recipe), "--data", str(data_dir), "--model", model, "--out", str(out)]
    done = CliRunner().invoke(main, [*command, *(f"--set={word}" for word in words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    read = read_recipe(recipe)
    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    settings = {key: yaml.safe_load(value) for key, value in (word.split("=") for word in words)}
    return load(read_schema(read.schema), data_dir), read.settings(model, settings), config


def copy_weights(core: RankingModel, trainer: Trainer, config: dict[str, Any]) -> None:
    """The core's weights into the trainer's model."""
    schema, state = config["schema"], trainer.model.state_dict()
    keys = {"items": ["item_id", *schema["side"]], "users": schema["contextual"], "series": schema["series"]}
    copied = set()
    for kind, names in keys.items():
        tables = getattr(core.embedding, kind)
        for place, name in enumerate(names):
            weight, target = tables.table(place), f"embeddings.embeddings.{name}.weight"
            # Sharded, or one copy on every rank.
            place_of = state[target] if isinstance(state[target], Tensor) else state[target].local_shards()[0].tensor
            with torch.no_grad():
                place_of[: weight.shape[0], : weight.shape[1]] = weight
            copied.add(target)
    for name, weight in core.state_dict().items():
        part, _, rest = name.partition(".")
        if part != "ranker" and rest.partition(".")[0] in keys:
            continue
        target = f"head.core.{rest}" if part == "ranker" else f"head.events.{rest}"
        state[target].copy_(weight)
        copied.add(target)
    assert copied == set(state)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("ultra-hstu", ()),
        ("ultra-hstu", ("learned_no_action=true", "embedding_dim=10")),
        ("ultra-hstu", ("head_users=true",)),
        ("hstu", ()),
        ("hstu", ("head_users=true",)),
    ],
    ids=["ultra", "learned", "users", "interleaved", "interleaved-users"],
)
def test_the_same_weights_give_the_same_loss_gradients_and_metrics(
    model: str, words: tuple[str, ...], recipe: Path, data_dir: Path, tmp_path: Path
) -> None:
    data, settings, config = both_doors(recipe, data_dir, tmp_path / "out", model, *words)
    torch.manual_seed(3)
    core = make_model(settings, data)
    assert isinstance(core, RankingModel)
    with torch.no_grad():
        for name, weight in core.named_parameters():
            # Unit-scale weights: near-zero embeddings would hide errors.
            weight.normal_(std=0.5 if name.startswith("embedding") else 0.2)
    config["run"]["tensorboard"] = False
    trainer = Trainer(options_from_dict(config), device=CPU)
    copy_weights(core, trainer, config)

    ours, theirs = trainer.evaluate(), RankTrainer(core, data, settings, seed=1, device=CPU).evaluate("test")
    for task, metrics in theirs.items():
        compared = {NAMES[name]: value for name, value in metrics.items() if name in NAMES}
        assert compared == pytest.approx({name: ours[f"{task}/{name}"] for name in compared}, rel=1e-4)
        assert len(compared) >= 3
    assert ours["examples"] == data.facts["events"]["test"]

    windows = RankTrainer(core, data, settings, seed=1, device=CPU).windows("train", training=True)
    batch = window_batch(data.log, windows)
    loss, _ = multi_task_loss(core.training_scores(batch), batch.labels, core.head.ranking)
    loss.backward()
    whole = {**config["data"], "batch_size": len(windows), "data_shards": 1, "shuffle": False}
    options = options_from_dict({**config, "data": whole})
    plan, _ = plan_stream(options, training=True)
    (step,) = RankBatches(options, plan, rank=0, world_size=1, training=True).epoch(0)
    check_batch(step, options.schema, num_tasks=2)
    trainer.model.zero_grad()
    again, (_, rows) = trainer.model.module(step)
    assert int(rows) == int(batch.labels.isfinite().sum())
    again.backward()
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
    grads = {name: weight.grad for name, weight in trainer.model.module.named_parameters() if weight.grad is not None}
    for name, weight in core.ranker.named_parameters():
        torch.testing.assert_close(grads[f"head.core.{name}"], weight.grad, rtol=1e-3, atol=1e-6)
    for name, weight in core.embedding.actions.named_parameters():
        torch.testing.assert_close(grads[f"head.events.actions.{name}"], weight.grad, rtol=1e-3, atol=1e-6)


def test_a_baseline_is_refused_and_a_folder_is_not_overwritten(recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    command = ["ranking", str(recipe), "--data", str(data_dir), "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(main, [*command, "--model", "dlrm"])
    assert refused.exit_code == 1 and "model: expected one of hstu, ultra-hstu, got dlrm" in refused.output
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 1 and "it exists" in refused.output
