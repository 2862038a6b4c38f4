"""What recipes of rankers ask for beside the model: dropped ids, a falling rate, users in the head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hstu_plugin.adapters.torchrec import HSTURankingModel
from hstu_plugin.adapters.torchrec.batch import SequenceBatch
from hstu_plugin.adapters.torchrec.channel import Channel
from hstu_plugin.adapters.torchrec.data import RankBatches, plan_stream
from hstu_plugin.adapters.torchrec.loop import Trainer
from hstu_plugin.adapters.torchrec.options import TrainOptions
from hstu_plugin.adapters.torchrec.options_file import options_from_dict, to_dict

from .cases import RANKING, TASKS, config
from .test_score import plain_options


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, Any]:
    found = plain_options(tmp_path)
    found["schema"]["unknown_item"] = True
    return found


def batches(options: TrainOptions, *, rank: int = 0, training: bool = True) -> list[SequenceBatch]:
    plan, _ = plan_stream(options, training=training)
    return list(RankBatches(options, plan, rank=rank, world_size=1, training=training).epoch(0))


def ids(some: list[SequenceBatch], key: str) -> torch.Tensor:
    return torch.cat([batch.features[key].values() for batch in some])


def test_ids_of_the_named_tables_are_dropped_in_training_alone(plain: dict[str, Any]) -> None:
    whole = options_from_dict(plain)
    plain["data"]["id_dropout"] = {"item": 0.5}
    given = options_from_dict(plain)
    assert options_from_dict(to_dict(given)) == given
    dropped, kept = batches(given), batches(whole)
    for key, share in (("item_id", 0.5), ("candidate", 0.5), ("action", 0.0), ("age", 0.0)):
        before, after = ids(kept, key), ids(dropped, key)
        gone = before != after
        assert bool((after[gone] == 0).all())
        # Four deviations of a share of so many draws.
        assert abs(float(gone.double().mean()) - share) <= 4 * math.sqrt(share * (1 - share) / gone.numel())
    assert torch.equal(ids(batches(given), "item_id"), ids(dropped, "item_id"))
    assert torch.equal(ids(batches(given, training=False), "item_id"), ids(batches(whole, training=False), "item_id"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id_dropout": {"nothing": 0.5}}, "data.id_dropout: unknown tables"),
        ({"id_dropout": {"item": 1.5}}, "data.id_dropout.item: expected a probability, got 1.5"),
        ({"id_dropout": {"item": 0.5}, "unknown_item": False}, "key 'item_id' has no id 0 for what is unknown"),
    ],
)
def test_what_cannot_be_dropped(plain: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    plain["schema"]["unknown_item"] = changes.pop("unknown_item", True)
    plain["data"].update(changes)
    with pytest.raises(ValueError, match=message):
        options_from_dict(plain)


def test_the_rates_fall_to_zero_over_the_epochs(plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    plain["optim"].update({"lr_schedule": "cosine", "warmup_steps": 2})
    seen: list[tuple[float, float]] = []
    trainer = Trainer(options_from_dict(plain), device=torch.device("cpu"), stop=lambda: bool(note()))

    def note() -> None:
        groups = (trainer.dense.param_groups[0], trainer.model.fused_optimizer.param_groups[0])
        seen.append((groups[0]["lr"], groups[1]["lr"]))

    assert trainer.train()["finished"]
    steps = 4 * trainer.plan.steps_an_epoch
    turned = [0.5 * (1 + math.cos(math.pi * (step - 2) / (steps - 2))) for step in range(2, steps)]
    wanted = [0.5, 1.0, *turned]
    assert [dense for dense, _ in seen] == pytest.approx([0.02 * factor for factor in wanted])
    assert [table for _, table in seen] == pytest.approx([0.3 * factor for factor in wanted])


def test_the_head_reads_the_users_features() -> None:
    torch.manual_seed(0)
    model = HSTURankingModel(config(), RANKING, TASKS, head_users=True)
    assert model.head.core.head.hidden[0].normalized_shape == (8 * (1 + len(RANKING.contextual)),)
    with pytest.raises(ValueError, match="head_users: expected False"):
        HSTURankingModel(config(), RANKING, TASKS, mixture={"all": Channel(config=config())}, head_users=True)
