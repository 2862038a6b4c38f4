"""From a contender to rows: what is timed, and the columns of the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.attention.batches import Batch
from benchmarks.attention.cases import BACKWARD_FACTOR, Case, Work
from benchmarks.attention.contenders import Bound
from benchmarks.attention.host import added_microseconds, empty_microseconds
from benchmarks.timing import Call, Spread, host_microseconds, peak_mebibytes, time_calls, time_replays

FORWARD, BACKWARD = "forward", "backward"
CALL, GRAPH, UNPLANNED = "call", "graph", "unplanned"
# Of a backward, host time alone: through an operation that does nothing, and what ours takes more than that.
EMPTY, ADDED = "empty", "added"
_MACHINE = ("taken_at", "commit", "device", "torch", "triton", "python", "cuda", "matmul_tflops", "copy_tbs")
_CASE = ("group", "case", "series", "length", "batch", "total_rows", "heads", "qk_dim", "v_dim", "dtype")
_MASK = ("max_attn_len", "global_prefix_len", "full_attn_tail_len", "num_targets", "bias")
_TIMES = ("contender", "direction", "mode", "p20_ms", "p50_ms", "p80_ms", "samples", "pairs")
_SPEEDS = ("gflop_exact", "gflop_convention", "tflops_exact", "tflops_convention")
COLUMNS = (*_MACHINE, *_CASE, *_MASK, *_TIMES, *_SPEEDS, "host_us", "peak_mib", "relative_error")


def measure(bound: Bound, batch: Batch, directions: tuple[str, ...], *, seconds: float) -> Iterator[dict[str, object]]:
    """Time ``bound`` in every way that the case asks for; a dictionary of the measured columns for each."""
    case, device = batch.case, batch.device
    work = Work.of(case, batch.layout)
    with own_stream(device):
        for direction in directions:
            if direction == BACKWARD and not bound.grads:
                continue
            calls = _forward_calls(bound) if direction == FORWARD else _backward_calls(bound)
            host = host_microseconds(calls, device, seconds=seconds)
            peak = peak_mebibytes(_step(bound) if direction == BACKWARD else calls[0], device)
            about: dict[str, object] = {"contender": bound.name, "direction": direction}
            spread = time_calls(calls, device, seconds=seconds)
            yield about | {"mode": CALL, "host_us": host, "peak_mib": peak} | _speed(spread, work, direction)
            if case.small and device.type == "cuda":
                try:
                    spread = time_replays(calls, device, seconds=seconds)
                except RuntimeError as error:
                    # A contender that cannot be captured has no such row; the caller sees why.
                    yield about | {"mode": GRAPH, "note": f"cannot be captured: {str(error).splitlines()[0]}"}
                else:
                    yield about | {"mode": GRAPH} | _speed(spread, work, direction)
            del calls
            if case.small and bound.ours and direction == BACKWARD:
                for mode, cost in ((EMPTY, empty_microseconds), (ADDED, added_microseconds)):
                    yield about | {"mode": mode, "host_us": cost(bound, device, seconds=seconds)}
        if case.small and bound.unplanned is not None and FORWARD in directions:
            calls = _forward_calls(bound, bound.unplanned)
            about = {"contender": bound.name, "direction": FORWARD, "mode": UNPLANNED}
            spread = time_calls(calls, device, seconds=seconds)
            yield about | {"host_us": host_microseconds(calls, device, seconds=seconds)} | _speed(spread, work, FORWARD)


def describe(case: Case, dtype: torch.dtype) -> dict[str, object]:
    """The columns that say what was run."""
    mask = case.mask
    return {
        "group": case.group,
        "case": case.name,
        "series": case.series,
        "length": case.length,
        "batch": len(case.lengths),
        "total_rows": case.total_rows,
        "heads": case.heads,
        "qk_dim": case.qk_dim,
        "v_dim": case.v_dim,
        "dtype": str(dtype).removeprefix("torch."),
        "max_attn_len": mask.max_attn_len,
        "global_prefix_len": mask.global_prefix_len,
        "full_attn_tail_len": mask.full_attn_tail_len,
        "num_targets": sum(case.num_targets or ()),
        "bias": case.bias.value,
    }


def _speed(spread: Spread, work: Work, direction: str) -> dict[str, object]:
    factor = 1.0 if direction == FORWARD else BACKWARD_FACTOR
    exact, convention = work.exact * factor / 1e9, work.convention * factor / 1e9
    return {
        "p20_ms": spread.p20,
        "p50_ms": spread.p50,
        "p80_ms": spread.p80,
        "samples": spread.samples,
        "pairs": work.pairs,
        "gflop_exact": exact,
        "gflop_convention": convention,
        "tflops_exact": exact / spread.p50,
        "tflops_convention": convention / spread.p50,
    }


def _forward_calls(bound: Bound, forward: Callable[..., Tensor] | None = None) -> list[Call]:
    run = bound.forward if forward is None else forward

    def call(leaves: tuple[Tensor, ...]) -> Call:
        def forward_only() -> Tensor:
            with torch.no_grad():
                return run(*leaves)

        return forward_only

    return [call(leaves) for leaves in bound.inputs]


def _backward_calls(bound: Bound) -> list[Call]:
    def call(leaves: tuple[Tensor, ...], grad: Tensor) -> Call:
        out = bound.forward(*leaves)

        def backward_only() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, leaves, grad, retain_graph=True)

        return backward_only

    return [call(leaves, grad) for leaves, grad in zip(bound.inputs, bound.grads, strict=True)]


def _step(bound: Bound) -> Call:
    """Forward and backward together, for what both keep in memory."""

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(bound.forward(*bound.inputs[0]), bound.inputs[0], bound.grads[0])

    return step


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A stream that can be captured: a backward runs on the stream of its forward."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)
