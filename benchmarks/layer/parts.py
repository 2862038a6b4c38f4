"""Where a training step's device time goes: every kernel of profiled steps is put to one part of the layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.layer.memory import training_step
from benchmarks.layer.models import Batch
from benchmarks.timing import synchronize

_MACHINE = ("taken_at", "commit", "device", "torch", "triton", "python", "cuda")
COLUMNS = (*_MACHINE, "case", "variant", "layers", "contender", "part", "ms", "share")
ATTENTION_FORWARD, ATTENTION_BACKWARD = "attention, forward", "attention, backward"
PRODUCTS, OPTIMISER, REST = "products of the linear layers", "optimiser", "norms, gates, sums and casts"
UNKNOWN, WAITING = "kernels whose origin is not known", "no kernel runs"
PARTS = (ATTENTION_FORWARD, ATTENTION_BACKWARD, PRODUCTS, REST, OPTIMISER)
_OUR_ATTENTION = re.compile(r"(hopper|hstu)_\w*(fwd|bwd|join|pair|work|biased)\w*_kernel")
_OUR_PRODUCT = re.compile(r"product_kernel")
_PRODUCT = re.compile(r"aten::(mm|addmm|bmm|baddbmm|linear|matmul)$")
_STEPS = 3


def part_of(kernel: str, origin: Sequence[str]) -> str:
    """The part of ``kernel``; ``origin``: the operation that launched it and those around it, the innermost first."""
    if any(name.startswith("Optimizer.step") for name in origin):
        return OPTIMISER
    if _OUR_ATTENTION.search(kernel) or any("EagerAttention" in name for name in origin):
        late = "bwd" in kernel or any("Backward" in name for name in origin)
        return ATTENTION_BACKWARD if late else ATTENTION_FORWARD
    if _OUR_PRODUCT.search(kernel) or any(_PRODUCT.match(name) for name in origin):
        return PRODUCTS
    return REST


def measure_parts(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Milliseconds of a step by part; on a CPU operations' own time.

    The last two on a GPU: kernels that the profiler could not put to an operation, and time without a kernel.
    """
    device = batch.x.device
    step = training_step(model, batch)
    for _ in range(_STEPS):
        step()
    synchronize(device)
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as found:
        for _ in range(_STEPS):
            step()
        synchronize(device)
    parts = parts_of(list(found.events() or ()), on_device=bool(cuda))
    return {part: microseconds / 1e3 / _STEPS for part, microseconds in parts.items()}


def parts_of(events: Sequence[Any], *, on_device: bool) -> dict[str, float]:
    """Microseconds by part of the profiler's ``events``: of kernels if ``on_device``, else of operations.

    Kernels that overlap count with all of their time each.
    """
    parts = dict.fromkeys(PARTS, 0.0)
    known: Counter[str] = Counter()
    for kernel, origin, microseconds in _spent(events, on_device=on_device):
        parts[part_of(kernel, origin)] += microseconds
        known[kernel] += microseconds
    if on_device:
        # Marks of ranges stand among the kernels, under names such as Optimizer.step#AdamW.step.
        kernels = [e for e in events if e.device_type == DeviceType.CUDA and "#" not in e.name]
        parts |= {UNKNOWN: 0.0, WAITING: _idle(kernels)}
        for kernel, microseconds in _left_over(kernels, known).items():
            named = part_of(kernel, ())
            parts[UNKNOWN if named == REST else named] += microseconds
    return parts


def _spent(events: Sequence[Any], *, on_device: bool) -> Iterator[tuple[str, list[str], float]]:
    """Kernel, operations around it, microseconds."""
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        origin = list(_origin(event))
        if on_device:
            for kernel in event.kernels:
                if "#" not in kernel.name:
                    yield kernel.name, origin, kernel.duration
        else:
            yield event.name, origin, event.self_cpu_time_total


def _idle(kernels: Sequence[Any]) -> float:
    """Microseconds without a kernel between the first and the last."""
    spans = sorted((e.time_range for e in kernels), key=lambda span: span.start)
    ends = accumulate((span.end for span in spans), max)
    return float(sum(max(0.0, later.start - end) for end, later in zip(ends, spans[1:], strict=False)))


def _left_over(kernels: Sequence[Any], known: Counter[str]) -> Counter[str]:
    """Microseconds of ``kernels`` by name that are not among the ``known``: of these the names alone tell the part."""
    found: Counter[str] = Counter()
    for kernel in kernels:
        found[kernel.name] += kernel.time_range.elapsed_us()
    return found - known


def _origin(event: Any) -> Iterator[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent
