"""Recorded results say which code they came from."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks/results", "recbole_configs/results")
RECORDS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.json"))
LEDGERS = sorted((ROOT / "benchmarks/results").glob("*.csv"))
HASH = re.compile(r"[0-9a-f]{7,40}")


def commits(value: Any) -> Iterator[str]:
    """Every commit that a record names, however deep; ``-dirty`` cut off."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("commit", "commits"):
                names = inner.split(", ") if isinstance(inner, str) else inner
                yield from (name.removesuffix("-dirty") for name in names)
            else:
                yield from commits(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from commits(inner)


def in_ledger(path: Path) -> set[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return {row["commit"].removesuffix("-dirty") for row in csv.DictReader(file)}


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_names_its_commit_and_no_machine_of_its_own(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    named = list(commits(record))
    assert named and all(HASH.fullmatch(name) for name in named)
    told = re.findall(r"Code of commit (\w+)", str(record.get("note", "")))
    assert all(any(name.startswith(prefix) for name in named) for prefix in told), "the note names another commit"
    assert not re.search(r'"kernel": "\d+\.\d+\.', path.read_text(encoding="utf-8")), "a kernel build names a machine"


def test_commits_of_records_are_in_the_history() -> None:
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    # An unpacked archive may lie inside another project's repository.
    if shutil.which("git") is None or git("rev-parse", "--show-prefix", "--is-shallow-repository") != "false":
        pytest.skip("the whole history is not here: not a git checkout of its own, or a shallow one")
    history = git("rev-list", "HEAD").split()
    named = {name: path.name for path in RECORDS for name in commits(json.loads(path.read_text(encoding="utf-8")))}
    named |= {name: path.name for path in LEDGERS for name in in_ledger(path)}
    unknown = {name: file for name, file in named.items() if not any(full.startswith(name) for full in history)}
    assert not unknown
