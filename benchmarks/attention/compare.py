"""What is worked out from recorded rows: the newest ones, growth with length, ratios between two of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from benchmarks.attention.measure import CALL, FORWARD

Row = dict[str, str]
LENGTH_GROUPS = ("length", "semi_local", "truncated")
_KEY = ("device", "dtype", "case", "contender", "direction", "mode")
_LENGTH_SERIES = ("full", "semi-local prefix", "semi-local tail", "truncated")


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each case, contender, direction and mode, in order of the file."""
    kept: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in _KEY)
        kept.pop(key, None)
        kept[key] = row
    return list(kept.values())


def length_slopes(rows: Sequence[Row]) -> dict[tuple[str, str, str], tuple[float, int, int]]:
    """Least-squares slope, shortest and longest length, by contender, series and direction; three lengths at least."""
    points: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows:
        if row["mode"] == CALL and row["series"] in _LENGTH_SERIES and row["group"] in LENGTH_GROUPS:
            key = row["contender"], row["series"], row["direction"]
            points.setdefault(key, {})[int(row["length"])] = float(row["p50_ms"])
    slopes = {}
    for key, found in points.items():
        if len(found) < 3:
            continue
        xs, ys = [math.log(x) for x in found], [math.log(y) for y in found.values()]
        mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
        rise = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
        slopes[key] = rise / sum((x - mean_x) ** 2 for x in xs), min(found), max(found)
    return slopes


def bias_ratios(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]] | None:
    """Time and memory with each bias relative to the same case without one."""
    found = [row for row in rows if row["group"] == "biased" and row["mode"] == CALL]
    plain = {(row["contender"], row["direction"]): row for row in found if row["bias"] == "none"}
    body = []
    for row in found:
        base = plain.get((row["contender"], row["direction"]))
        if base is None or row is base:
            continue
        time = float(row["p50_ms"]) / float(base["p50_ms"])
        memory = f"{float(row['peak_mib']) / float(base['peak_mib']):.3f}" if base["peak_mib"] else ""
        body.append([row["contender"], row["bias"], row["direction"], f"{time:.2f}", memory])
    return (["contender", "bias", "direction", "time / without", "memory / without"], body) if body else None


def cached_ratios(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]] | None:
    """How much faster cached targets are than the forward over history and candidates."""
    found = {
        (row["case"], row["contender"]): float(row["p50_ms"])
        for row in rows
        if row["group"] == "targets" and row["direction"] == FORWARD and row["mode"] == CALL
    }
    body = []
    for (case, contender), time in found.items():
        full = found.get((case, contender.removesuffix("-cached")))
        if contender.endswith("-cached") and full is not None:
            body.append([case, contender, f"{full:.3f}", f"{time:.3f}", f"{full / time:.1f}"])
    return (["case", "contender", "full forward, ms", "cached, ms", "times faster"], body) if body else None
