"""Scorers out of files, in a process without our operators: checked and timed.

``python -I benchmarks/export_fresh.py CASE RUNS KIND=FILE ...`` prints one JSON object. CASE holds inputs and the
scores that were wanted where the files were written; KIND is ``exported`` (``torch.export``), ``replayed`` (the same,
captured as a CUDA graph) or ``compiled`` (AOTInductor). Standard error says how far it came: compiled code may crash.
"""

from __future__ import annotations

import faulthandler
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
    faulthandler.enable()
    given, wanted = torch.load(case, weights_only=True)
    torch.set_float32_matmul_precision("highest")
    found = {}
    for kind, _, path in (word.partition("=") for word in files):
        with torch.no_grad():
            _say(f"{kind}: loading")
            call = _load(kind, path, given)
            _say(f"{kind}: first call")
            errors = [relative_error(call(*given), wanted)]
            if kind != "replayed":
                _say(f"{kind}: one user alone, not the number that is timed")
                errors.append(relative_error(call(*(x[:1] for x in given)), wanted[:1]))
            _say(f"{kind}: timing")
            ms = median_ms(lambda call=call: call(*given), wanted.device, int(runs))  # type: ignore[misc]
        found[kind] = {"ms": ms, "relative_error": max(errors)}
        _say(f"{kind}: leaving")
        del call
    ours = sorted(name for name in sys.modules if name.partition(".")[0] in _OURS)
    print(json.dumps({"contenders": found, "our_modules": ours}), flush=True)
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


def _load(kind: str, path: str, given: Sequence[Tensor]) -> Callable[..., Any]:
    if kind == "compiled":
        package: Callable[..., Any] = torch._inductor.aoti_load_package(path)
        return package
    if kind not in ("exported", "replayed"):
        raise ValueError(f"KIND: expected exported, replayed or compiled, got {kind!r}")
    module: Callable[..., Any] = torch.export.load(path).module()
    return module if kind == "exported" else replayed(module, given)


def replayed(call: Callable[..., Tensor], example: Sequence[Tensor]) -> Callable[..., Tensor]:
    """``call`` as one CUDA graph, for tensors of the shapes of ``example``; every call overwrites the last result."""
    places = [x.clone() for x in example]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARMUP):
            call(*places)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = call(*places)

    def replay(*given: Tensor) -> Tensor:
        for place, x in zip(places, given, strict=True):
            place.copy_(x)
        graph.replay()
        return scores

    return replay


def _say(stage: str) -> None:
    print(stage, file=sys.stderr, flush=True)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
