"""Records, tables and pictures of runs."""

from __future__ import annotations

import io
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from hstu_plugin.adapters.recbole import curves, report

from .conftest import run_record


def shown(renderable: object) -> str:
    console = Console(width=160, file=io.StringIO())
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_plain_makes_json_types():
    value = {
        "a": np.float32(0.5),
        1: (True, None),
        "n": math.nan,
        "i": np.int64(3),
        "t": torch.tensor(2),
        "d": torch.device("cpu"),
    }
    assert report.plain(value) == {"a": 0.5, "1": [True, None], "n": None, "i": 3, "t": 2, "d": "cpu"}
    assert report.plain(report.plain(value)) == report.plain(value)


def test_seconds_per_pass_leaves_the_first_epoch_out():
    assert report.seconds_per_pass([{"train_seconds": s} for s in (9.0, 2.0, 4.0, 3.0)]) == 3.0
    assert report.seconds_per_pass([{"train_seconds": 9.0}]) == 9.0
    assert report.seconds_per_pass([]) is None


def test_best_epoch_is_the_first_of_the_best():
    history = [{"epoch": e, "valid_score": s} for e, s in enumerate((0.1, 0.3, 0.3, None))]
    assert report.best_epoch(history) == 1
    assert report.best_epoch(history, bigger=False) == 0
    assert report.best_epoch([{"epoch": 0, "valid_score": None}]) is None


def test_files_come_back_as_they_were(tmp_path: Path):
    record = run_record()
    report.write_json(tmp_path / "deep" / "r.json", record)
    assert report.read_json(tmp_path / "deep" / "r.json") == record
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "r.json"
    report.write_json(path, run_record())
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write_json(path, {"x": math.inf})
    assert report.read_json(path) == run_record()
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected a file of format"),
        ('{"format": "other"}', "got 'other'"),
        (json.dumps({"format": report.RUN_FORMAT, "format_version": 99}), "newer hstu-plugin"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(report.ReportError, match=message):
        report.read_json(path)


def test_an_absent_file_is_refused(tmp_path: Path):
    with pytest.raises(report.ReportError, match="cannot be read"):
        report.read_json(tmp_path / "none.json")


def test_comparison_means_and_spread():
    values = (0.10, 0.12, 0.17)
    runs = [run_record(seed=s, ndcg=v) for s, v in zip((3, 1, 2), values, strict=True)]
    group = report.compare_records(runs)["models"]["HSTU"]
    assert group["seeds"] == [1, 2, 3]
    assert group["test"]["mean"]["ndcg@10"] == pytest.approx(statistics.fmean(values))
    assert group["test"]["std"]["ndcg@10"] == pytest.approx(statistics.stdev(values))
    assert group["epochs"] == 3
    assert group["seconds_per_pass"] == 2.0


def test_one_seed_has_no_spread():
    comparison = report.compare_records([run_record(ndcg=0.1)])
    assert comparison["models"]["HSTU"]["test"]["std"]["ndcg@10"] is None
    assert "±" not in report.comparison_markdown(comparison)


def test_deltas_pair_seeds():
    runs = [run_record(seed=s, ndcg=0.1 + s / 100) for s in (1, 2)]
    runs += [run_record("SASRec", seed=s, ndcg=0.1 - s / 100) for s in (1, 2, 3)]
    delta = report.compare_records(runs, deltas=("HSTU", "SASRec"))["deltas"]
    assert delta["per_seed"]["1"]["ndcg@10"] == pytest.approx(0.02)
    assert delta["per_seed"]["2"]["ndcg@10"] == pytest.approx(0.04)
    assert set(delta["per_seed"]) == {"1", "2"}
    assert delta["mean"]["ndcg@10"] == pytest.approx(0.03)
    assert delta["min"]["ndcg@10"] == pytest.approx(0.02)


@pytest.mark.parametrize("deltas", [("HSTU", "GRU4Rec"), ("HSTU", "SASRec")])
def test_deltas_need_both_sides(deltas: tuple[str, str]):
    runs = [run_record(seed=1), run_record("SASRec", seed=2)]
    with pytest.raises(report.ReportError, match="deltas: "):
        report.compare_records(runs, deltas=deltas)


@pytest.mark.parametrize("change", [{"dataset": "other"}, {"protocol": {"topk": [5]}}])
def test_runs_of_different_protocols_are_not_compared(change: dict[str, object]):
    with pytest.raises(report.ReportError, match=f"{next(iter(change))}: the runs differ"):
        report.compare_records([run_record(), run_record("SASRec", **change)])
    with pytest.raises(report.ReportError, match="at least one"):
        report.compare_records([])


def test_tables_name_metrics_as_papers_do():
    runs = [run_record(seed=s, ndcg=0.1 * s) for s in (1, 2)]
    text = shown(report.comparison_table(report.compare_records([*runs, run_record("SASRec")])))
    assert "HR@10" in text
    assert "NDCG@10" in text
    assert "0.1500 ± 0.0707" in text
    single = shown(report.metrics_table(runs[0]))
    assert "valid" in single
    assert "0.2000" in single
    without = shown(report.metrics_table({**runs[0], "valid": {}}))
    assert "valid" not in without


def test_markdown_holds_protocol_and_versions():
    runs = [run_record(), run_record("SASRec", ndcg=0.05)]
    text = report.comparison_markdown(report.compare_records(runs, deltas=("HSTU", "SASRec")))
    assert "| HSTU | 1 | 0.2000 | 0.1000 | 3 | 2.0 |" in text
    assert "HSTU minus SASRec, seed by seed: HR@10 +0.1000" in text
    assert "valid_and_test" in text
    assert "torch 2.13" in text


def test_config_table_says_who_chose():
    text = shown(report.config_table([("you", {"epochs": 3}), ("plugin", {"epochs": 9, "learner": "adamw"})]))
    lines = [line.split() for line in text.splitlines()]
    assert ["epochs", "3", "you"] in lines
    assert ["learner", "adamw", "plugin"] in lines
    assert not any("9" in line for line in lines)


@pytest.mark.parametrize(
    "records",
    [
        [run_record()],
        [run_record(seed=1), run_record(seed=2, ndcg=0.2)],
        [run_record(history=[{"epoch": 0, "train_loss": 1.0, "valid_score": None}], best_epoch=None)],
    ],
    ids=["one run", "two seeds", "nothing validated"],
)
def test_learning_curve_is_a_png(tmp_path: Path, records: list[dict[str, object]]):
    path = curves.learning_curve(records, tmp_path / "deep" / "c.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_learning_curve_needs_runs(tmp_path: Path):
    with pytest.raises(ValueError, match="at least one run"):
        curves.learning_curve([], tmp_path / "c.png")


def test_comparisons_name_the_commits_of_their_runs():
    clean, dirty = "0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "01234567-dirty"
    runs = [run_record(seed=1, commit=dirty), run_record(seed=2, commit=clean), run_record(seed=3)]
    comparison = report.compare_records(runs)
    assert comparison["commit"] == f"{clean}, {dirty}"
    last = report.comparison_markdown(comparison).splitlines()[-1]
    assert last.endswith("; commit 0123456789ab, fedcba987654-dirty.")
    without = report.compare_records([run_record()])
    assert "commit" not in without
    assert "commit" not in report.comparison_markdown(without)
