"""What the kernels must reach (``benchmarks/floors.yaml``) beside what was recorded.

Ratios are taken between rows of one run (one ``taken_at``), the latest that holds both; other figures from newest rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.attention.compare import Row, length_slopes, newest
from benchmarks.attention.measure import ADDED, BACKWARD, CALL, FORWARD

FLOORS = Path(__file__).resolve().with_name("floors.yaml")
_DIRECTIONS = (FORWARD, BACKWARD)
_Key = tuple[str, str]
_NAMES = ("case", "contender", "direction")
_SECTIONS = {"contender", "speed", "ahead", "time", "slope", "bias", "cached", "host", "layer"}


@dataclass(frozen=True, slots=True)
class Floor:
    """One demand: ``found`` beside ``wanted``, in the same order; ``None`` is what no row says.

    Attributes:
        what, where: the kind of figure with its unit, and the case.
        sign: ``>=``, ``>`` or ``<=``, between found and wanted.
        runs: commits of the rows.
        note: what helps to read the figure.
    """

    what: str
    where: str
    sign: str
    wanted: tuple[float, ...]
    found: tuple[float | None, ...]
    runs: tuple[str, ...] = ()
    note: str = ""

    @property
    def met(self) -> bool | None:
        """``None`` when something was not measured and nothing is missed."""
        known = [(f, w) for f, w in zip(self.found, self.wanted, strict=True) if f is not None]
        if not all(_holds(f, self.sign, w) for f, w in known):
            return False
        return True if len(known) == len(self.wanted) else None

    def line(self) -> str:
        """For a terminal."""
        word = {True: "met ", False: "MISS", None: "open"}[self.met]
        return f"{word} {self.what}, {self.where}: {self._figures()} {self.sign} {_numbers(self.wanted)}"

    def cells(self) -> list[str]:
        """For a table: floor, where, wanted, figure, met, note, commit."""
        word = {True: "yes", False: "**no**", None: "not measured"}[self.met]
        runs = ", ".join(dict.fromkeys(run[:9] for run in self.runs))
        return [self.what, self.where, f"{self.sign} {_numbers(self.wanted)}", self._figures(), word, self.note, runs]

    def _figures(self) -> str:
        return _numbers(self.found)


HEADER = ["floor", "case", "wanted", "figure", "met", "note", "commit"]


def _holds(found: float, sign: str, wanted: float) -> bool:
    return {">=": found >= wanted, ">": found > wanted, "<=": found <= wanted}[sign]


def _numbers(values: Sequence[float | None]) -> str:
    return " / ".join("-" if value is None else f"{value:.3g}" for value in values)


def load(path: Path = FLOORS) -> dict[str, Any]:
    """The demands.

    Raises:
        ValueError: a section has an unknown name or is missing.
    """
    wanted = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(wanted, dict) or set(wanted) != _SECTIONS:
        raise ValueError(f"{path}: expected the sections {', '.join(sorted(_SECTIONS))}, got {', '.join(wanted or ())}")
    return wanted


class _Rows:
    """Rows by what they measure, oldest first."""

    def __init__(self, rows: Iterable[Row], names: tuple[str, ...]) -> None:
        self._by_key: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            self._by_key.setdefault(tuple(row[name] for name in names), []).append(row)

    def last(self, *key: str) -> Row | None:
        found = self._by_key.get(key)
        return found[-1] if found else None

    def together(self, one: tuple[str, ...], other: tuple[str, ...]) -> tuple[Row, Row] | None:
        """The rows of both keys from the latest run that holds both."""
        others = {row["taken_at"]: row for row in self._by_key.get(other, [])}
        for row in reversed(self._by_key.get(one, [])):
            if row["taken_at"] in others:
                return row, others[row["taken_at"]]
        return None


def judge(wanted: dict[str, Any], attention: Sequence[Row], layers: Sequence[Row]) -> list[Floor]:
    """Every demand of `load` beside the rows of ``attention.csv`` and ``layer.csv`` of one device."""
    ours = str(wanted["contender"])
    calls = [row for row in attention if row["mode"] == CALL and row["dtype"] == "bfloat16"]
    rows = _Rows(calls, _NAMES)
    return [
        *_columns(rows, ours, "TFLOP/s", ">=", wanted["speed"], "tflops_convention"),
        *_ahead(rows, ours, wanted["ahead"]),
        *_columns(rows, ours, "ms", "<=", wanted["time"], "p50_ms"),
        *_slopes(calls, ours, wanted["slope"]),
        *_bias(rows, ours, wanted["bias"]),
        *_cached(rows, ours, wanted["cached"]),
        *_host(rows, _Rows((r for r in attention if r["mode"] == ADDED), _NAMES), ours, wanted["host"]),
        *_layers(_Rows(layers, ("case", "variant", "layers", "contender")), ours, wanted["layer"]),
    ]


def _columns(
    rows: _Rows, ours: str, what: str, sign: str, demands: dict[str, list[float]], column: str
) -> Iterator[Floor]:
    """A recorded column, forward and backward."""
    for case, bounds in demands.items():
        found = [rows.last(case, ours, direction) for direction in _DIRECTIONS[: len(bounds)]]
        note = ""
        if column == "tflops_convention":
            shares = [None if r is None else 100 * _number(r, column) / _number(r, "matmul_tflops") for r in found]
            note = f"{_numbers(shares)} % of the product in the same run"
        values = tuple(None if row is None else _number(row, column) for row in found)
        yield Floor(what, case, sign, tuple(bounds), values, _commits(found), note)


def _ratios(rows: _Rows, what: str, case: str, sign: str, bounds: Sequence[float], upper: _Key, lower: _Key) -> Floor:
    """Of two rows' times, or of their memory, for each direction; ``upper`` and ``lower`` are a case and contender."""
    column = "peak_mib" if what.startswith("memory") else "p50_ms"
    pairs = [rows.together((*upper, way), (*lower, way)) for way in _DIRECTIONS[: len(bounds)]]
    found = tuple(None if p is None else _number(p[0], column) / _number(p[1], column) for p in pairs)
    return Floor(what, case, sign, tuple(bounds), found, _commits(p[0] for p in pairs if p is not None))


def _ahead(rows: _Rows, ours: str, demands: dict[str, list[str]]) -> Iterator[Floor]:
    for rival, cases in demands.items():
        for case in cases:
            yield _ratios(rows, f"times as fast as {rival}", case, ">", (1.0, 1.0), (case, rival), (case, ours))


def _slopes(calls: Sequence[Row], ours: str, demands: dict[str, Any]) -> Iterator[Floor]:
    latest, lengths = newest(calls), tuple(demands["lengths"])
    slopes = length_slopes(latest)
    for series, bounds in demands["series"].items():
        found = [slopes.get((ours, series, direction)) for direction in _DIRECTIONS]
        values = tuple(None if s is None or s[1:] != lengths else s[0] for s in found)
        commits = _commits(row for row in latest if row["series"] == series and row["contender"] == ours)
        yield Floor("slope", series, "<=", tuple(bounds), values, commits, f"{lengths[0]} to {lengths[1]}")


def _bias(rows: _Rows, ours: str, demands: dict[str, Any]) -> Iterator[Floor]:
    plain = demands["without"], ours
    for what in ("time", "memory"):
        for case, bounds in demands[what].items():
            yield _ratios(rows, f"{what} / without bias", case, "<=", bounds, (case, ours), plain)


def _cached(rows: _Rows, ours: str, demands: dict[str, list[float]]) -> Iterator[Floor]:
    for case, bounds in demands.items():
        yield _ratios(rows, "full forward / cached", case, ">=", bounds, (case, ours), (case, f"{ours}-cached"))


def _host(rows: _Rows, added: _Rows, ours: str, demands: dict[str, list[float]]) -> Iterator[Floor]:
    """A forward as a whole, and what our code adds to autograd in a backward; that as a whole in the note."""
    for case, bounds in demands.items():
        whole = rows.last(case, ours, BACKWARD)
        found = (rows.last(case, ours, FORWARD), added.last(case, ours, BACKWARD))
        values = tuple(None if row is None else _number(row, "host_us") for row in found)
        note = "" if whole is None else f"the whole backward {_number(whole, 'host_us'):.3g}"
        yield Floor("host, us", case, "<=", tuple(bounds), values, _commits(found), note)


def _layers(rows: _Rows, ours: str, demands: list[dict[str, Any]]) -> Iterator[Floor]:
    for demand in demands:
        case, rival = demand["case"], demand["rival"]
        pair = rows.together((case, "ultra", "8", rival), (case, "ultra", "8", ours))
        commits = () if pair is None else (pair[1]["commit"],)
        ratio = None if pair is None else _number(pair[0], "p50_ms") / _number(pair[1], "p50_ms")
        sign = ">" if demand["time"] == 1 else ">="
        yield Floor(f"step of {rival} / ours", case, sign, (demand["time"],), (ratio,), commits)
        if "memory" in demand:
            share = None if pair is None else _number(pair[1], "peak_mib") / _number(pair[0], "peak_mib")
            yield Floor(f"memory of a step / {rival}", case, "<=", (demand["memory"],), (share,), commits)


def _commits(rows: Iterable[Row | None]) -> tuple[str, ...]:
    return tuple(row["commit"] for row in rows if row is not None)


def _number(row: Row, column: str) -> float:
    return float(row[column]) if row[column] else math.nan
