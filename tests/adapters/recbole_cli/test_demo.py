"""hstu-recbole demo, shortened, on the data that RecBole brings."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from hstu_plugin.adapters.recbole import demo, launch, report, settings
from hstu_plugin.adapters.recbole.cli import main

from .conftest import run_record


def test_one_epoch_shows_everything(cli: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recorded = tmp_path / "recorded.json"
    report.write_json(recorded, report.compare_records([run_record(), run_record("SASRec", ndcg=0.0456)]))
    monkeypatch.setattr(settings, "recorded_results", lambda dataset: recorded)
    execute = launch.execute

    def small(request: launch.Request) -> launch.Finished:
        sizes = {"hidden_size": 8, "n_layers": 1, "MAX_ITEM_LIST_LENGTH": 20, "train_batch_size": 256}
        return execute(dataclasses.replace(request, chosen={**request.chosen, **sizes}))

    monkeypatch.setattr(launch, "execute", small)
    out = tmp_path / "out"
    result = cli.invoke(main, ["demo", "--epochs", "1", "--user", "196", "--output-dir", str(out), "--no-progress"])
    assert result.exit_code == 0, result.output
    assert "SASRec (recorded)" in result.output
    assert "0.0456" in result.output
    assert "This run: recipe ml-100k-quick. Recorded: recipe ml-100k, larger" in result.output
    assert re.search(r"\b1 epochs in \d+ s, \d+\.\d\d s a pass over the data\.", result.output)
    assert "User 196: the last 8 items" in result.output
    assert "The next 10 recommended" in result.output
    assert f"Files: {out}/" in result.output
    record = report.read_json(out / launch.RECORD)
    assert (record["dataset"], record["epochs"]) == ("ml-100k", 1)
    assert record["data"] == {"users": 943, "items": 1682}
    assert (out / launch.CURVE).exists()


def test_without_recorded_results_the_table_has_this_run_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(settings, "recorded_results", lambda dataset: None)
    assert list(demo.beside_recorded(run_record())["models"]) == ["HSTU"]


def test_only_common_metrics_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = run_record("SASRec", test={"ndcg@10": 0.04, "mrr@10": 0.03})
    report.write_json(tmp_path / "r.json", report.compare_records([other]))
    monkeypatch.setattr(settings, "recorded_results", lambda dataset: tmp_path / "r.json")
    models = demo.beside_recorded(run_record())["models"]
    assert set(models) == {"HSTU", "SASRec (recorded)"}
    assert all(set(group["test"]["mean"]) == {"ndcg@10"} for group in models.values())
    assert models["HSTU"]["seconds_per_pass"] and models["SASRec (recorded)"]["seconds_per_pass"] is None
