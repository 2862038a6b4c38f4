"""The version check: what must be refused, what must be let through, and what it says."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from hstu_plugin import _versions
from hstu_plugin._versions import check_versions, runtime_versions, source_commit, version_table

ROOT = Path(__file__).parents[1]

GOOD_SETS = {
    "nothing known": {},
    "core alone": {"python": "3.11.7", "torch": "2.13.0+cpu"},
    "oldest": {"python": "3.11.0", "torch": "2.6.0", "triton": "3.2.0"},
    "a torch newer than the table": {"python": "3.12.1", "torch": "2.15.0", "triton": "3.9.0"},
    "a Triton newer than torch's": {"torch": "2.13.0", "triton": "3.9.0"},
    "any Triton beside a CPU build": {"torch": "2.13.0+cpu", "triton": "3.6.0"},
    "the CUDA stack": {"torch": "2.13.0", "triton": "3.7.1", "fbgemm-gpu": "1.8.0", "torchrec": "1.8.0"},
    "the CPU stack": {
        "torch": "2.13.0+cpu",
        "fbgemm-gpu": "1.8.0+cpu",
        "fbgemm-gpu-cpu": "1.8.0",
        "torchrec": "1.8.0",
    },
    "an older matched stack": {"torch": "2.11.0", "triton": "3.6.0", "fbgemm-gpu": "1.6.0", "torchrec": "1.6.1"},
    "a build of one's own": {"torch": "unknown", "fbgemm-gpu": "1.8.0"},
    "RecBole": {"torch": "2.13.0", "recbole": "1.2.1", "pandas": "2.3.3"},
    "pandas 3 without RecBole": {"torch": "2.13.0", "pandas": "3.1.1"},
}

# name: (installed, what the message must name)
BAD_SETS = {
    "Python too old": ({"python": "3.10.14"}, ["Python 3.10.14", ">= 3.11, < 3.13"]),
    "Python too new": ({"python": "3.13.0"}, ["Python 3.13.0", "python3.12 -m venv"]),
    "torch too old": ({"torch": "2.5.1"}, ["torch 2.5.1", "torch >= 2.6"]),
    "Triton older than torch's": ({"torch": "2.13.0", "triton": "3.2.0"}, ["triton 3.2.0", "triton==3.7.*"]),
    "FBGEMM of the next torch": (
        {"torch": "2.13.0", "fbgemm-gpu": "1.9.0"},
        ["torch 2.13.0 with fbgemm-gpu 1.9.0", "fbgemm-gpu 1.8.*", "make install-torchrec"],
    ),
    "CPU FBGEMM of the next torch": (
        {"torch": "2.13.0+cpu", "fbgemm-gpu-cpu": "1.9.0"},
        ["torch 2.13.0+cpu with fbgemm-gpu-cpu 1.9.0", "fbgemm-gpu-cpu 1.8.*"],
    ),
    "TorchRec of the next torch": (
        {"torch": "2.13.0", "fbgemm-gpu": "1.8.0", "torchrec": "1.9.2"},
        ["torch 2.13.0 with torchrec 1.9.2", "torchrec 1.8.*"],
    ),
    "FBGEMM beside a torch without one": (
        {"torch": "2.15.0", "fbgemm-gpu": "1.8.0"},
        ["no fbgemm-gpu that we know of", "torch 2.13.* with fbgemm-gpu 1.8.*"],
    ),
    "both FBGEMM builds": (
        {"torch": "2.13.0", "fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"},
        ["fbgemm-gpu 1.8.0 beside fbgemm-gpu-cpu 1.8.0", "pip uninstall"],
    ),
    "RecBole with pandas 3": ({"recbole": "1.2.1", "pandas": "3.1.1"}, ["pandas 3.1.1", "pandas < 3.0"]),
}


@pytest.mark.parametrize("installed", GOOD_SETS.values(), ids=GOOD_SETS)
def test_good_sets_pass(installed: dict[str, str]) -> None:
    check_versions(installed)


@pytest.mark.parametrize(("installed", "said"), BAD_SETS.values(), ids=BAD_SETS)
def test_bad_sets_are_named(installed: dict[str, str], said: list[str]) -> None:
    with pytest.raises(ImportError) as raised:
        check_versions(installed)
    message = str(raised.value)
    assert all(part in message for part in [*said, "supported:", "to repair:"]), message


def test_a_door_is_checked_only_when_asked_for() -> None:
    installed = {"torch": "2.13.0", "fbgemm-gpu": "1.9.0", "recbole": "1.2.1", "pandas": "3.1.1"}
    check_versions(installed, doors=())
    with pytest.raises(ImportError, match="pandas"):
        check_versions(installed, doors=["recbole"])
    with pytest.raises(ImportError, match="fbgemm-gpu"):
        check_versions(installed, doors=["torchrec"])
    with pytest.raises(ValueError, match="doors"):
        check_versions(installed, doors=["tensorflow"])


def test_this_environment_is_supported() -> None:
    check_versions()


def test_runtime_versions_name_the_machine_and_what_is_installed() -> None:
    versions = runtime_versions()
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "numpy", "platform", "machine"} <= versions.keys()
    assert platform.release() not in versions.values()  # a build of the kernel names a machine, not what ran
    assert all(isinstance(value, str) for value in versions.values())


def test_version_table_has_one_row_per_torch_and_marks_ours() -> None:
    rows = version_table()
    assert len({row["torch"] for row in rows}) == len(rows) == len(_versions.MATCHES)
    assert [row["torch"] for row in rows if "make install" in row["run by us"]] == ["2.13.*"]
    assert all(row.keys() == rows[0].keys() for row in rows)


def test_the_check_imports_no_torch() -> None:
    code = "import sys; from hstu_plugin import _versions; _versions.check_versions(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "False"


def test_source_commit(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        done = subprocess.run(["git", "-C", str(tmp_path), *who, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    package = tmp_path / "site" / "hstu_plugin"
    package.mkdir(parents=True)
    assert source_commit(tmp_path) is None
    git("init")
    assert source_commit(tmp_path) is None, "there is no commit yet"
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("1")
    assert source_commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert source_commit(tmp_path) == f"{head}-dirty"
    # Installed somewhere inside another project's repository.
    assert source_commit(package.parent) is None
