"""The kernels of a copy, called as the shipped ones are: results of one copy of a batch, outside autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention.batches import Batch
from benchmarks.stages.patching import Copy, Stage
from benchmarks.stages.studies import BACKWARD, CACHED, Study
from hstu_kernels import JaggedLayout, LayerKV

Results = tuple[Tensor | None, ...]
Make = Callable[[], Results]


def calls(study: Study, stage: Stage, batch: Batch, copy: Copy) -> tuple[list[Make], Any]:
    """One call for each copy of the inputs, and the plan that they share (``None`` where there is none)."""
    if study.direction == CACHED:
        return _cached(batch, copy), None
    launch, schedule = copy.module("launch"), copy.module("schedule")
    # A plan of the copy's own: it remembers the kernels that ran on it.
    plan = schedule.plan_triton(batch.layout, batch.case.mask, batch.bias, batch.case.total_rows)
    tables = (batch.tables.get("pos_table"), batch.tables.get("time_table"))
    numbers = (plan, batch.alpha, batch.scale)
    pos, time = (None if table is None else table.detach() for table in tables)
    made: list[Make] = []
    if study.direction == BACKWARD:
        needed = stage.needed or (True, True, True, pos is not None, time is not None)
        # A forward divides the tables, and its backward finds them divided.
        divided = launch.divide(pos, time, batch.alpha)
        for x in batch.copies:
            inputs = (x.grad_out, x.q.detach(), x.k.detach(), x.v.detach(), pos, time)
            made.append(partial(launch.triton_backward, *inputs, *numbers, None, needed, divided))
    else:
        for x in batch.copies:
            made.append(partial(_forward, launch.triton_forward, x.q, x.k, x.v, pos, time, *numbers))
    return made, plan


def kernel_of(study: Study, plan: Any) -> str:
    """Which kernels a call of ``study`` took, once it ran on ``plan``."""
    if study.direction == BACKWARD:
        return "hstu_bwd_dq_kernel, hstu_bwd_dkdv_kernel"
    if study.direction == CACHED:
        return "hopper_target_kernel"
    for kit in plan.kits.values():
        for name, kernel in (("hopper", "hopper_fwd_kernel"), ("hopper_biased", "hopper_biased_kernel")):
            if getattr(kit, name, None) is not None:
                return kernel
    return "hstu_fwd_kernel"


def same(one: Results, other: Results) -> bool:
    """Whether both are the same bits."""
    pairs = zip(one, other, strict=True)
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def _forward(run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Results:
    return (run(q.detach(), k.detach(), v.detach(), *rest),)


def _cached(batch: Batch, copy: Copy) -> list[Make]:
    run = copy.module("target_launch").triton_target_attention
    layout, total = batch.layout, batch.case.total_rows
    history = layout.row_indices(total) < layout.history_ends(total)
    assert layout.num_targets is not None
    targets, kept = JaggedLayout.from_lengths(layout.num_targets), layout.without_targets()

    def call(inputs: tuple[Tensor, ...], cache: LayerKV) -> Results:
        numbers = {"alpha": batch.alpha, "scale": batch.scale}
        return (run(*inputs, cache, targets, batch.case.mask, bias=None, **numbers),)

    made: list[Make] = []
    for x in batch.copies:
        inputs = tuple(y.detach()[~history] for y in (x.q, x.k, x.v))
        cache = LayerKV(x.k.detach()[history], x.v.detach()[history], kept)
        made.append(partial(call, inputs, cache))
    return made
