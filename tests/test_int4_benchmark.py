"""The benchmark of quantised embeddings, at sizes of a second."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import int4, int4_gather, int4_measure
from hstu_kernels.int4 import unpack_rows

TINY = ["--device", "cpu"]


def test_gather_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--dims", "8", "24", "--table-rows", "100", "--ids", "50", "--copy-bytes", "4096"]
    int4.main(["gather", *TINY, *sizes, "--output", str(tmp_path / "g")])
    record = json.loads((tmp_path / "g.json").read_text())
    assert record["format"] == int4.FORMAT
    assert record["options"]["table_rows"] == 100
    assert record["versions"]["torch"] == torch.__version__
    ways = [(row["way"], row["dim"]) for row in record["rows"] if row["way"] != "fbgemm-tbe"]
    assert ways == [(way, dim) for dim in (8, 24) for way in ("eager", "eager-action-position")]
    for row in record["rows"]:
        assert row["mb"] * 1e6 == pytest.approx(50 * (row["dim"] // 2 + 4 + 2 * row["dim"]))
        assert row["gb_per_s"] == pytest.approx(row["mb"] / row["p50_ms"])
        assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / row["copy_gb_per_s"])
        assert row["share_of_bound"] > row["share_of_copy"]
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    with (tmp_path / "g.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["way"] for line in lines] == [row["way"] for row in record["rows"]]
    assert {"device", "torch", "triton", "fbgemm", "commit", "created"} <= lines[0].keys()
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    assert "% of" in capsys.readouterr().out


def test_host_writes_its_files(tmp_path: Path) -> None:
    sizes = ["--dim", "16", "--table-rows", "64", "--ids", "30", "--requests", "2", "--history", "9", "--layers", "1"]
    int4.main(["host", *TINY, *sizes, "--seconds", "0.01", "--commit", "abc", "--output", str(tmp_path / "h")])
    record = json.loads((tmp_path / "h.json").read_text())
    assert record["commit"] == "abc"
    rows = {row["way"]: row for row in record["rows"]}
    assert list(rows) == ["float16", "mfalcon-float16", "int4", "mfalcon-int4"]
    half, packed = rows["float16"], rows["int4"]
    for row in rows.values():
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["pipelined_ms"] > 0
        assert row["transfer_ms"] > 0
    # 32 and 12 bytes for each distinct row, and 4 for each id.
    distinct = (half["mb"] - packed["mb"]) * 1e6 / 20
    assert 0 < distinct <= 30
    assert packed["mb"] * 1e6 == pytest.approx(12 * distinct + 4 * 30)
    assert (tmp_path / "h.png").exists()


def test_wrong_numbers_are_not_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    exact = int4_gather.gather_rows

    def off(*arguments: object, **options: object) -> torch.Tensor:
        out = exact(*arguments, **options)  # type: ignore[arg-type]
        return out if options.get("backend") == "reference" else out + 1

    monkeypatch.setattr(int4_gather, "gather_rows", off)
    sizes = ["--dims", "8", "--table-rows", "100", "--ids", "50", "--copy-bytes", "4096"]
    with pytest.raises(RuntimeError, match="eager at dim 8: the numbers are not those of the definition"):
        int4.main(["gather", *TINY, *sizes, "--output", str(tmp_path / "g")])
    assert not list(tmp_path.iterdir())


def test_what_was_measured_before_an_error_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    exact = int4_gather._check

    def check(name: str, *arguments: object) -> None:
        exact(name, *arguments)  # type: ignore[arg-type]
        if "action" in name:
            raise RuntimeError("the numbers are not those of the definition")

    monkeypatch.setattr(int4_gather, "_check", check)
    sizes = ["--dims", "8", "--table-rows", "100", "--ids", "50", "--copy-bytes", "4096"]
    with pytest.raises(RuntimeError, match="not those of the definition"):
        int4.main(["gather", *TINY, *sizes, "--output", str(tmp_path / "g")])
    assert [row["way"] for row in json.loads((tmp_path / "g.json").read_text())["rows"]] == ["eager"]


def test_tiles_are_for_gpus() -> None:
    with pytest.raises(SystemExit, match="--tile: expected --device cuda"):
        int4.main(["gather", *TINY, "--tile", "{}"])


def test_nothing_is_measured_when_the_tests_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(int4.subprocess, "run", run)
    with pytest.raises(SystemExit, match="tests failed on this machine: nothing is measured"):
        int4.main(["gather", "--device", "cuda"])
    assert commands[0][-1] == "tests/ops/test_int4_triton.py"
    with pytest.raises(SystemExit, match="tests failed on this machine: nothing is measured"):
        int4.main(["host", "--device", "cuda"])
    assert {Path(word).name for word in commands[1]} >= {
        "test_distinct.py",
        "test_serving_tables.py",
        "test_mfalcon_serving.py",
    }


def test_the_tests_can_be_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(int4, "run_tests", lambda _: pytest.fail("the tests ran"))
    monkeypatch.setattr(int4, "_measured", lambda options, device: iter(()))
    for op in ("gather", "host"):
        int4.main([op, "--device", "cuda", "--skip-tests", "--output", str(tmp_path / op)])


def test_the_tests_that_run_first_exist() -> None:
    for files in int4.TESTS.values():
        for file in files:
            assert (Path(__file__).parents[1] / file).is_file()
            assert "pytest.mark.cuda" in (Path(__file__).parents[1] / file).read_text()


def test_sectors_are_counted_as_a_whole() -> None:
    # 68 bytes from any multiple of 4 on touch three sectors.
    for row in range(64):
        begin, end = 68 * row, 68 * row + 67
        assert int4_measure.sector_bytes(torch.tensor([row]), 68, 68) == 32 * (end // 32 - begin // 32 + 1)
    assert int4_measure.sector_bytes(torch.arange(1000), 68, 68) == 1000 * 96
    assert int4_measure.sector_bytes(torch.tensor([0, 1]), 80, 68) == 2 * 96


def test_the_table_of_the_benchmark_is_a_table() -> None:
    values = unpack_rows(int4_measure.random_table(50, 33, torch.device("cpu")))
    assert float(values.min()) == pytest.approx(-0.08, abs=1e-4)
    assert float(values.max()) == pytest.approx(0.07, abs=1e-3)
    assert values.std() > 0.03
