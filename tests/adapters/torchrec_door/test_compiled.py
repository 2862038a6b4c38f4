"""Packages of AOTInductor: linked with PyTorch's own C++ runtime, and loaded once before they are handed over."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hstu_plugin.adapters.torchrec import compiled
from hstu_plugin.adapters.torchrec.compiled import compile_scorer


class Point(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x) * 2


def program() -> torch.export.ExportedProgram:
    return torch.export.export(Point(), (torch.randn(4, 8),))


def fake_compiler(seen: list[dict[str, Any]]) -> Any:
    def compile_(program: Any, *, package_path: str, inductor_configs: dict[str, Any]) -> str:
        seen.append(inductor_configs | {"path": os.environ.get("LIBRARY_PATH")})
        Path(package_path).write_bytes(b"package")
        return package_path

    return compile_


@pytest.mark.parametrize(
    ("dies", "said"),
    [
        ("import os; os.kill(os.getpid(), 11)", "was ended by SIGSEGV"),
        ("raise SystemExit('create failed')", "ended with exit code 1.*create failed"),
        ("import time; time.sleep(60)", "did not answer in 1 s"),
    ],
    ids=["signal", "error", "hangs"],
)
def test_a_package_that_does_not_load_is_refused_and_the_last_one_stays(
    dies: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fake_compiler([]))
    monkeypatch.setattr(compiled, "_LOAD", dies)
    monkeypatch.setattr(compiled, "_TIMEOUT_S", 1 if "sleep" in dies else 60)
    (tmp_path / "scorer.pt2").write_text("the last one")
    with pytest.raises(RuntimeError, match=f"(?s){said}"):
        compile_scorer(program(), tmp_path / "scorer.pt2")
    assert [file.name for file in tmp_path.iterdir()] == ["scorer.pt2"]
    assert (tmp_path / "scorer.pt2").read_text() == "the last one"


def test_packages_are_linked_with_the_runtime_that_pytorch_has_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fake_compiler(seen))
    monkeypatch.setattr(compiled, "_LOAD", "pass")
    monkeypatch.setenv("LIBRARY_PATH", "/mine")
    assert compile_scorer(program(), tmp_path / "new" / "a.pt2", settings={"max_autotune": True}).is_file()
    runtime = compiled._loaded_runtime()
    assert runtime is not None and runtime.is_file()
    assert seen == [
        {
            "aot_inductor.custom_op_libs": [f":{runtime.name}"],
            "aot_inductor.precompile_headers": False,
            "max_autotune": True,
            "path": f"/mine{os.pathsep}{runtime.parent}",
        }
    ]
    assert os.environ["LIBRARY_PATH"] == "/mine"


def test_the_path_of_a_package_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path: expected a file \*.pt2, got .*scorer.so"):
        compile_scorer(program(), tmp_path / "scorer.so")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles C++, and there is no g++")
def test_a_compiler_that_links_its_own_runtime_makes_packages_that_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "static-g++"
    compiler.write_text('#!/bin/sh\nexec g++ -static-libstdc++ "$@"\n')
    compiler.chmod(0o755)
    # PyTorch reads CXX when it is imported.
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, str(compiler)))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    package = compile_scorer(program(), tmp_path / "point.pt2", settings=quick)
    x = torch.randn(4, 8)
    torch.testing.assert_close(torch._inductor.aoti_load_package(str(package))(x), Point()(x))
