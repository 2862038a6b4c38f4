"""Mistakes in what a user gave, told apart from mistakes in code: what the commands of all doors share."""

from __future__ import annotations


def raised_by_us(error: BaseException) -> bool:
    """Whether our own code raised it, which checks input, as opposed to RecBole, torch, pandas or Python."""
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")).startswith(("hstu_plugin", "hstu_kernels"))
