"""Timing of device work: event medians over rotating inputs, graph replays, host cost and peak memory.

On a CPU the same functions read the host's clock; graphs and peak memory are a GPU's.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch

Call = Callable[[], object]

FEWEST, MOST = 11, 400
_FEWEST_HOST_CALLS, _HOST_CALLS, _HOST_TURNS = 4, 64, 400


@dataclass(frozen=True, slots=True)
class Spread:
    """Milliseconds at three quantiles of ``samples`` measurements."""

    p20: float
    p50: float
    p80: float
    samples: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Spread:
        """From at least two measurements."""
        deciles = statistics.quantiles(milliseconds, n=10, method="inclusive")
        return cls(deciles[1], deciles[4], deciles[7], len(milliseconds))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(calls: Sequence[Call], device: torch.device, *, seconds: float) -> Spread:
    """Time of one call; ``calls`` do the same work on different inputs and take turns.

    Each call stands between two device events, so short calls contain the gaps that the host leaves between launches.
    """
    for call in calls:
        call()
    synchronize(device)
    begin = time.perf_counter()
    for call in islice(cycle(calls), 3):
        call()
    synchronize(device)
    estimate = max((time.perf_counter() - begin) / 3, 1e-7)
    samples = round(min(max(seconds / estimate, FEWEST), MOST))
    # A second warm-up of the same length lets the clocks settle under this very load.
    for call in islice(cycle(calls), samples // 4):
        call()
    turns = list(islice(cycle(calls), samples))
    if device.type != "cuda":
        return Spread.of([_host_milliseconds(call) for call in turns])
    synchronize(device)
    event = functools.partial(torch.cuda.Event, enable_timing=True)
    marks = [(event(), event()) for _ in turns]
    for call, (first, last) in zip(turns, marks, strict=True):
        first.record()
        call()
        last.record()
    synchronize(device)
    return Spread.of([first.elapsed_time(last) for first, last in marks])


def time_replays(calls: Sequence[Call], device: torch.device, *, seconds: float) -> Spread:
    """Time of one call inside a replayed CUDA graph that holds ``calls`` one behind the other."""
    graph = capture(calls)
    whole = time_calls([graph.replay], device, seconds=seconds)
    each = len(calls)
    return Spread(whole.p20 / each, whole.p50 / each, whole.p80 / each, whole.samples)


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph of ``calls``, captured on the current stream, which must not be the default one."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for call in calls:
            call()
    return graph


def host_microseconds(calls: Sequence[Call], device: torch.device, *, seconds: float = 1.0) -> float:
    """Median time after which a call returns to its caller, with room in the launch queue; over about ``seconds``."""
    for call in calls:
        call()
    synchronize(device)
    costs: list[float] = []
    begin = time.perf_counter()
    for call in islice(cycle(calls), _HOST_CALLS):
        costs.append(_host_milliseconds(call))
        if len(costs) % _FEWEST_HOST_CALLS == 0:
            synchronize(device)
            if time.perf_counter() - begin > seconds:
                break
    synchronize(device)
    return statistics.median(costs) * 1e3


def host_medians(calls: Sequence[Call], device: torch.device, *, seconds: float = 1.0) -> list[float]:
    """As `host_microseconds`, of each call alone: they take turns, so that what disturbs one disturbs all."""
    for call in calls:
        call()
    synchronize(device)
    costs: list[list[float]] = [[] for _ in calls]
    begin = time.perf_counter()
    while len(costs[0]) < _HOST_TURNS and (time.perf_counter() - begin < seconds or len(costs[0]) < _FEWEST_HOST_CALLS):
        for call, found in zip(calls, costs, strict=True):
            found.append(_host_milliseconds(call))
            synchronize(device)
    return [statistics.median(found) * 1e3 for found in costs]


def peak_mebibytes(call: Call, device: torch.device) -> float | None:
    """Memory that ``call`` takes at its peak beyond what was allocated before it; not known for a CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _host_milliseconds(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3
