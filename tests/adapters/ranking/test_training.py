"""Training through the command: models learn, runs resume and repeat exactly, reports and errors are readable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from hstu_plugin.adapters.ranking import launch, report, settings, trainer
from hstu_plugin.adapters.ranking.cli import main
from hstu_plugin.adapters.ranking.schema import SchemaError, read_schema
from hstu_plugin.adapters.ranking.settings import ModelName, RankSettings
from hstu_plugin.adapters.ranking.trainer import CheckpointError

from .conftest import write_recipe

TRAINED = ("hstu", "ultra-hstu", "dlrm", "pooled-attention")


@pytest.fixture(autouse=True)
def _drawn_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures cost more than these trainings; one test draws them."""
    if request.node.name != "test_learning_curves_are_pictures":
        monkeypatch.setattr(report, "learning_curve", lambda _records, path: path)


def run(recipe: Path, data: Path, out: Path, model: str = "dlrm", **options: Any) -> dict[str, Any]:
    request = launch.Request(recipe=str(recipe), data=data, output_dir=out, models=[model], device="cpu", **options)
    return launch.execute(request, lambda _line: None)[0]


@pytest.mark.parametrize("model", TRAINED)
def test_every_model_learns_what_only_the_history_tells(
    model: str, recipe: Path, data_dir: Path, tmp_path: Path
) -> None:
    # A user's taste is a coin; items alone are worth nothing.
    out = tmp_path / "out"
    record = run(recipe, data_dir, out, model, overrides={"epochs": 10, "patience": 10})
    floor = run(recipe, data_dir, tmp_path / "floor", "item-mean")
    assert record["test"]["click"]["auc"] > 0.75 > 0.65 > floor["test"]["click"]["auc"]
    assert record["test"]["click"]["ne"] < 0.9 < floor["test"]["click"]["ne"]
    assert record["test"]["rating"]["rmse"] < floor["test"]["rating"]["rmse"]
    folder = out / f"{model}-seed1"
    assert {p.name for p in folder.iterdir()} == {"best.pt", "last.pt", "result.json"}
    assert json.loads((folder / "result.json").read_text()) == record
    assert {p.name for p in out.iterdir()} >= {"comparison.json", "comparison.md"}
    assert record["versions"]["torch"] == torch.__version__ and record["machine"]["cpu"]
    # The saved weights give the recorded numbers.
    again = launch.evaluate(str(recipe), data_dir, folder, split="test", device="cpu")
    assert again["click"]["auc"] == pytest.approx(record["test"]["click"]["auc"], abs=1e-9)


def test_a_resumed_run_equals_an_unbroken_one(recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    options = {"dropout": 0.2, "patience": 9}
    whole = run(recipe, data_dir, tmp_path / "whole", "hstu", overrides={**options, "epochs": 4})
    part = tmp_path / "part"
    run(recipe, data_dir, part, "hstu", overrides={**options, "epochs": 2})
    (part / "hstu-seed1" / "result.json").unlink()
    resumed = run(recipe, data_dir, part, "hstu", overrides={**options, "epochs": 4})
    assert [e["train_loss"] for e in resumed["history"]] == [e["train_loss"] for e in whole["history"]]
    assert resumed["test"] == whole["test"] and resumed["epochs"] == 4


def test_with_a_schedule_the_number_of_epochs_belongs_to_the_run(recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    options = {"lr_schedule": "cosine", "warmup_steps": 3, "id_dropout": {"user": 0.5, "kind": 0.2}, "patience": 9}
    rates: list[list[float]] = []
    step = torch.optim.AdamW.step

    def watched(optimizer: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *args, **kwargs)

    asked = {**options, "epochs": 2, "table_learning_rate": 0.002}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        whole = run(recipe, data_dir, tmp_path / "whole", overrides=asked)
    weights, tables = (torch.tensor(column) for column in zip(*rates, strict=True))
    assert weights[:3].tolist() == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    assert torch.allclose(tables, weights * 0.2) and weights[-1] < 0.0002 and (weights[3:].diff() < 0).all()
    # A run that stopped goes on along the same course, and only along that.
    part = tmp_path / "part"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.RankTrainer, "_impatient", lambda self: self.progress.epoch == 1)
        run(recipe, data_dir, part, overrides=asked)
    (part / "dlrm-seed1" / "result.json").unlink()
    with pytest.raises(CheckpointError, match="epochs 2, not 3"):
        run(recipe, data_dir, part, overrides={**asked, "epochs": 3})
    resumed = run(recipe, data_dir, part, overrides=asked)
    assert resumed["test"] == whole["test"] and resumed["epochs"] == 2


def test_weight_decay_of_tables_is_their_own(recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    decays = {"learning_rate": 1e-3, "weight_decay": 0.0, "table_weight_decay": 900.0, "epochs": 1}
    run(recipe, data_dir, tmp_path / "out", overrides=decays)
    state = trainer.read_checkpoint(tmp_path / "out" / "dlrm-seed1" / "last.pt")["model"]
    # A decay of 0.9 a step leaves next to nothing of a row that has no gradient, and the step itself of the others.
    assert state["embedding.items.rows.weight"].abs().max() < 0.005 < state["head.output.weight"].abs().max()


def test_a_mixture_learns_and_is_evaluated_again(recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    channels = {"all": {}, "clicked": {"actions": ["click"], "max_events": 8, "hstu": {"num_layers": 2}}}
    overrides = {"epochs": 8, "patience": 9, "channels": channels}
    record = run(recipe, data_dir, tmp_path / "out", "ultra-hstu", overrides=overrides)
    assert record["test"]["click"]["auc"] > 0.75
    single = run(recipe, data_dir, tmp_path / "single", "ultra-hstu", overrides={"epochs": 1})
    assert record["parameters"] > single["parameters"] and record["settings"]["channels"] == channels
    again = launch.evaluate(str(recipe), data_dir, tmp_path / "out" / "ultra-hstu-seed1", split="test", device="cpu")
    assert again["click"]["auc"] == pytest.approx(record["test"]["click"]["auc"], abs=1e-9)


def test_a_history_without_actions_tells_little_of_a_taste(recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    parts = ["types", "intensities", "contexts"]
    # Without the user's id, which learns the taste from the labels.
    overrides = {"epochs": 6, "patience": 9, "id_dropout": {"user": 1.0}}
    told = run(recipe, data_dir, tmp_path / "told", "ultra-hstu", overrides=overrides)
    blind = run(recipe, data_dir, tmp_path / "blind", "ultra-hstu", overrides={**overrides, "without_actions": parts})
    # So few windows leave the second one some luck with the items.
    assert told["test"]["click"]["auc"] > 0.75
    assert blind["test"]["click"]["auc"] < told["test"]["click"]["auc"] - 0.1
    assert told["data"] == blind["data"] and told["parameters"] > blind["parameters"]


def test_seeds_repeat_and_differ(recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    first = run(recipe, data_dir, tmp_path / "a", overrides={"epochs": 1})
    again = run(recipe, data_dir, tmp_path / "b", overrides={"epochs": 1})
    other = run(recipe, data_dir, tmp_path / "c", overrides={"epochs": 1}, seeds=(2,))
    assert first["test"] == again["test"] != other["test"]


def test_finished_runs_are_kept_and_other_settings_refused(recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(recipe, data_dir, out, overrides={"epochs": 1})
    assert run(recipe, data_dir, out, overrides={"epochs": 1}) == first
    with pytest.raises(report.ReportError, match="other settings"):
        run(recipe, data_dir, out, overrides={"epochs": 1, "embedding_dim": 8})
    forced = run(recipe, data_dir, out, overrides={"epochs": 1, "embedding_dim": 8}, force=True)
    assert forced["settings"]["embedding_dim"] == 8
    (out / "dlrm-seed1" / "result.json").unlink()
    with pytest.raises(CheckpointError, match="embedding_dim 8, not 16"):
        run(recipe, data_dir, out, overrides={"epochs": 1})


def test_a_pickle_is_never_executed(recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe, data_dir, out, overrides={"epochs": 1})
    best = out / "dlrm-seed1" / "best.pt"
    whole = best.read_bytes()
    torch.save({"model": Bomb()}, best)
    with pytest.raises(CheckpointError, match="refused, as reading it would execute code"):
        launch.evaluate(str(recipe), data_dir, best.parent, split="test", device="cpu")
    best.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        launch.evaluate(str(recipe), data_dir, best.parent, split="test", device="cpu")
    torch.save({"a": 1}, best)
    with pytest.raises(CheckpointError, match="expected a checkpoint of hstu-rank"):
        trainer.read_checkpoint(best)
    with pytest.raises(CheckpointError, match="no such file"):
        trainer.read_checkpoint(best.with_name("absent.pt"))


class Bomb:
    def __reduce__(self) -> Any:
        return pytest.fail, ("executed",)


def test_training_stops_when_validation_no_longer_improves(recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    # So high a rate that the first epochs are the best.
    record = run(recipe, data_dir, tmp_path / "out", overrides={"epochs": 40, "patience": 1, "learning_rate": 0.03})
    scores = [epoch["valid_score"] for epoch in record["history"]]
    assert record["epochs"] < 40
    assert record["best_epoch"] == scores.index(min(scores)) + 1
    assert record["epochs"] == record["best_epoch"] + 2


def test_learning_curves_are_pictures(recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe, data_dir, out, overrides={"epochs": 2}, seeds=(1, 2))
    for path in (out / "dlrm-seed1" / "curve.png", out / "curve.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_command_trains_reports_and_evaluates(recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    cli, out = CliRunner(), tmp_path / "out"
    words = ["--data", str(data_dir), "--output-dir", str(out), "--device", "cpu", "--set", "epochs=1"]
    asked = ["--model", "dlrm,item-mean", "--seeds", "1,2", "--commit", "0123abc"]
    done = cli.invoke(main, ["train", str(recipe), *words, *asked])
    assert done.exit_code == 0, done.output
    comparison = json.loads((out / "comparison.json").read_text())
    assert list(comparison["models"]) == ["dlrm", "item-mean"] and comparison["commits"] == ["0123abc"]
    assert comparison["models"]["dlrm"]["seeds"] == [1, 2]
    auc = comparison["models"]["dlrm"]["test"]["click"]["auc"]
    runs = [json.loads((out / f"dlrm-seed{s}" / "result.json").read_text())["test"]["click"]["auc"] for s in (1, 2)]
    assert auc["mean"] == pytest.approx(sum(runs) / 2) and auc["std"] > 0
    again = cli.invoke(main, ["train", str(recipe), *words, "--model", "dlrm,item-mean", "--seeds", "1,2"])
    assert again.output.count("finished before") == 4
    shown = cli.invoke(main, ["report", str(out / "dlrm-seed1"), str(out / "dlrm-seed2"), "--markdown"])
    assert "| click | dlrm | 2 |" in shown.output and "Protocol: max_history 20" in shown.output
    recorded = cli.invoke(main, ["report", str(out / "comparison.json"), "--markdown"])
    assert recorded.output.startswith("| task | model |") and "| click | item-mean | 2 |" in recorded.output
    drawn = cli.invoke(main, ["report", str(out / "comparison.json"), "--curve", str(out / "c.png")])
    assert drawn.exit_code == 2 and "--curve: none of the files is a run" in drawn.output
    one = cli.invoke(
        main, ["evaluate", str(recipe), str(out / "dlrm-seed1"), "--data", str(data_dir), "--split", "valid"]
    )
    assert one.exit_code == 0 and json.loads(one.output)["click"]["rows"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "bert"], "model: expected one of hstu, ultra-hstu"),
        (["--set", "epoch=1"], "unknown key 'epoch'"),
        (["--set", "hstu.mask.window=3"], "hstu, mask: unknown key 'window'; known: max_attn_len"),
        (["--set", "hstu.num_head=3"], "hstu: unknown key 'num_head'"),
        (["--set", "learning_rate=-1"], "learning_rate: expected a number > 0"),
        (["--set", "form=interleaved", "--model", "dlrm"], "form: expected summed for dlrm"),
        (["--set", "lr_schedule=up"], "lr_schedule: expected one of constant, cosine, got 'up'"),
        (["--set", "betas=[0.9]"], "betas: expected two numbers in [0, 1), got (0.9,)"),
        (["--set", "table_weight_decay=-1"], "table_weight_decay: expected a number >= 0, got -1"),
        (["--set", "id_dropout.user_id=0.1"], "id_dropout: expected item or user features (item, kind"),
        (["--set", "without_actions=[clicks]"], "without_actions: expected names among types, intensities, contexts"),
        (["--set", "channels.a.actions=[click]", "--model", "hstu"], "channels: expected none for hstu"),
        (["--set", "channels.a.acts=[x]", "--model", "ultra-hstu"], "channels, a: unknown key 'acts'"),
        (["--set", "channels.a.actions=[buy]", "--model", "ultra-hstu"], "actions: expected names of action types"),
        (
            ["--set", "channels.a.actions=[click]", "--set", "head_users=true", "--model", "ultra-hstu"],
            "got True; add head_users: false",
        ),
        (["--set", "epochs"], "--set: expected name=value"),
        (["--device", "tpu9"], "--device: expected auto, cpu or cuda"),
        (["--seeds", "1,1"], "expected different numbers"),
        (["--label", "x", "--model", "dlrm,hstu"], "--label"),
    ],
)
def test_wrong_words_are_one_line(words: list[str], message: str, recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    out = ["--output-dir", str(tmp_path / "out")]
    done = CliRunner().invoke(main, ["train", str(recipe), "--data", str(data_dir), *out, *words])
    assert done.exit_code != 0 and message in done.output, done.output
    assert "Traceback" not in done.output


def test_runs_of_other_data_or_protocol_are_not_compared(recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    record = run(recipe, data_dir, tmp_path / "out", "item-mean")
    other = {**record, "protocol": {**record["protocol"], "max_history": 5}}
    with pytest.raises(report.ReportError, match="protocol: the runs differ"):
        report.compare([record, other])
    with pytest.raises(report.ReportError, match="at least one"):
        report.compare([])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(report.ReportError, match="expected a file of format"):
        report.read_record(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["kuairand", "ml-1m-ratings"])
def test_recipes_of_the_package_are_valid(name: str) -> None:
    recipe = settings.read_recipe(settings.recipes()[name])
    schema = read_schema(recipe.schema)
    for model in ModelName:
        chosen = recipe.settings(model)
        assert chosen.model is model
        assert settings.from_plain(settings.plain_settings(chosen)) == chosen
    ultra = recipe.settings("ultra-hstu").hstu_config(num_features=3, num_series=0)
    assert ultra.mask.max_attn_len > 0 and ultra.variant == "ultra" and not ultra.time_bias
    hstu = recipe.settings("hstu")
    assert hstu.token_form == "interleaved" and hstu.hstu_config(num_features=0, num_series=0).row_time == "event"
    assert {task.task.name for task in schema.tasks} <= {"click", "long_view", "like", "liked", "rating"}


def test_settings_are_layered_and_files_checked(tmp_path: Path) -> None:
    recipe = settings.read_recipe(write_recipe(tmp_path))
    words = settings.parse_overrides(["hstu.mask.full_attn_tail_len=3", "dropout=0.5"])
    chosen = recipe.settings("ultra-hstu", words)
    mask = chosen.hstu_config(num_features=0, num_series=0).mask
    assert (mask.max_attn_len, mask.full_attn_tail_len, chosen.dropout) == (8, 3, 0.5)
    bare = tmp_path / "bare.yaml"
    bare.write_text("epochs: 3\n", encoding="utf-8")
    with pytest.raises(SchemaError, match="expected the path of a schema"):
        settings.read_recipe(bare)
    with pytest.raises(SchemaError, match="RECIPE: expected a YAML file or one of"):
        settings.find_recipe("nothing")
    with pytest.raises(SchemaError, match="cannot be read"):
        settings.read_recipe(tmp_path / "absent.yaml")


def test_token_counts_bound_every_window() -> None:
    chosen = RankSettings(model=ModelName.HSTU, max_history=10, max_candidates=3, train_candidates=7)
    assert chosen.max_tokens(num_features=2, num_series=1) == 2 + 3 * 17
