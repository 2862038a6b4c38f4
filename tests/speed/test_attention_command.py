"""``python -m benchmarks.attention`` on a CPU, and its report."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click import ClickException
from click.testing import CliRunner, Result

from benchmarks import ledger
from benchmarks.attention import __main__ as command
from benchmarks.attention import contenders
from benchmarks.attention.cases import choose
from benchmarks.attention.charts import truncated
from benchmarks.attention.compare import length_slopes, newest
from benchmarks.attention.measure import COLUMNS
from benchmarks.attention.report import markdown, write_report
from benchmarks.ledger import LedgerError, append, read
from benchmarks.timing import Spread, host_microseconds, time_calls

CPU = ["--device", "cpu", "--tiny", "--seconds", "0.001"]


def invoke(*words: str) -> Result:
    return CliRunner().invoke(command.main, list(words))


def recorded(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_run_checks_times_and_appends(tmp_path: Path) -> None:
    path = tmp_path / "attention.csv"
    done = invoke("run", *CPU, "--group", "targets", "--group", "small", "--output", str(path))
    assert done.exit_code == 0, done.output
    rows = recorded(path)
    assert list(rows[0]) == list(COLUMNS)
    found = {(row["contender"], row["direction"], row["mode"]) for row in rows if row["group"] == "targets"}
    assert found == {
        ("eager", "forward", "call"),
        ("eager", "backward", "call"),
        ("eager-cached", "forward", "call"),
    }
    assert {"unplanned", "empty", "added"} <= {row["mode"] for row in rows if row["group"] == "small"}
    for row in rows:
        if row["mode"] in ("empty", "added"):
            assert (row["direction"], row["p50_ms"]) == ("backward", "")
        else:
            assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["host_us"]) > 0
        assert row["commit"] and row["torch"] == torch.__version__ and row["taken_at"].endswith("Z")
        assert 0 < float(row["relative_error"]) < 1e-2
    again = invoke("run", *CPU, "--case", "8x256", "--direction", "forward", "--output", str(path), "--commit", "abc")
    assert again.exit_code == 0, again.output
    assert recorded(path)[: len(rows)] == rows
    assert [row["commit"] for row in recorded(path)[len(rows) :]] == ["abc", "abc"]


def test_a_dry_run_records_nothing(tmp_path: Path) -> None:
    path = tmp_path / "attention.csv"
    assert invoke("run", *CPU, "--case", "8x256", "--dry-run", "--output", str(path)).exit_code == 0
    assert not path.exists()


@pytest.mark.parametrize("keep_going", [False, True])
def test_nothing_is_recorded_of_a_wrong_kernel(
    keep_going: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = contenders.ours("eager")

    def wrong(batch: contenders.Batch) -> contenders.Bound:
        bound = right(batch)
        return replace(bound, name="wrong", forward=lambda *leaves: bound.forward(*leaves) * 1.1)

    monkeypatch.setattr(command, "ours", lambda _: wrong)
    monkeypatch.setattr(command, "ours_cached", lambda _: right)
    path = tmp_path / "attention.csv"
    words = ["run", *CPU, "--case", "8x256", "--output", str(path)]
    done = invoke(*words, *(["--keep-going"] if keep_going else []))
    assert done.exit_code == 1
    assert "WRONG" in done.output
    assert path.exists() == keep_going
    if keep_going:
        assert {row["contender"] for row in recorded(path)} == {"eager"}


def test_baselines_that_run_here(tmp_path: Path) -> None:
    path = tmp_path / "attention.csv"
    words = ["--contender", "sdpa-flash", "--contender", "meta-triton", "--case", "16x4096x4x128-full"]
    done = invoke("baselines", *CPU, *words, "--output", str(path))
    assert done.exit_code == 0, done.output
    assert "not measured: meta-triton" in done.output
    rows = recorded(path)
    assert {row["contender"] for row in rows} == {"sdpa-flash"}
    # Another function than ours: nothing to compare it with.
    assert {row["relative_error"] for row in rows} == {""}


def test_rivals_are_measured_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "attention.csv"
    words = ["run", *CPU, "--case", "16x4096x4x128-full", "--direction", "forward", "--output", str(path)]
    against = ["--against", "sdpa-flash", "--against", "meta-triton"]
    assert invoke(*words, *against).exit_code == 0
    rows = recorded(path)
    assert [row["contender"] for row in rows] == ["eager", "sdpa-flash"]
    assert len({row["taken_at"] for row in rows}) == 1

    # A rival that is wrong is named and not timed; ours is.
    def wrong(batch: contenders.Batch) -> contenders.Bound:
        bound = contenders.ours("eager")(batch)
        return replace(bound, name="meta-triton", forward=lambda *leaves: bound.forward(*leaves) * 1.1)

    monkeypatch.setitem(command.BASELINES, "meta-triton", wrong)
    done = invoke(*words, *against)
    assert done.exit_code == 1
    assert "1 wrong: meta-triton" in done.output
    assert [row["contender"] for row in recorded(path)[2:]] == ["eager", "sdpa-flash"]


def test_check_times_and_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["check", "--device", "cpu", "--tiny", "--group", "jagged"]
    done = invoke(*words)
    assert done.exit_code == 0, done.output
    assert done.output.count("right: eager, tiny-") == 4
    assert "TFLOP/s" not in done.output
    right = contenders.ours("eager")

    def wrong(batch: contenders.Batch) -> contenders.Bound:
        bound = right(batch)
        return replace(bound, forward=lambda *leaves: bound.forward(*leaves) * 1.1)

    monkeypatch.setattr(command, "ours", lambda _: wrong)
    done = invoke(*words)
    assert done.exit_code == 1
    assert "4 wrong: eager" in done.output


def test_errors_name_what_to_do(tmp_path: Path) -> None:
    assert "no case matches" in invoke("run", *CPU, "--case", "nothing").output
    nothing = invoke("report", "--input", str(tmp_path / "none.csv"), "--output", str(tmp_path))
    assert nothing.exit_code == 1
    assert "run the benchmark first" in nothing.output
    foreign = tmp_path / "foreign.csv"
    foreign.write_text("a,b\n1,2\n", encoding="utf-8")
    assert "expected the columns" in invoke("report", "--input", str(foreign), "--output", str(tmp_path)).output
    with pytest.raises(LedgerError, match="expected the columns a, c, got a, b"):
        append(foreign, ["a", "c"], [{"a": 1, "c": 2}])


def row(**changes: object) -> dict[str, str]:
    base: dict[str, object] = dict.fromkeys(COLUMNS, "")
    base |= {"device": "chip", "dtype": "bfloat16", "group": "length", "case": "a", "series": "full", "length": 4096}
    base |= {"batch": 4, "qk_dim": 128, "contender": "triton", "direction": "forward", "mode": "call"}
    base |= {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "tflops_convention": 500.0, "matmul_tflops": 793.0}
    base |= {"copy_tbs": 3.02, "commit": "0123456789abcdef", "bias": "none", "host_us": 40.0, "peak_mib": 100.0}
    base |= {"taken_at": "2026-01-01T00:00:00Z"}
    return {name: str(value) for name, value in (base | changes).items()}


def test_slopes_are_those_of_powers() -> None:
    rows = []
    for length in (4096, 8192, 16384, 65536):
        rows.append(row(case=f"full-{length}", length=length, p50_ms=length**2))
        rows.append(row(case=f"p-{length}", length=length, group="semi_local", series="semi-local tail", p50_ms=length))
    slopes = length_slopes(rows)
    assert slopes["triton", "full", "forward"] == (pytest.approx(2.0), 4096, 65536)
    assert slopes["triton", "semi-local tail", "forward"] == (pytest.approx(1.0), 4096, 65536)
    assert length_slopes(rows[:4]) == {}


def test_the_newest_row_counts_and_ratios_are_worked_out() -> None:
    rows = [
        row(group="biased", case="none", p50_ms=9.0),
        row(group="biased", case="none", p50_ms=2.0),
        row(group="biased", case="both", bias="both", p50_ms=3.0, peak_mib=104.0),
        row(group="targets", case="t", p50_ms=8.0),
        row(group="targets", case="t", p50_ms=2.0, contender="triton-cached"),
        row(group="small", case="s", p50_ms=0.05),
        row(group="small", case="s", p50_ms=0.02, mode="graph"),
        row(group="small", case="s", p50_ms=0.2, direction="backward", host_us=150.0),
        row(group="small", case="s", p50_ms="", direction="backward", mode="empty", host_us=90.0),
        row(group="small", case="s", p50_ms="", direction="backward", mode="added", host_us=50.0),
    ]
    text = markdown(newest(rows))
    assert "| triton | both | forward | 1.50 | 1.040 |" in text
    assert "| t | triton-cached | 8.000 | 2.000 | 4.0 |" in text
    assert "| s | triton | forward | 50.0 | 20.0 |  | 40.0 |  |  |" in text
    assert "| s | triton | backward | 200.0 |  |  | 150.0 | 90.0 | 50.0 |" in text
    assert "9 [" not in text


def test_the_report_writes_tables_and_charts_of_one_device(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    lengths = (4096, 8192, 16384)
    rows = [row(case=f"{n}-{d}", length=n, direction=d) for n in lengths for d in ("forward", "backward")]
    append(path, COLUMNS, [row(device="other", case="foreign"), *rows])
    assert len(read(path, COLUMNS)) == 7
    written, floors = write_report(path, tmp_path / "layer.csv", tmp_path / "report")
    assert {floor.met for floor in floors} == {None}
    assert [file.name for file in written] == ["attention.md", "attention-tflops.png", "attention-time.png"]
    assert all(file.stat().st_size > 500 for file in written)
    text = written[0].read_text(encoding="utf-8")
    assert "foreign" not in text
    assert "bf16 product 793 to 793 TFLOP/s" in text
    assert "![attention-time](attention-time.png)" in text
    with pytest.raises(LedgerError, match="no rows of a device named 'none'"):
        write_report(path, tmp_path / "layer.csv", tmp_path, "none")


def test_the_report_prints_what_must_be_reached(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    long = {"group": "causal", "case": "4x16384x4x128-full"}
    speeds = [row(**long, tflops_convention=601.0), row(**long, direction="backward", tflops_convention=399.0)]
    short = {"group": "causal", "case": "32x1024x4x128-full"}
    speeds += [row(**short, tflops_convention=371.0), row(**short, direction="backward", tflops_convention=251.0)]
    append(path, COLUMNS, speeds)
    done = invoke("report", "--input", str(path), "--layers", str(tmp_path / "none.csv"), "--output", str(tmp_path))
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "MISS TFLOP/s, 4x16384x4x128-full: 601 / 399 >= 600 / 400"
    assert lines[1].startswith("open ")
    assert "met  TFLOP/s, 32x1024x4x128-full: 371 / 251 >= 370 / 250" in lines
    assert any(line.startswith("1 met, 1 missed, ") for line in lines)
    text = (tmp_path / "attention.md").read_text(encoding="utf-8")
    assert "| TFLOP/s | 4x16384x4x128-full | >= 600 / 400 | 601 / 399 | **no** | 75.8 / 50.3 % of the product" in text


def test_a_row_is_complete_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    append(path, ["a", "b"], [{"a": 0.123456789, "b": float("nan")}, {"a": None}])
    assert path.read_text(encoding="utf-8") == "a,b\n0.123457,\n,\n"
    assert ledger.RESULTS.name == "results"


def test_timing_takes_turns_and_orders_its_quantiles() -> None:
    calls: list[int] = []
    spread = time_calls([lambda: calls.append(0), lambda: calls.append(1)], torch.device("cpu"), seconds=0.0)
    assert spread.samples == 11
    assert 0 <= spread.p20 <= spread.p50 <= spread.p80
    assert set(calls) == {0, 1}
    assert host_microseconds([lambda: None], torch.device("cpu")) < 1e4
    assert Spread.of([float(i) for i in range(11)]) == Spread(2.0, 5.0, 8.0, 11)


def test_a_rival_that_loses_the_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    case = choose(("causal",), None)[0]
    command._insist_on_the_device(torch.device("cpu"), "meta-triton", case)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(ClickException, match=f"meta-triton lost the device at {case.name}.*without --against"):
        command._insist_on_the_device(torch.device("cuda"), "meta-triton", case)


def test_the_chart_has_attention_over_the_latest_quarter() -> None:
    """The same call as full attention at a quarter of the length; recorded rows of it come first."""

    def row(length: int, series: str = "full") -> dict[str, str]:
        kind = {"contender": "triton", "direction": "forward", "series": series}
        return {**kind, "length": str(length), "p50_ms": str(length / 1000)}

    found = truncated([row(1024), row(4096), row(16384), row(4096, "semi-local tail")])
    assert [(r["series"], r["length"], r["p50_ms"]) for r in found] == [
        ("truncated", "4096", "1.024"),
        ("truncated", "16384", "4.096"),
    ]
    assert not truncated([row(1024), row(4096), row(4096, "truncated")])
