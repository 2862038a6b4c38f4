"""Mistakes in what a user gave, told apart from mistakes in code: what the commands of all doors share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def close_names(key: object, known: Iterable[str], most: int) -> list[str]:
    """Up to ``most`` of the names ``known`` that ``key`` looks like, the nearest first, whatever their case."""
    by_lower = {name.lower(): name for name in known}
    return [by_lower[name] for name in difflib.get_close_matches(str(key).lower(), by_lower, most, 0.6)]


def raised_by_us(error: BaseException) -> bool:
    """Whether our own code raised it, which checks input, as opposed to RecBole, torch, pandas or Python."""
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")).startswith(("hstu_plugin", "hstu_kernels"))
