"""``python -m benchmarks.cost`` on a CPU, at tiny sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import cost
from benchmarks.cost_report import COLUMNS
from benchmarks.ledger import read
from hstu_kernels import JaggedLayout
from hstu_plugin.flops import model_flops, training_flops

TINY = ["--device", "cpu", "--backend", "eager", "--events", "40", "--candidates", "5", "--targets", "3"]
TINY += ["--layers", "3", "--dim", "8", "--heads", "2", "--window", "4", "--truncate-after", "1", "--truncate-to", "9"]
TINY += ["--batch-size", "1", "--requests", "2", "--seconds", "0.001", "--commit", "abc"]


@pytest.fixture(autouse=True)
def short_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_CHECKED", (30, 4))


def test_run_and_report(tmp_path: Path) -> None:
    path = tmp_path / "cost.csv"
    done = CliRunner().invoke(cost.main, ["run", *TINY, "--output", str(path)])
    assert done.exit_code == 0, done.output
    rows = {(r["phase"], r["model"], r["tokens"]): r for r in read(path, COLUMNS)}
    assert len(rows) == 2 * 6
    for phase in ("training", "scoring"):
        work = {key[1:]: float(row["gflops"]) for key, row in rows.items() if key[0] == phase}
        assert work["ultra", "1"] < work["semi-local", "1"] < work["hstu", "1"] < work["hstu", "2"] / 2
        assert work["hstu", "1"] == work["hstu-no-bias", "1"]
    done = CliRunner().invoke(cost.main, ["report", "--input", str(path), "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "cost.md").read_text(encoding="utf-8")
    assert text.count("| ULTRA-HSTU | 1 |") == 2 and "-59.7 %" in text and "-90.7 %" in text
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_scores_are_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cost.csv"
    monkeypatch.setattr(cost, "_TOLERANCE", 1e-9)
    done = CliRunner().invoke(cost.main, ["run", *TINY, "--model", "ultra", "--output", str(path)])
    assert done.exit_code == 1
    assert "ultra: scores are off by" in done.output
    assert not path.exists()


def test_check_only_records_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cost.csv"
    done = CliRunner().invoke(cost.main, ["run", *TINY, "--model", "ultra", "--check-only", "--output", str(path)])
    assert done.exit_code == 0, done.output
    assert "PASS ultra" in done.output and not path.exists()


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(cost.main, ["report", "--input", str(tmp_path / "none.csv")])
    assert done.exit_code == 1
    assert "run the benchmark first" in done.output


def test_the_operations_in_the_docs_are_counted() -> None:
    text = (Path(cost.__file__).parents[1] / "docs/ultra-hstu.md").read_text(encoding="utf-8")
    rows = {"18 of 18 (semi-local only)": (0, 0), "6, 1024": (6, 1024), "4, 1024": (4, 1024), "3, 512": (3, 512)}
    shape = {"layers": 18, "dim": 512, "heads": 4, "window": 256, "backend": "eager"}
    for name, truncation in rows.items():
        saved = []
        for behind, flops in ((64, training_flops), (1024, model_flops)):
            layout = JaggedLayout.from_lengths(torch.tensor([16384 + behind]), num_targets=torch.tensor([behind]))
            plain, ours = (
                flops(cost.make_config(model, 16384, truncation=truncation, **shape), layout).total.sum()
                for model in ("hstu", "ultra")
            )
            saved.append(f"-{100 * (1 - float(ours / plain)):.1f} %")
        assert f"| {name} | {saved[0]} | {saved[1]} |" in text
