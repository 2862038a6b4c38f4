"""From tensors to launches: tiles, results, and the autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu_kernels.attention.triton.arguments import Tables
from hstu_kernels.attention.triton.calls import GROUP, Call, divide
from hstu_kernels.attention.triton.exact import fixed_point
from hstu_kernels.attention.triton.jobs import POSITION_COPIES, Job
from hstu_kernels.attention.triton.schedule import TritonPlan
from hstu_kernels.attention.triton.tiles import TileSet
from hstu_kernels.bias import RelativeBias
from hstu_kernels.gradients import needs_gradient


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TritonPlan,
    *,
    alpha: float,
    scale: float,
    bias: RelativeBias | None,
    tiles: TileSet | None = None,
) -> Tensor:
    """Arguments and result as `hstu_kernels.hstu_attention`, with the batch already planned; ``tiles`` for tests."""
    pos_table = None if bias is None else bias.pos_table
    time_table = None if bias is None else bias.time_table
    if not needs_gradient(q, k, v, pos_table, time_table):
        return triton_forward(q, k, v, pos_table, time_table, plan, alpha, scale, tiles)
    # One argument for all that is no tensor: each costs on its way through autograd.
    options = (plan, alpha, scale, tiles)
    out: Tensor = _TritonAttention.apply(q, k, v, pos_table, time_table, options)  # type: ignore[no-untyped-call]
    return out


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pos_table: Tensor | None,
        time_table: Tensor | None,
        options: tuple[TritonPlan, float, float, TileSet | None],
    ) -> Tensor:
        divided = divide(pos_table, time_table, options[1])
        ctx.save_for_backward(q, k, v, pos_table, time_table)
        ctx.options = (options, divided)
        return triton_forward(q, k, v, pos_table, time_table, *options, divided)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (plan, alpha, scale, tiles), divided = ctx.options
        q, k, v, pos_table, time_table = ctx.saved_tensors
        options = (plan, alpha, scale, tiles, ctx.needs_input_grad[:5], divided)
        return *triton_backward(grad, q, k, v, pos_table, time_table, *options), None


def triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_table: Tensor | None,
    time_table: Tensor | None,
    plan: TritonPlan,
    alpha: float,
    scale: float,
    tiles: TileSet | None = None,
    divided: Tables | None = None,
) -> Tensor:
    """The forward alone, outside autograd.

    ``tiles``: other than those of the call's kind. ``divided``: the tables from `calls.divide`, where they are there.
    """
    divided = divide(pos_table, time_table, alpha) if divided is None else divided
    call = Call(q, k, v, pos_table, time_table, plan, alpha, scale, divided, tiles)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    if call.rows and not call.hopper(out):
        job = call.job("forward", call.tiles.forward)
        partial = job.sums(v)
        call.launch(job, (out, partial), call.inputs[1:])
        if partial is not None:
            job.join(out, partial, scale)
    return out


def triton_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_table: Tensor | None,
    time_table: Tensor | None,
    plan: TritonPlan,
    alpha: float,
    scale: float,
    tiles: TileSet | None,
    needed: Sequence[bool],
    divided: Tables | None = None,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and the two tables, outside autograd; ``None`` where ``needed`` says no.

    Under `torch.use_deterministic_algorithms` the bits of all of them repeat (`exact`); otherwise of all but that of
    the position table, to which programs add in the order in which they come.

    ``into``: where those of q, k and v go, if all of them are needed: ``[L, H, D]``, with rows of one stride (that of
    columns of one matrix) and contiguous heads.
    """
    need_q, need_k, need_v, need_pos, need_time = needed
    grad = grad.contiguous()
    divided = divide(pos_table, time_table, alpha) if divided is None else divided
    call = Call(q, k, v, pos_table, time_table, plan, alpha, scale, divided, tiles, grad, into)
    tiles = call.tiles
    dq = dk = dv = dpos = dtime = None
    # Right behind dq: what dk and dv read was there before it, their work list as well.
    early = need_q and not (need_pos or need_time)
    dkdv = call.job("dkdv", tiles.dkdv, early=early) if call.rows and (need_k or need_v) else None
    joins: list[tuple[Job, Tensor, Tensor | None, float]] = []
    if need_q or need_pos or need_time:
        dq = torch.empty_like(q, memory_format=torch.contiguous_format) if into is None else into[0]
        # The sums of the tables are gone before dk and dv take memory.
        dpos, dtime = _backward_of_queries(
            call, grad, dq, pos_table if need_pos else None, time_table if need_time else None, plan, scale, joins
        )
    if need_k or need_v:
        dk = torch.empty_like(k, memory_format=torch.contiguous_format) if into is None else into[1]
        dv = torch.empty_like(v, memory_format=torch.contiguous_format) if into is None else into[2]
        if dkdv is not None:
            partial, partial_v = dkdv.sums(k), dkdv.sums(v)
            call.launch(dkdv, (grad, dk, dv, partial, partial_v), (call.inputs[0], grad))
            joins += [(dkdv, dk, partial, call.alpha * scale), (dkdv, dv, partial_v, scale)]
    for job, gradient, sums, factor in joins:
        if sums is not None:
            job.join(gradient, sums, factor)
    if call.vanishes and dq is not None:
        dq.zero_()
    return dq if need_q else None, dk, dv, dpos, dtime


def _backward_of_queries(
    call: Call,
    grad: Tensor,
    dq: Tensor,
    pos_table: Tensor | None,
    time_table: Tensor | None,
    plan: TritonPlan,
    scale: float,
    joins: list[tuple[Job, Tensor, Tensor | None, float]],
) -> tuple[Tensor | None, Tensor | None]:
    """Write ``dq``; the gradients of the tables that are given. What is to be added up to ``dq`` goes to ``joins``."""
    q, _, v = call.inputs
    tiles = call.tiles
    pos_sums = factor = time_sums = late_sums = None
    if pos_table is not None:
        if torch.are_deterministic_algorithms_enabled():
            factor = fixed_point(grad, v, plan.layout.seq_offsets)
        dtype = torch.float32 if factor is None else torch.int64
        pos_sums = torch.zeros(POSITION_COPIES, pos_table.numel(), dtype=dtype, device=q.device)
    if time_table is not None:
        time_sums = call.time_sums(tiles.dq, call.heads)
    if call.rows:
        entries = 0 if time_sums is None else time_sums.shape[1]
        job = call.job("dq", tiles.dq, entries, None if pos_sums is None else pos_sums.dtype)
        partial = job.sums(q)
        call.launch(job, (grad, dq, partial), call.inputs[1:], (pos_sums, factor, time_sums))
        joins.append((job, dq, partial, call.alpha * scale))
        if time_sums is not None and not call.adds_by_warp(tiles.dq):
            late_sums = call.time_sums(tiles.bias, 1)
            call.launch(call.job("bias", tiles.bias, late_sums.shape[1]), (grad, late_sums))
    dpos = dtime = None
    if pos_sums is not None and pos_table is not None:
        total = added_up(pos_sums) if factor is None else pos_sums.sum(0) / factor.double()
        dpos = (total * scale).to(pos_table.dtype)
    if time_sums is not None and time_table is not None:
        total = added_up(time_sums)
        if late_sums is not None:
            total = total + added_up(late_sums)
        dtime = (total.sum(1)[: time_table.numel()] * scale).to(time_table.dtype)
    return dpos, dtime


def added_up(sums: Tensor) -> Tensor:
    """``sums [n, ...]`` over ``n``, a multiple of GROUP: groups in float32, which need no copy in float64, then all."""
    return torch.sum(sums.view(-1, GROUP, *sums.shape[1:]).sum(1), 0, dtype=torch.float64)
