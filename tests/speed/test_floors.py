"""What must be reached beside what was recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.attention.cases import CASES
from benchmarks.attention.contenders import BASELINES
from benchmarks.attention.measure import COLUMNS
from benchmarks.floors import Floor, judge, load
from benchmarks.layer.columns import COLUMNS as LAYER_COLUMNS
from benchmarks.layer.models import CONTENDERS

Row = dict[str, str]


def call(case: str, direction: str = "forward", contender: str = "triton", **changes: object) -> Row:
    base: dict[str, object] = dict.fromkeys(COLUMNS, "")
    base |= {"case": case, "direction": direction, "contender": contender, "mode": "call", "dtype": "bfloat16"}
    base |= {"device": "chip", "taken_at": "t1", "commit": "0123456789abcdef", "matmul_tflops": 800, "p50_ms": 1.0}
    return {name: str(value) for name, value in (base | changes).items()}


def step(contender: str, ms: float, peak: float, **changes: object) -> Row:
    base: dict[str, object] = dict.fromkeys(LAYER_COLUMNS, "")
    base |= {"case": "jagged", "variant": "ultra", "layers": 8, "contender": contender, "taken_at": "t1"}
    base |= {"commit": "abc", "p50_ms": ms, "peak_mib": peak}
    return {name: str(value) for name, value in (base | changes).items()}


def floor(found: list[Floor], what: str, where: str) -> Floor:
    (only,) = [f for f in found if (f.what, f.where) == (what, where)]
    return only


def both(case: str, column: str, forward: float, backward: float, **changes: object) -> list[Row]:
    return [
        call(case, way, **{column: value}, **changes) for way, value in (("forward", forward), ("backward", backward))
    ]


def test_every_name_is_that_of_a_measured_case() -> None:
    wanted = load()
    cases = {case.name: case for case in CASES}
    named = [*wanted["speed"], *wanted["time"], *wanted["cached"], *wanted["host"], wanted["bias"]["without"]]
    named += [*wanted["bias"]["time"], *wanted["bias"]["memory"]]
    named += [case for rival in wanted["ahead"].values() for case in rival]
    assert set(named) <= set(cases)
    assert set(wanted["ahead"]) <= set(BASELINES)
    assert all(cases[name].small for name in wanted["host"])
    assert all(cases[name].cached for name in wanted["cached"])
    lengths = wanted["slope"]["lengths"]
    for series in wanted["slope"]["series"]:
        measured = [case.length for case in CASES if case.series == series]
        assert [min(measured), max(measured)] == lengths
    assert all(entry["rival"] in CONTENDERS and entry["case"] in ("full", "jagged") for entry in wanted["layer"])


def test_nothing_recorded_is_not_measured() -> None:
    floors = judge(load(), [], [])
    assert len(floors) > 30
    assert {f.met for f in floors} == {None}
    assert floors[0].line().startswith("open TFLOP/s, 4x16384x4x128-full: - / - >=")


@pytest.mark.parametrize(
    ("speeds", "met"), [((600, 400), True), ((599, 400), False), ((600, 399), False), ((900, None), None)]
)
def test_speeds(speeds: tuple[float, float | None], met: bool | None) -> None:
    ways = zip(("forward", "backward"), speeds, strict=True)
    rows = [call("4x16384x4x128-full", way, tflops_convention=s) for way, s in ways if s is not None]
    # Neither another contender nor a replay nor another precision counts.
    rows += both("4x16384x4x128-full", "tflops_convention", 999, 999, mode="graph")
    rows += both("4x16384x4x128-full", "tflops_convention", 999, 999, dtype="float16")
    rows += both("4x16384x4x128-full", "tflops_convention", 999, 999, contender="meta-triton")
    found = floor(judge(load(), rows, []), "TFLOP/s", "4x16384x4x128-full")
    assert found.met is met
    assert found.runs == ("0123456789abcdef",) * (1 if met is None else 2)


def test_the_newest_row_counts() -> None:
    rows = both("4x16384-tail", "p50_ms", 0.1, 0.5) + both("4x16384-tail", "p50_ms", 0.21, 0.6, taken_at="t2")
    found = floor(judge(load(), rows, []), "ms", "4x16384-tail")
    assert (found.found, found.met) == ((0.21, 0.6), False)


def test_rivals_are_compared_within_one_run() -> None:
    case = "16x4096x4x128-full"
    rows = both(case, "p50_ms", 2.0, 3.0) + both(case, "p50_ms", 3.0, 3.1, contender="meta-triton")
    # A later run of ours alone, faster on another day, is not held against the rival's older time.
    rows += both(case, "p50_ms", 0.1, 0.1, taken_at="t2")
    found = floor(judge(load(), rows, []), "times as fast as meta-triton", case)
    assert found.found == pytest.approx((1.5, 3.1 / 3.0))
    assert found.met
    rows += both(case, "p50_ms", 2.0, 3.0, taken_at="t3")
    rows += both(case, "p50_ms", 3.0, 3.0, contender="meta-triton", taken_at="t3")
    assert floor(judge(load(), rows, []), "times as fast as meta-triton", case).met is False


@pytest.mark.parametrize(("power", "met"), [(1.0, True), (1.2, False)])
def test_slopes(power: float, met: bool) -> None:
    same = {"group": "semi_local", "series": "semi-local tail"}
    rows = []
    for n in (4096, 8192, 16384, 32768, 65536):
        rows += both(f"4x{n}-tail", "p50_ms", (n / 4096) ** power, (n / 4096) ** 1.0, length=n, **same)
    found = floor(judge(load(), rows, []), "slope", "semi-local tail")
    assert found.found == pytest.approx((power, 1.0))
    assert found.met is met
    # A part of the lengths is no answer.
    assert floor(judge(load(), rows[:-2], []), "slope", "semi-local tail").met is None


def test_the_bias_costs_time_and_memory() -> None:
    plain, biased = "16x4096-bias-none", "16x4096-bias-both"
    rows = both(plain, "p50_ms", 1.0, 2.0, peak_mib=100) + both(biased, "p50_ms", 1.5, 4.2, peak_mib=104)
    floors = judge(load(), rows, [])
    time = floor(floors, "time / without bias", biased)
    assert time.found == pytest.approx((1.5, 2.1))
    assert time.met is False
    memory = floor(floors, "memory / without bias", biased)
    assert memory.found == pytest.approx((1.04, 1.04))
    assert memory.met


def test_cached_targets_and_host_costs() -> None:
    rows = [call("32x4096-1024-candidates", p50_ms=3.1)]
    rows += [call("32x4096-1024-candidates", p50_ms=1.0, contender="triton-cached")]
    # Of a backward counts what ours adds to autograd's own.
    rows += both("8x256x2x64-jagged", "host_us", 59, 150)
    where = "host, us", "8x256x2x64-jagged"
    assert floor(judge(load(), rows, []), *where).met is None
    rows += [
        call("8x256x2x64-jagged", "backward", mode=mode, host_us=us) for mode, us in (("empty", 91), ("added", 61))
    ]
    floors = judge(load(), rows, [])
    assert floor(floors, "full forward / cached", "32x4096-1024-candidates").met
    assert floor(floors, *where).line() == "MISS host, us, 8x256x2x64-jagged: 59 / 61 <= 60 / 60"
    assert floor(floors, *where).note == "the whole backward 150"


def test_layers() -> None:
    steps = [step("eager", 100, 9000), step("triton", 21, 3100), step("sdpa-varlen-compiled", 21, 5000)]
    floors = judge(load(), [], steps)
    assert floor(floors, "step of eager / ours", "jagged").met is False
    assert floor(floors, "memory of a step / eager", "jagged").met is False
    # As fast is not faster.
    assert floor(floors, "step of sdpa-varlen-compiled / ours", "jagged").met is False
    assert floor(floors, "step of eager / ours", "full").met is None
    better = [*steps[:2], step("triton", 20, 2990)]
    floors = judge(load(), [], better)
    assert floor(floors, "step of eager / ours", "jagged").met
    assert floor(floors, "memory of a step / eager", "jagged").met


def test_a_file_of_other_sections_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "floors.yaml"
    path.write_text("speed: {}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected the sections ahead, bias, .*, got speed"):
        load(path)


def test_numbers_that_are_not_there_miss() -> None:
    rows: list[dict[str, Any]] = both("8x256x2x64-jagged", "host_us", 59, 59)
    rows[0]["host_us"] = ""
    assert floor(judge(load(), rows, []), "host, us", "8x256x2x64-jagged").met is False
