"""hstu-recbole compare: several models, one protocol."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hstu_plugin.adapters.recbole import compare, report, settings
from hstu_plugin.adapters.recbole.cli import main

SIZES = (
    "--set",
    "HSTU.hidden_size=8",
    "--set",
    "HSTU.n_layers=1",
    "--set",
    "SASRec.hidden_size=8",
    "--set",
    "SASRec.n_layers=1",
)


def run(cli: CliRunner, data: Path, out: Path, *options: str) -> Result:
    words = (f"--data_path={data}", "--use_gpu=False", "--epochs=1", "--topk=[1,10]")
    return cli.invoke(
        main, ["compare", "--dataset", "tiny", "--output-dir", str(out), "--no-progress", *options, *words]
    )


@pytest.fixture(scope="module")
def compared(atomic_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = ("--seeds", "1,2", "--record", str(folder / "record.json"), *SIZES)
        result = run(CliRunner(), atomic_root, folder / "out", *options)
    assert result.exit_code == 0, result.output
    return folder, result


def test_files_hold_every_model_and_seed(compared: tuple[Path, Result]):
    folder, result = compared
    comparison = report.read_json(folder / "record.json", report.COMPARISON_FORMAT)
    assert comparison == report.read_json(folder / "out" / "comparison.json")
    assert list(comparison["models"]) == ["HSTU", "SASRec", "Pop"]
    for group in comparison["models"].values():
        assert group["seeds"] == [1, 2]
        assert set(group["test"]["mean"]) >= {"hit@10", "ndcg@10"}
        assert all(r["seconds_per_pass"] is not None for r in group["runs"])
    assert comparison["deltas"]["of"] == "HSTU"
    assert set(comparison["deltas"]["per_seed"]) == {"1", "2"}
    assert "HSTU minus SASRec" in result.output
    assert "| Pop | 2 |" in (folder / "out" / "comparison.md").read_text()


def test_all_models_share_split_and_ranking(compared: tuple[Path, Result]):
    folder, _ = compared
    records = [report.read_json(path) for path in sorted((folder / "out").glob("*/result.json"))]
    assert len(records) == 6
    assert len({json.dumps(r["protocol"], sort_keys=True) for r in records}) == 1
    assert not any(r["config"].get("filter_seen_items") for r in records)


def test_popularity_counts_training_events_and_ranks_the_same_rows(compared: tuple[Path, Result], atomic_root: Path):
    from hstu_plugin.adapters.recbole import runner

    folder, _ = compared
    pop, hstu = (
        runner.load(next((folder / "out" / f"{name}-seed-1" / "checkpoints").glob("*-last.pth")))
        for name in ("Pop", "HSTU")
    )
    for loaded in (pop, hstu):
        for data in (loaded.valid_data, loaded.test_data):
            assert len(data._dataset) == 30
    assert _pairs(pop) == _pairs(hstu)
    events: dict[str, list[str]] = {}
    for line in (atomic_root / "tiny" / "tiny.inter").read_text().splitlines()[1:]:
        user, item, _ = line.split("\t")
        events.setdefault(user, []).append(item)
    expected = Counter(item for items in events.values() for item in items[:-2])
    tokens = pop.dataset.field2id_token["item_id"]
    counts = {str(tokens[i]): int(n) for i, n in enumerate(pop.model.counts.tolist()) if n}
    assert counts == dict(expected)


def test_popularity_is_found_again_by_name(
    compared: tuple[Path, Result], cli: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # As in a process that has not trained it.
    monkeypatch.delitem(sys.modules, "recbole.model.sequential_recommender.popularitysequential", raising=False)
    run_dir = compared[0] / "out" / "Pop-seed-1"
    result = cli.invoke(main, ["evaluate", str(run_dir), "--output", str(tmp_path / "m.json")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "m.json").read_text())["test"] == report.read_json(run_dir / "result.json")["test"]
    result = cli.invoke(main, ["recommend", str(run_dir), "--user", "u3", "--topk", "3", "--json"])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)[0]["items"]) == 3


def _pairs(loaded: object) -> set[tuple[str, str]]:
    rows = loaded.test_data._dataset.inter_feat  # type: ignore[attr-defined]
    tokens = loaded.dataset.field2id_token  # type: ignore[attr-defined]
    return {
        (str(tokens["user_id"][u]), str(tokens["item_id"][i]))
        for u, i in zip(rows["user_id"].tolist(), rows["item_id"].tolist(), strict=True)
    }


def test_finished_runs_are_not_repeated(compared: tuple[Path, Result], atomic_root: Path, cli: CliRunner):
    folder, _ = compared
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("*/result.json")}
    result = run(cli, atomic_root, folder / "out", "--seeds", "1,2", *SIZES)
    assert result.exit_code == 0, result.output
    assert result.output.count("already finished") == 6
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_other_settings_do_not_pass_for_the_finished_ones(
    compared: tuple[Path, Result], atomic_root: Path, cli: CliRunner
):
    folder, _ = compared
    result = run(cli, atomic_root, folder / "out", "--seeds", "1,2", *SIZES, "--set", "HSTU.n_heads=2")
    assert result.exit_code == 1
    assert "finished with other settings (n_heads)" in result.output
    assert "--force" in result.output


def test_time_only(cli: CliRunner, atomic_root: Path, tmp_path: Path):
    out = tmp_path / "time"
    words = (f"--data_path={atomic_root}", "--use_gpu=False")
    arguments = ["compare", "--dataset", "tiny", "--models", "HSTU", "--time-epochs", "2", "--output-dir", str(out)]
    result = cli.invoke(main, [*arguments, "--no-progress", "--set", "HSTU.hidden_size=8", *words])
    assert result.exit_code == 0, result.output
    comparison = report.read_json(out / "comparison.json")
    assert comparison["models"]["HSTU"]["epochs"] == 2
    assert comparison["models"]["HSTU"]["seconds_per_pass"] > 0
    assert "not trained out" in comparison["purpose"]


def test_a_recipe_gives_its_protocol_to_all_and_its_model_to_hstu():
    hstu, sasrec = compare.plan(dataset=None, recipe="amazon-beauty", models=["HSTU", "SASRec"])
    assert hstu.recipes
    assert not sasrec.recipes
    assert sasrec.dataset == "amazon-beauty"
    assert sasrec.chosen["user_inter_num_interval"] == "[5,inf)"
    assert sasrec.chosen["topk"] == [5, 10, 20]
    assert "hidden_size" not in sasrec.chosen
    assert sasrec.chosen["train_neg_sample_args"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": []}, "--models: expected different names"),
        ({"models": ["HSTU", "HSTU"]}, "--models: expected different names"),
        ({"overrides": ["GRU.x=1"]}, "--set: expected MODEL.name=value"),
        ({"overrides": ["HSTU.x"]}, "--set: expected MODEL.name=value"),
        ({"dataset": None}, "--dataset: expected a data set"),
    ],
)
def test_plans_that_make_no_sense(changes: dict[str, object], message: str):
    arguments = {"dataset": "tiny", "recipe": None, "models": ["HSTU"], **changes}
    with pytest.raises(settings.SettingsError, match=message):
        compare.plan(**arguments)
