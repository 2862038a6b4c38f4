"""Taking stages out of kernels: every edit still fits the source, what comes out is a kernel, and the report."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import hstu_kernels
from benchmarks.ledger import LedgerError, append
from benchmarks.stages import __main__ as command
from benchmarks.stages.measure import COLUMNS
from benchmarks.stages.patching import PACKAGE, WHOLE, Copy, Edit, Stage, StalePatch, imported_copy, patched_source
from benchmarks.stages.report import newest_runs, write_report
from benchmarks.stages.studies import HOST_CASES, STUDIES, Study, all_stages
from hstu_kernels.attention.triton import interpreting
from tests.speed.stage_kernels import lowered

triton = pytest.importorskip("triton", reason="Triton is not installed")
hopper = pytest.importorskip("hstu_kernels.attention.triton.hopper_launch", reason="Triton is not installed")
STAGES = all_stages()
FOLDER = Path(hstu_kernels.__file__).parent / "attention" / "triton"


def study_of(name: str) -> Study:
    return next(study for study in STUDIES if name.startswith(f"{study.name}: "))


def fingerprint() -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in FOLDER.glob("*.py")}


@pytest.fixture(autouse=True)
def shipped_untouched() -> Iterator[None]:
    before = fingerprint()
    yield
    assert fingerprint() == before


@pytest.mark.parametrize("name", list(STAGES))
def test_every_stage_can_be_taken_out(name: str, tmp_path: Path) -> None:
    """The edits fit, and the copy is a module of its own whose kernel the compiler takes."""
    stage, study = STAGES[name], study_of(name)
    with imported_copy(stage, tmp_path) as copy:
        for module in {edit.module for edit in stage.edits}:
            if module.startswith("hopper") and not hopper.available():
                continue
            found = copy.module(module)
            assert found.__name__ == f"{copy.name}.{module}" and str(tmp_path) in str(found.__file__)
        if interpreting():
            pytest.skip("the interpreter compiles nothing")
        if not hopper.available():
            pytest.skip("the compiler is asked in the Triton for which the kernels for Hopper are written")
        for kernel in lowered(study, copy, torch.bfloat16):
            assert "tt.func" in kernel


def test_what_is_taken_out_is_gone_from_the_kernel(tmp_path: Path) -> None:
    if interpreting() or not hopper.available():
        pytest.skip("the compiler is asked in the Triton for which the kernels for Hopper are written")
    study = next(study for study in STUDIES if study.case == "16x4096x4x128-full")
    stages = {stage.name: stage for stage in study.stages}
    fetching = next(stage for name, stage in stages.items() if name.startswith("fetching"))

    def text(stage: Stage, folder: str) -> str:
        with imported_copy(stage, tmp_path / folder) as copy:
            return "".join(lowered(study, copy, torch.bfloat16))

    whole = text(WHOLE, "whole")
    assert whole.count("async_tma_copy_global_to_local") >= 4 and "tanh.approx" in whole
    assert "async_tma_copy_global_to_local" not in text(fetching, "fetching")
    assert "tanh.approx" not in text(stages["SiLU"], "silu")
    first = text(stages["first product"], "first")
    assert 0 < first.count("warp_group_dot ") < whole.count("warp_group_dot ")
    copied = "async_tma_copy_local_to_global"
    assert copied in whole and copied not in text(stages["stores by the copy engine"], "stores")


def test_a_copy_with_all_stages_is_the_shipped_source(tmp_path: Path) -> None:
    with imported_copy(WHOLE, tmp_path) as copy:
        written = tmp_path / copy.name
        for path in FOLDER.glob("*.py"):
            again = (written / path.name).read_text(encoding="utf-8").replace(copy.name, PACKAGE)
            assert again == path.read_text(encoding="utf-8")
        launch = copy.module("launch")
        assert launch.triton_forward is not Copy(PACKAGE).module("launch").triton_forward
        name = launch.__name__
    import sys

    assert name not in sys.modules and copy.name not in sys.modules


@pytest.mark.parametrize(("old", "count"), [("no such text", 1), ("BLOCK_M", 1)])
def test_an_edit_that_does_not_fit_is_refused(old: str, count: int) -> None:
    edit = Edit(module="forward", old=old, new="", count=count)
    source = (FOLDER / "forward.py").read_text(encoding="utf-8")
    with pytest.raises(StalePatch, match=rf"forward: expected {count} times '{old}', found"):
        patched_source(source, [edit], "forward")
    assert patched_source(source, [edit], "primitives") == source
    lenient = replace(edit, optional=True)
    if source.count(old):
        with pytest.raises(StalePatch):
            patched_source(source, [lenient], "forward")
    else:
        assert patched_source(source, [lenient], "forward") == source


def test_an_edit_of_a_missing_module_is_refused(tmp_path: Path) -> None:
    stage = Stage(name="gone", edits=(Edit(module="nowhere", old="a", new="b"),))
    with pytest.raises(StalePatch, match="expected a module nowhere"), imported_copy(stage, tmp_path):
        pass


def test_names_and_cases_are_there() -> None:
    for study in STUDIES:
        names = [stage.name for stage in study.stages]
        assert len(set(names)) == len(names) and WHOLE.name not in names
        assert study.chosen().name == study.case
        for stage in study.stages:
            assert stage.needed or any(not edit.optional for edit in stage.edits)
    from benchmarks.attention.cases import CASES

    assert set(HOST_CASES) <= {case.name for case in CASES}


def row(**values: Any) -> dict[str, object]:
    about = {
        "taken_at": "1",
        "commit": "abc",
        "device": "H100",
        "torch": "2",
        "triton": "3",
        "python": "3",
        "cuda": "13",
    }
    measured = {"case": "one", "direction": "forward", "kernel": "k", "stage": "whole", "kind": "whole"}
    times = {"p20_ms": 0.9, "p50_ms": 1.0, "p80_ms": 1.1, "samples": 11, "share": 1.0}
    return {**about, **measured, **times, **values}


def test_the_report_takes_the_newest_run_of_each_study(tmp_path: Path) -> None:
    path = tmp_path / "stages.csv"
    old = [row(), row(stage="stores", kind="without", p50_ms=0.5, share=0.5)]
    new = [row(taken_at="2"), row(taken_at="2", stage="SiLU", kind="without", p50_ms=0.8, share=0.2)]
    new += [row(taken_at="2", stage="dq", kind="alone", p50_ms=0.4, share=0.4)]
    host = [row(kernel="host", p50_ms=0.1), row(kernel="host", stage="  launch", kind="part", p50_ms=0.02, share=0.2)]
    append(path, COLUMNS, [*old, *new, *host])
    written = write_report(path, tmp_path / "report")
    assert [file.name for file in written] == ["stages.md", "stages.png"]
    text = written[0].read_text(encoding="utf-8")
    assert "| without SiLU | 0.8 [0.9, 1.1] | 20.0 % |" in text and "| dq alone |" in text and "stores" not in text
    assert "| &nbsp;&nbsp;&nbsp;&nbsp;launch | 20.0 |" in text and "wrong on purpose" in text
    assert written[1].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(LedgerError, match="no rows of a device"):
        write_report(path, tmp_path, "B200")


def test_runs_are_told_apart_by_their_time() -> None:
    rows = [{k: str(v) for k, v in row(taken_at=t).items()} for t in ("1", "1", "2")]
    assert [len(found) for found in newest_runs(rows).values()] == [1]


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(command.main, ["run", "--dry-run"])
    assert done.exit_code == 1 and "expected a CUDA device" in done.output
    done = CliRunner().invoke(command.main, ["compile", "--slice", "x"])
    assert done.exit_code == 1 and "expected I/N" in done.output
    done = CliRunner().invoke(command.main, ["run", "--study", "nothing"])
    assert done.exit_code == 1
