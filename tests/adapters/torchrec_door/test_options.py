"""Configuration files: defaults, refusals, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hstu_plugin.adapters.torchrec import loop
from hstu_plugin.adapters.torchrec.options_file import load_options, options_from_dict, to_dict
from hstu_plugin.adapters.torchrec.train import _setting, main, run

from .training import losses, result, retrieval_options, write_config, write_retrieval


def test_options_survive_a_round_trip() -> None:
    plain = retrieval_options(Path("somewhere"))
    plain["stochastic_length"] = {"alpha": 1.5}
    plain["model"]["mask"] = {"max_attn_len": 4}
    options = options_from_dict(plain)
    assert options_from_dict(yaml.safe_load(yaml.safe_dump(to_dict(options)))) == options


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("run", "steps", 3, "run: unknown keys \\['steps'\\]"),
        ("run", "max_step", 3, "run: unknown keys \\['max_step'\\] \\(did you mean max_steps\\?\\); known"),
        ("model", "Num_layer", 3, "did you mean num_layers"),
        ("data", "batch_size", 0, "data.batch_size: expected an int >= 1"),
        ("optim", "dense_lr", "1e-3", "write 1.0e-3"),
        ("optim", "tables", "adam", "adam"),
        ("model", "embedding_dim", 0, "embedding_dim"),
        ("schema", "items", "x", "schema: unknown keys \\['items'\\] \\(did you mean item"),
        ("schema", "tables", None, "schema.tables"),
        ("sharding", "users", ["row_wise"], "unknown tables \\['users'\\]"),
        ("data", "train", None, None),
    ],
)
def test_mistakes_are_named_with_the_file(
    tmp_path: Path, section: str, key: str, value: Any, message: str | None
) -> None:
    plain = retrieval_options(tmp_path)
    plain.setdefault(section, {})[key] = value
    if message is None:
        del plain[section][key]
        message = "data: missing keys \\['train'\\]"
    path = write_config(tmp_path / "c.yaml", plain)
    with pytest.raises(ValueError, match=f"c.yaml: .*{message}"):
        load_options(path)


def test_ranking_needs_tasks_and_balance_needs_lengths() -> None:
    plain = retrieval_options(Path("x"))
    with pytest.raises(ValueError, match="ranking: expected a section"):
        options_from_dict({**plain, "task": "ranking"})
    with pytest.raises(ValueError, match="needs a section stochastic_length"):
        options_from_dict({**plain, "load_balance": {"period": 3}})


def test_overrides_and_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path / "c.yaml", retrieval_options(tmp_path))
    assert load_options(path, dict([_setting("run.max_steps=7")])).run.max_steps == 7
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert main(["--config", str(path), "--set", "run.speed=1"]) == 2
    assert "unknown keys ['speed']" in capsys.readouterr().err
    # TorchX passes a flag on once.
    assert main(["--config", str(path), "--set", "run.epochs=2", "run.speed=1"]) == 2
    assert "unknown keys ['speed']" in capsys.readouterr().err


MIXTURE = {
    "task": "ranking",
    "schema": {
        "candidate": "candidate",
        "candidate_time": "candidate_time",
        "actions": {"names": ["click", "like"]},
        "tables": [{"name": "item", "num_embeddings": 9, "features": ["item_id", "candidate"]}],
    },
    "model": {"embedding_dim": 8, "max_seq_len": 16, "num_layers": 1, "mask": {"max_attn_len": 4}},
    "mixture": {"all": {}, "liked": {"actions": ["like"], "model": {"num_layers": 2}}},
    "ranking": {"tasks": [{"name": "click"}]},
    "data": {"train": "x"},
    "run": {"output_dir": "y"},
}


def test_channels_take_what_they_share_from_the_model() -> None:
    options = options_from_dict(MIXTURE)
    every, liked = options.mixture["all"], options.mixture["liked"]
    assert (every.config.num_layers, liked.config.num_layers) == (1, 2)
    assert liked.config.mask.max_attn_len == 4 and liked.actions == ("like",) and every.actions == ()
    assert options_from_dict(to_dict(options)) == options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": {"all": {"speed": 1}}}, r"mixture\.all: unknown keys \['speed'\]"),
        ({"label_means": [0.1, 0.2]}, "label_means: expected one for each of 1 tasks"),
        ({"negative_pool": "all"}, "negative_pool: expected one of shared, table"),
        ({"task": "retrieval"}, "expected with task: ranking"),
    ],
)
def test_what_does_not_fit_a_ranker(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options_from_dict({**MIXTURE, **changes})


def test_a_loss_that_is_not_finite_stops_before_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    write_retrieval(tmp_path)
    plain = retrieval_options(tmp_path, checkpoint_every=1, log_every=100)
    plain["optim"]["table_lr"] = 1e38
    plain["retrieval"]["similarity"] = "dot"
    try:
        with pytest.raises(loop.NonFiniteLoss, match="not finite at or before step"):
            run(options_from_dict(plain))
    finally:
        loop.dist.destroy_process_group()
    saved = list((tmp_path / "out" / "checkpoints").glob("step-*"))
    assert len(saved) <= 1 and not (tmp_path / "out" / "result.json").exists()


def test_trains_evaluates_and_records_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    write_retrieval(tmp_path)
    plain = retrieval_options(tmp_path, epochs=1, tensorboard=True, precision="bf16")
    plain["model"]["dropout"] = 0.1
    plain["stochastic_length"] = {"alpha": 1.5, "max_seq_len": 16}
    plain["load_balance"] = {"warmup_steps": 2, "period": 2}
    assert run(options_from_dict(plain)) == 0
    record = result(tmp_path / "out")
    assert record["finished"] and record["metrics"]["examples"] == 96 and record["versions"]["torchrec"]
    assert len(losses(tmp_path / "out")) == 6
    assert list((tmp_path / "out" / "tensorboard").iterdir())
