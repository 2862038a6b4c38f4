"""The RecBole door and TorchRec's trainer: the same rows, and with the same weights the same loss and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from click.testing import CliRunner

pytest.importorskip("torchrec", reason="TorchRec is not installed: make install-torchrec")

from hstu_plugin.adapters.conversion.cli import main
from hstu_plugin.adapters.conversion.retrieval import leave_one_out
from hstu_plugin.adapters.recbole.prepare import make_config, make_data, make_model, make_trainer
from hstu_plugin.adapters.torchrec.data import RankBatches, plan_stream
from hstu_plugin.adapters.torchrec.loop import Trainer
from hstu_plugin.adapters.torchrec.options_file import options_from_dict

SETTINGS: dict[str, Any] = {
    "hidden_size": 10,
    "attention_dim": 10,
    "linear_dim": 10,
    "n_layers": 1,
    "n_heads": 1,
    "hidden_dropout_prob": 0.0,
    "loss_type": "CE",
    "MAX_ITEM_LIST_LENGTH": 8,
    "topk": [1, 5],
    "eval_args": {"split": {"LS": "test_only"}, "order": "TO", "mode": "full", "group_by": "user"},
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()


def configuration(tmp_path: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """What the command writes for the trainer."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": "HSTU", **SETTINGS, **changes}), encoding="utf-8")
    source, out = tmp_path / "dataset" / "tiny" / "tiny.inter", tmp_path / "converted"
    command = ["retrieval", str(source), "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(out)]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    config: dict[str, Any] = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    config["run"]["tensorboard"] = False
    return config


@pytest.mark.parametrize(
    "changes",
    [
        {"filter_seen_items": True},
        {"eval_args": {**SETTINGS["eval_args"], "split": {"LS": "valid_and_test"}}, "train_windows": "all"},
    ],
    ids=["test-only", "all-windows"],
)
def test_the_same_weights_give_the_same_loss_and_metrics(
    changes: dict[str, Any], tiny: dict[str, Any], tmp_path: Path
) -> None:
    values = {**tiny, **SETTINGS, "train_batch_size": 4096, "metrics": ["Hit", "NDCG", "MRR"], **changes}
    values |= {"valid_metric": "NDCG@5", "metric_decimal_place": 9, "shuffle": False}
    config = make_config("HSTU", "tiny", None, values, [])
    dataset, (train, _, test) = make_data(config)
    torch.manual_seed(0)
    model = make_model(config, train)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5)
    theirs = make_trainer(config, model).evaluate(test, load_best_model=False)
    (interaction,) = list(train)
    loss = model.eval().calculate_loss(interaction)

    plain = configuration(tmp_path, changes)
    options = options_from_dict({**plain, "data": {**plain["data"], "batch_size": 4096, "data_shards": 1}})
    assert options.negative_pool == "table" and options.retrieval.loss == "full_softmax"
    trainer = Trainer(options, device=torch.device("cpu"))
    state = trainer.model.state_dict()
    for name, weight in model.retrieval.state_dict().items():
        state[f"head.core.{name}"].copy_(weight)
    # Ids are numbers by first appearance in both doors.
    table = state["embeddings.embeddings.item.weight"]
    assert table.shape == (dataset.item_num, 12)
    table[:, :10] = model.item_embedding.weight.detach()
    ours = trainer.evaluate()
    assert ours["examples"] == len(test.dataset)
    for k in (1, 5):
        for mine, name in (("hr", "hit"), ("ndcg", "ndcg"), ("mrr", "mrr")):
            assert ours[f"{mine}@{k}"] == pytest.approx(theirs[f"{name}@{k}"], abs=1e-7)
    assert 0 < ours["hr@5"] < 1

    plan, _ = plan_stream(options, training=True)
    (batch,) = RankBatches(options, plan, rank=0, world_size=1, training=True).epoch(0)
    again, (_, rows) = trainer.model.module.eval()(batch)
    assert int(rows) == int(interaction["item_length"].sum())
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
    wanted = dict(
        zip(
            dict(model.retrieval.named_parameters()),
            torch.autograd.grad(loss, list(model.retrieval.parameters())),
            strict=True,
        )
    )
    again.backward()
    for name, weight in trainer.model.module.head.core.named_parameters():
        torch.testing.assert_close(weight.grad, wanted[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("held_out", [("valid", "test"), ("valid",), ("test",)])
@pytest.mark.parametrize("all_windows", [False, True])
def test_rows_cover_every_target_once(held_out: tuple[str, ...], all_windows: bool) -> None:
    counts = np.array([1, 2, 3, 4, 9, 20])
    found = leave_one_out(counts, window=5, held_out=held_out, all_windows=all_windows)
    ends = counts.cumsum()
    for user, (end, count) in enumerate(zip(ends, counts, strict=True)):
        own = {
            name: [(s, t) for s, t in zip(rows.start, rows.target, strict=True) if end - count <= t < end]
            for name, rows in found.items()
        }
        assert all(t - 5 <= s and s >= end - count and s < t for pairs in own.values() for s, t in pairs)
        taken = min(len(held_out), max(0, count - 2))
        assert [len(own[name]) for name in held_out] == [int(taken > back) for back in range(len(held_out))][::-1]
        trained = sorted(i for s, t in own["train"] for i in range(s + 1, t + 1))
        wanted = list(range(end - count + 1, end - taken))
        assert trained == (wanted if all_windows else wanted[-5:]), user


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}}}, "eval_args.split: expected"),
        ({"eval_args": {"split": {"LS": "test_only"}, "mode": "uni100"}}, "eval_args.mode: expected 'full'"),
        ({"user_inter_num_interval": "[5,inf)"}, "user_inter_num_interval"),
        ({"learner": "sgd"}, "learner: expected adam or adamw"),
        ({"MAX_ITEM_LIST_LENGTH": 0}, "MAX_ITEM_LIST_LENGTH"),
        ({"model": "SASRec"}, "model: expected HSTU"),
    ],
)
def test_recipes_that_this_door_cannot_follow(
    changes: dict[str, Any], message: str, tiny: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": "HSTU", **SETTINGS, **changes}), encoding="utf-8")
    source, out = tmp_path / "dataset" / "tiny" / "tiny.inter", tmp_path / "converted"
    done = CliRunner().invoke(
        main, ["retrieval", str(source), "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(out)]
    )
    assert done.exit_code == 1 and message in done.output
    assert not out.exists()
