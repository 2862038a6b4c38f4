"""From a study to rows: every stage's copy called once, and then all of them timed in turns.

What a copy without a stage computes is wrong on purpose. What the copy with all stages computes has to be what the
shipped kernels do, bit for bit, or nothing is timed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.attention.batches import make_batch
from benchmarks.attention.measure import own_stream
from benchmarks.stages.calls import Make, calls, kernel_of, same
from benchmarks.stages.patching import PACKAGE, WHOLE, Copy, Stage, imported_copy
from benchmarks.stages.studies import Study
from benchmarks.timing import FEWEST, MOST, Call, Spread, capture, synchronize

ALONE, WITHOUT, PART = "alone", "without", "part"
_MACHINE = ("taken_at", "commit", "device", "torch", "triton", "python", "cuda")
COLUMNS = (*_MACHINE, "case", "direction", "kernel", "stage", "kind", "p20_ms", "p50_ms", "p80_ms", "samples", "share")


class WrongCopy(Exception):
    """A copy does not do what it is for."""


def run_study(
    study: Study, device: torch.device, folder: Path, *, seconds: float, say: Callable[[str], None] = print
) -> Iterator[dict[str, object]]:
    """Rows of ``study`` without the columns of the machine.

    Args:
        folder: for the copies. seconds: aim for each stage. say: told of stages that cannot be taken out.

    Raises:
        WrongCopy: the copy of all stages differs from the shipped kernels.
    """
    batch = make_batch(study.chosen(), device, torch.bfloat16)
    with ExitStack() as open_copies, own_stream(device):
        wanted = calls(study, WHOLE, batch, Copy(PACKAGE))[0][0]()
        timed: list[tuple[Stage, list[Make]]] = []
        kernel = ""
        for stage in (WHOLE, *study.stages):
            try:
                copy = open_copies.enter_context(imported_copy(stage, folder))
                made, plan = calls(study, stage, batch, copy)
                found = made[0]()
                synchronize(device)
            except Exception as error:
                # Stale edits, or a kernel that the compiler refuses: the others are still worth their time.
                if stage is WHOLE:
                    raise
                say(f"cannot run: {study.name} without {stage.name}: {type(error).__name__}: {_first_line(error)}")
                continue
            if stage is WHOLE:
                kernel = kernel_of(study, plan)
                # The position table's gradient is added up in the order in which programs come.
                if not same(found[:3], wanted[:3]):
                    raise WrongCopy(f"{study.name}: the copy of the kernels differs from the shipped ones")
            elif stage.visible and same(found, wanted):
                say(f"cannot run: {study.name}: nothing changed without {stage.name}; its edits are not where it runs")
                continue
            timed.append((stage, made))
        spreads = _in_turns([made for _, made in timed], device, seconds=seconds)
        whole = spreads[0].p50
        for (stage, _), spread in zip(timed, spreads, strict=True):
            kind = ALONE if stage.alone else WITHOUT
            left = spread.p50 / whole
            yield {
                "case": study.case,
                "direction": study.direction,
                "kernel": kernel,
                "stage": stage.name,
                "kind": WHOLE.name if stage is WHOLE else kind,
                "p20_ms": spread.p20,
                "p50_ms": spread.p50,
                "p80_ms": spread.p80,
                "samples": spread.samples,
                "share": left if stage.alone or stage is WHOLE else 1 - left,
            }


def call_once(study: Study, stages: Sequence[Stage], device: torch.device, folder: Path) -> list[str]:
    """Compile what ``stages`` of ``study`` need; nothing is compared and nothing timed. Returns what went wrong."""
    batch = make_batch(study.chosen(), device, torch.bfloat16)
    wrong = []
    for stage in stages:
        try:
            with imported_copy(stage, folder) as copy:
                calls(study, stage, batch, copy)[0][0]()
                synchronize(device)
        except Exception as error:
            wrong.append(f"{study.name}, {stage.name}: {type(error).__name__}: {_first_line(error)}")
    return wrong


def _in_turns(sets: Sequence[Sequence[Make]], device: torch.device, *, seconds: float) -> list[Spread]:
    """Milliseconds of one call of each set, in turns, as replays of graphs where there are any: no host time."""
    replays = [capture(made).replay for made in sets] if device.type == "cuda" else [_all(made) for made in sets]
    for replay in replays:
        replay()
    synchronize(device)
    found: list[list[float]] = [[] for _ in sets]
    total = 0.0
    while len(found[0]) < FEWEST or (total < seconds * 1e3 * len(sets) and len(found[0]) < MOST):
        for replay, made, times in zip(replays, sets, found, strict=True):
            spent = _milliseconds(replay, device)
            total += spent
            times.append(spent / len(made))
    return [Spread.of(times) for times in found]


def _milliseconds(replay: Call, device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        replay()
        return (time.perf_counter() - begin) * 1e3
    event = functools.partial(torch.cuda.Event, enable_timing=True)
    first, last = event(), event()
    first.record()
    replay()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last))


def _all(made: Sequence[Make]) -> Call:
    return lambda: [call() for call in made]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
