"""What the project promises to an installer: extras, commands, files shipped, pins that agree with each other."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from setuptools import find_packages

from hstu_plugin import _versions

ROOT = Path(__file__).parents[1]


def _toml(path: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / path).read_text(encoding="utf-8"))


PYPROJECT = _toml("pyproject.toml")
PROJECT = PYPROJECT["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
CONSTRAINTS = dict(
    re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
)


def _requirement(extra: str, name: str) -> str:
    return next(r for r in EXTRAS[extra] if re.match(r"[\w-]+", r)[0] == name)


def _packages() -> set[str]:
    found = PYPROJECT["tool"]["setuptools"]["packages"]["find"]
    return {name for where in found["where"] for name in find_packages(str(ROOT / where), include=found["include"])}


def test_extras() -> None:
    assert {"recbole", "ranking", "torchrec", "torchrec-cpu", "torchx", "dev", "all"} == EXTRAS.keys()
    assert not any(
        "ray" in re.match(r"[\w-]+", r)[0].split("-") for requirements in EXTRAS.values() for r in requirements
    )


def test_extras_bring_what_their_command_imports() -> None:
    # hstu-torchrec-data: click for its options, pandas for the tables, pyarrow for the files.
    for extra in ("torchrec", "torchrec-cpu"):
        for name in ("click", "pandas", "pyarrow"):
            assert _requirement(extra, name) == _requirement("ranking", name)


def test_every_package_is_found() -> None:
    packages = _packages()
    assert {"hstu_plugin", "hstu_kernels", "recbole_configs", "ranking_configs", "torchx_components"} <= packages
    # A folder of modules without __init__.py would be left out of the wheel in silence.
    for root, top in (
        ("", "hstu_plugin"),
        ("kernels", "hstu_kernels"),
        ("", "recbole_configs"),
        ("", "torchx_components"),
        ("", "ranking_configs"),
    ):
        folders = {path.parent for path in (ROOT / root / top).rglob("*.py")}
        names = {".".join(folder.relative_to(ROOT / root).parts) for folder in folders}
        assert names <= packages


def test_no_package_is_called_kernels() -> None:
    # It would shadow the distribution of that name for everything run from the repository root.
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("package", ["hstu_plugin", "hstu_kernels"])
def test_packages_are_marked_as_typed(package: str) -> None:
    root = ROOT / "kernels" if package == "hstu_kernels" else ROOT
    assert (root / package / "py.typed").is_file()


@pytest.mark.parametrize("command", PROJECT["scripts"])
def test_commands_exist(command: str) -> None:
    module, _, function = PROJECT["scripts"][command].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_torch_hook_exists() -> None:
    (target,) = PROJECT["entry-points"]["torch.backends"].values()
    module, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_python_and_torch_ranges_are_those_of_the_check() -> None:
    low, high = (".".join(map(str, v)) for v in (_versions.PYTHON_MIN, _versions.PYTHON_BELOW))
    assert PROJECT["requires-python"] == f">={low},<{high}"
    (torch,) = (r for r in PROJECT["dependencies"] if r.startswith("torch"))
    newest = max(match.torch for match in _versions.MATCHES)
    assert torch == f"torch>={_text(_versions.TORCH_MIN)},<{newest[0]}.{newest[1] + 1}"


def test_constraints_extras_and_shim_name_the_tested_row() -> None:
    row = _versions.TESTED
    assert CONSTRAINTS["torch"].startswith(_text(row.torch))
    for extra in ("torchrec", "torchrec-cpu"):
        assert _requirement(extra, "torch") == f"torch=={_text(row.torch)}.*"
        assert _requirement(extra, "torchrec") == f"torchrec=={CONSTRAINTS['torchrec']}"
    assert CONSTRAINTS["torchrec"].startswith(_text(row.torchrec))
    assert _requirement("torchrec", "fbgemm-gpu") == f"fbgemm-gpu=={_text(row.fbgemm)}.*"

    shim = _toml("packaging/fbgemm-gpu-cpu-shim/pyproject.toml")["project"]
    assert shim["name"] == "fbgemm-gpu"
    assert f"fbgemm-gpu=={shim['version']}" == _requirement("torchrec-cpu", "fbgemm-gpu")
    assert shim["dependencies"] == [f"fbgemm-gpu-cpu=={CONSTRAINTS['fbgemm-gpu-cpu']}"]
    assert shim["version"] == f"{CONSTRAINTS['fbgemm-gpu-cpu']}+cpu"


def test_what_is_built_holds_the_code_and_no_data(tmp_path: Path) -> None:
    tree, out = tmp_path / "tree", tmp_path / "out"
    out.mkdir()
    for name in ("hstu_plugin", "kernels", "torchx_components", "recbole_configs", "ranking_configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    for folder in (tree / "recbole_configs", tree / "dataset" / "ml-1m"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ml-1m.inter").write_text("user_id:token\titem_id:token\n1\t2\n", encoding="utf-8")
    build = f"from setuptools import build_meta as b; b.build_sdist({str(out)!r}); b.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)

    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    assert not [name for name in in_wheel | in_sdist if name.endswith(".inter")]
    assert {"LICENSE", "NOTICE", "kernels/hstu_kernels/__init__.py"} <= in_sdist
    for root, top in (
        ("", "hstu_plugin"),
        ("kernels", "hstu_kernels"),
        ("", "recbole_configs"),
        ("", "torchx_components"),
        ("", "ranking_configs"),
    ):
        wanted = {path for pattern in ("*.py", "*.yaml", "py.typed") for path in (ROOT / root / top).rglob(pattern)}
        assert {path.relative_to(ROOT / root).as_posix() for path in wanted} <= in_wheel


def _text(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"
