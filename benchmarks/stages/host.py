"""What the host does in a backward of ours, part by part, on calls whose kernels are compiled and remembered.

Parts are timed alone, in turns, each behind a wait for the device: their sum leaves out what one part costs the next
(cold caches of the processor), and what lies between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention.batches import make_batch
from benchmarks.attention.cases import Case
from benchmarks.attention.contenders import Bound, ours
from benchmarks.attention.host import empty_output
from benchmarks.attention.measure import own_stream
from benchmarks.timing import Call, host_medians

WHOLE_PART = "whole backward, in the caller's thread"
EMPTY_PART = "autograd: a backward that only allocates"


def host_parts(case: Case, device: torch.device, *, seconds: float) -> Iterator[tuple[str, float]]:
    """Names and microseconds of the parts of a backward; the whole first."""
    batch = make_batch(case, device, torch.bfloat16)
    bound = ours("triton")(batch)
    with own_stream(device):
        named = _named_parts(bound, batch.layout, batch)
        with torch.autograd.set_multithreading_enabled(False):
            found = host_medians(list(named.values()), device, seconds=seconds)
    yield from zip(named, found, strict=True)


def _named_parts(bound: Bound, layout: Any, batch: Any) -> dict[str, Call]:
    from hstu_kernels.attention.triton import calls, launch
    from hstu_kernels.attention.triton.schedule import plan_triton

    leaves, grad = bound.inputs[0], bound.grads[0]
    q, k, v = (x.detach() for x in leaves[:3])
    plan = plan_triton(layout, batch.case.mask, None, batch.case.total_rows)
    numbers = (batch.alpha, batch.scale)
    divided = (None, None)
    needed = (True, True, True, False, False)

    def direct() -> object:
        return launch.triton_backward(grad, q, k, v, None, None, plan, *numbers, None, needed, divided)

    def begun() -> calls.Call:
        return calls.Call(q, k, v, None, None, plan, *numbers, divided, None, grad)

    direct()
    call = begun()
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    dq_tile, keys_tile = call.tiles.dq, call.tiles.dkdv
    queries, keys = call.job("dq", dq_tile), call.job("dkdv", keys_tile, early=True)
    parts: dict[str, Call] = {
        WHOLE_PART: _backward(leaves, grad, bound.forward(*leaves)),
        EMPTY_PART: _backward(leaves, grad, empty_output(bound)),
        "our backward outside autograd": direct,
        "  Call: what kind of call it is, addresses": begun,
        "  memory for dq, dk and dv": lambda: [torch.empty_like(x) for x in (q, k, v)],
        "  which job: dq, and dk with dv": lambda: (call.job("dq", dq_tile), call.job("dkdv", keys_tile, early=True)),
        "  launch of dq": lambda: call.launch(queries, (grad, dq, None), call.inputs[1:], (None, None, None)),
        "  launch of dk and dv": lambda: call.launch(keys, (grad, dk, dv, None, None), (call.inputs[0], grad)),
    }
    if queries.ready is not None:
        arrays = (*call.inputs, grad, dq, None, *(call.inputs[1:] if queries.described else (None, None)), None, None)
        parts["    of it addresses of dq's arguments"] = lambda: _addresses(queries, arrays)
        parts["    of it the launcher that Triton compiled"] = lambda: queries.ready(_addresses(queries, arrays))
    return parts


def _addresses(job: Any, arrays: tuple[Tensor | None, ...]) -> list[Any]:
    addresses = [None if x is None else x.data_ptr() for x in arrays]
    addresses += job.fixed
    addresses += [None, None, None]
    addresses.append(job.list_address)
    return addresses


def _backward(leaves: tuple[Tensor, ...], grad: Tensor, out: Tensor) -> Call:
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)
