"""``python -m benchmarks.mfalcon`` and ``python -m benchmarks.load_balance`` on a CPU, at tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import load_balance, mfalcon
from benchmarks.ledger import read

TINY = ["--device", "cpu", "--dtype", "float64", "--layers", "3", "--dim", "8", "--heads", "2", "--seconds", "0.001"]
TINY += ["--history", "40", "--history", "0", "--candidates", "5", "--candidates", "9", "--micro-batch-size", "4"]


@pytest.mark.parametrize("model", ["hstu", "ultra"])
def test_run_records_every_way_and_chart_draws(tmp_path: Path, model: str) -> None:
    path, picture = tmp_path / "mfalcon.csv", tmp_path / "mfalcon.png"
    done = CliRunner().invoke(mfalcon.main, ["run", *TINY, "--model", model, "--output", str(path), "--commit", "abc"])
    assert done.exit_code == 0, done.output
    rows = read(path, mfalcon.COLUMNS)
    assert len(rows) == 2 * 2 * 6 * 2
    assert {row["way"] for row in rows} == {"naive", "full", "prefill", "mfalcon", "cached-eager", "cached"}
    for row in rows:
        assert (row["commit"], row["model"]) == ("abc", model)
        assert 0 < float(row["p50_ms"]) <= float(row["p99_ms"])
        assert float(row["candidates_per_s"]) > 0
        assert (row["relative_error"] == "") if row["way"] == "prefill" else (float(row["relative_error"]) < 1e-10)
    work = {row["way"]: float(row["gflops"]) for row in rows if (row["history"], row["candidates"]) == ("40", "9")}
    assert work["naive"] > 2 * work["mfalcon"]
    assert work["cached"] < work["mfalcon"] == work["full"]
    assert work["prefill"] + work["cached"] == pytest.approx(work["full"], rel=1e-5)
    drawn = CliRunner().invoke(
        mfalcon.main, ["chart", "--input", str(path), "--output", str(picture), "--model", model, "--transfers"]
    )
    assert drawn.exit_code == 0, drawn.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_wrong_scores_are_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mfalcon.csv"
    original = mfalcon.MFalconRanker.score
    monkeypatch.setattr(mfalcon.MFalconRanker, "score", lambda *given: original(*given) + 1)
    done = CliRunner().invoke(mfalcon.main, ["run", *TINY, "--output", str(path)])
    assert done.exit_code == 1
    assert "mfalcon: scores are off by" in done.output
    assert not path.exists()


def test_a_chart_of_nothing_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(mfalcon.main, ["chart", "--input", str(tmp_path / "none.csv")])
    assert done.exit_code == 1
    assert "run the benchmark first" in done.output


def test_simulated_ranks(tmp_path: Path) -> None:
    path = tmp_path / "balance.json"
    words = ["--ranks", "4", "--steps", "40", "--warmup-steps", "10", "--period", "10", "--batch-size", "16"]
    done = CliRunner().invoke(load_balance.main, [*words, "--output", str(path)])
    assert done.exit_code == 0, done.output
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["settings"]["ranks"] == 4
    assert report["plain"]["mean"] > 1.1
    assert report["balanced"]["mean"] < 1.03
    assert report["balanced"]["mean_load"] == pytest.approx(report["plain"]["mean_load"], rel=0.1)
    assert report["versions"]["torch"] == torch.__version__
