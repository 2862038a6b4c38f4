"""Scorers out of files, in a process without our operators: checked and timed.

``python -I benchmarks/export_fresh.py CASE RUNS KIND=FILE ...`` prints one JSON object. CASE holds inputs and the
scores that were wanted where the files were written; KIND is ``exported`` (``torch.export``) or ``compiled``
(AOTInductor).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_WARMUP = 5
# `hstu_plugin` itself may be there: an installed package has a hook for RecBole, which imports nothing of it.
_OURS = ("hstu_kernels", "torchrec")


def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit code: 1 where one of our modules is there."""
    case, runs, *files = arguments
    given, wanted = torch.load(case, weights_only=True)
    torch.set_float32_matmul_precision("highest")
    found = {}
    for kind, _, path in (word.partition("=") for word in files):
        call = _load(kind, path)
        with torch.no_grad():
            error = relative_error(call(*given), wanted)
            # Another number of users than in the batch that was timed.
            alone = relative_error(call(*(x[:1] for x in given)), wanted[:1])
            ms = median_ms(lambda call=call: call(*given), wanted.device, int(runs))  # type: ignore[misc]
        found[kind] = {"ms": ms, "relative_error": max(error, alone)}
    ours = sorted(name for name in sys.modules if name.partition(".")[0] in _OURS)
    print(json.dumps({"contenders": found, "our_modules": ours}))
    return int(bool(ours))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference by the norm of what was wanted."""
    return float((got - wanted).norm() / wanted.norm())


def median_ms(call: Callable[[], Tensor], device: torch.device, runs: int) -> float:
    """Milliseconds of a call, from start to result."""
    taken = []
    for turn in range(runs + _WARMUP):
        _synchronise(device)
        begin = time.perf_counter()
        call()
        _synchronise(device)
        if turn >= _WARMUP:
            taken.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(taken)


def _load(kind: str, path: str) -> Callable[..., Any]:
    if kind == "exported":
        module: Callable[..., Any] = torch.export.load(path).module()
        return module
    if kind != "compiled":
        raise ValueError(f"KIND: expected exported or compiled, got {kind!r}")
    package: Callable[..., Any] = torch._inductor.aoti_load_package(path)
    return package


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
