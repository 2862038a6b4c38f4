"""Result files: CSV rows that are only ever appended, each complete in itself."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


class LedgerError(ValueError):
    """The file at hand is not a ledger with the expected columns."""


def append(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Append ``rows`` to the CSV at ``path``, which is made if it is missing, in one write.

    Raises:
        LedgerError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or path.stat().st_size == 0
    if not fresh:
        _check_columns(path, columns)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows([{name: _text(row.get(name, "")) for name in columns} for row in rows])
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """All rows of the CSV at ``path``.

    Raises:
        LedgerError: there is no such file, or it has other columns.
    """
    if not path.is_file():
        raise LedgerError(f"{path}: expected recorded rows, found no file; run the benchmark first")
    _check_columns(path, columns)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_of_device(path: Path, columns: Sequence[str], device: str | None) -> list[dict[str, str]]:
    """The rows of `read` whose device contains ``device``; ``None``: that of the last row.

    Raises:
        LedgerError: as `read`, or nothing is recorded for such a device.
    """
    rows = read(path, columns)
    device = device or (rows[-1]["device"] if rows else "")
    rows = [row for row in rows if device in row["device"]]
    if not rows:
        raise LedgerError(f"{path}: no rows of a device named {device!r}")
    return rows


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    with path.open(encoding="utf-8", newline="") as file:
        found = next(csv.reader(file), [])
    if found != list(columns):
        raise LedgerError(f"{path}: expected the columns {', '.join(columns)}, got {', '.join(found)}")


def _text(value: object) -> object:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
