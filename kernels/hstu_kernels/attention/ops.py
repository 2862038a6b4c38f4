"""The attention as operators of the dispatcher: what ``torch.compile``, ``torch.export`` and graph capture see of it.

Only tensors and numbers cross the boundary: the fields of `JaggedLayout`, `AttentionMask` and `RelativeBias` one by
one, and for Triton the work lists and behind them the spans of time. Each of these is an operator of its own, so that a
compiler computes it once for all layers; its length is known from the shapes, so that nothing waits for the device. The
backend travels as a string: each operator is registered once, for every device, and runs the backend it is told to.
Imports no Triton.

Values inside ``seq_offsets`` and ``num_targets`` are not checked here: a traced program cannot look at them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hstu_kernels.attention.eager import eager_backward, eager_forward, plan_eager
from hstu_kernels.attention.triton import TritonPlan, plan_triton
from hstu_kernels.attention.triton.schedule import (
    LINE,
    block_spans,
    device_boundaries,
    list_length,
    long_tiles,
    piece_slots,
)
from hstu_kernels.attention.triton.tiles import tile_set
from hstu_kernels.backend import Backend, UnsupportedBackend
from hstu_kernels.bias import RelativeBias, next_event_timestamps
from hstu_kernels.layout import JaggedLayout
from hstu_kernels.mask import AttentionMask

_GEOMETRY = "Tensor seq_offsets, Tensor? num_targets, int contextual_seq_len"
_MASK = (
    "int max_attn_len, int global_prefix_len, int full_attn_tail_len, bool window_targets, bool contextual_sees_history"
)
_BIAS = "Tensor? pos_table, Tensor? time_table, Tensor? timestamps, Tensor? row_timestamps"
_CALL = f"Tensor q, Tensor k, Tensor v, {_BIAS}, {_GEOMETRY}, Tensor[] work, {_MASK}"
_NUMBERS = "float alpha, float scale, str backend"

WorkKey = tuple[str, int, int]


def operator_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: JaggedLayout,
    mask: AttentionMask,
    *,
    alpha: float,
    scale: float,
    bias: RelativeBias | None,
    backend: Backend,
) -> Tensor:
    """Arguments and result as `hstu_kernels.hstu_attention`, through the operators.

    Raises:
        UnsupportedBackend: for the oracle, which reads every length.
    """
    if backend not in (Backend.EAGER, Backend.TRITON):
        raise UnsupportedBackend(f"backend: {backend.value} cannot be compiled or exported; use backend='eager'")
    bias = bias or RelativeBias()
    geometry = (layout.seq_offsets, layout.num_targets, layout.contextual_seq_len)
    structure = _fields(mask)
    work = []
    if backend is Backend.TRITON:
        biased = bias.pos_table is not None or bias.time_table is not None
        for side, block_m, block_n in work_keys(q.shape[2], v.shape[2], q.dtype, biased, mask.max_attn_len > 0):
            work.append(attention_work(*geometry, *structure, q.shape[0], side, block_m, block_n))
        if bias.time_table is not None:
            asked = (bias.timestamps, bias.row_timestamps)
            for side, block in span_keys(q.shape[2], v.shape[2], q.dtype):
                work.append(attention_spans(*asked, *geometry, side, block))
    times = (bias.timestamps, bias.row_timestamps) if bias.time_table is not None else (None, None)
    tables = (bias.pos_table, bias.time_table)
    out: Tensor = attention_forward(
        q, k, v, *tables, *times, *geometry, work, *structure, float(alpha), float(scale), backend.value
    )
    return out


def work_keys(qk_dim: int, v_dim: int, dtype: torch.dtype, biased: bool, windowed: bool) -> tuple[WorkKey, ...]:
    """Sides and tiles of the lists that the kernels of these widths read, each once."""
    tiles = tile_set(qk_dim, v_dim, dtype, biased=biased, windowed=windowed)
    sides = [("query", tiles.forward), ("query", tiles.dq), ("key", tiles.dkdv)]
    if biased:
        sides.append(("query", tiles.bias))
    return tuple(dict.fromkeys((side, tile.block_m, tile.block_n) for side, tile in sides))


def span_keys(qk_dim: int, v_dim: int, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    """Sides and blocks of the spans of time that the kernels of these widths read, each once."""
    tiles = tile_set(qk_dim, v_dim, dtype, biased=True)
    sides = [("key", tiles.forward.block_n), ("key", tiles.dq.block_n), ("query", tiles.dkdv.block_m)]
    return tuple(dict.fromkeys(sides))


def _fields(mask: AttentionMask) -> tuple[int, int, int, bool, bool]:
    return (
        mask.max_attn_len,
        mask.global_prefix_len,
        mask.full_attn_tail_len,
        mask.window_targets,
        mask.contextual_sees_history,
    )


def _mask(fields: tuple[Any, ...]) -> AttentionMask:
    names = ("max_attn_len", "global_prefix_len", "full_attn_tail_len", "window_targets", "contextual_sees_history")
    return AttentionMask(**dict(zip(names, fields, strict=True)))


@torch.library.custom_op(
    "hstu_kernels::attention_work",
    mutates_args=(),
    schema=f"({_GEOMETRY}, {_MASK}, SymInt total_rows, str side, int block_m, int block_n) -> Tensor",
)
def attention_work(seq_offsets: Tensor, num_targets: Tensor | None, contextual_seq_len: int, *fields: Any) -> Tensor:
    """``[tiles, LINE]`` int64: the work list of one side for one tile."""
    *structure, total_rows, side, block_m, block_n = fields
    layout = _layout(seq_offsets, total_rows, num_targets, contextual_seq_len)
    plan = plan_triton(layout, _mask(tuple(structure)), None, total_rows)
    return plan.query_work(block_m, block_n) if side == "query" else plan.key_work(block_m, block_n)


@attention_work.register_fake
def _(seq_offsets: Tensor, num_targets: Tensor | None, contextual_seq_len: int, *fields: Any) -> Tensor:
    *structure, total_rows, side, block_m, block_n = fields
    own = block_m if side == "query" else block_n
    pieces = long_tiles(side, _mask(tuple(structure)), contextual_seq_len, own) * piece_slots(total_rows)
    return seq_offsets.new_empty(pieces + list_length(total_rows, seq_offsets.shape[0] - 1, own), LINE)


def _layout(
    seq_offsets: Tensor, total_rows: int, num_targets: Tensor | None = None, contextual_seq_len: int = 0
) -> JaggedLayout:
    """A layout whose bound on the lengths leaves the length of work lists to the shapes alone."""
    return JaggedLayout(seq_offsets, total_rows + 1, num_targets, contextual_seq_len)


@torch.library.custom_op(
    "hstu_kernels::attention_spans",
    mutates_args=(),
    schema=f"(Tensor timestamps, Tensor? row_timestamps, {_GEOMETRY}, str side, int block) -> Tensor",
)
def attention_spans(timestamps: Tensor, row_timestamps: Tensor | None, *others: Any) -> Tensor:
    """``[L, 2]`` int64: the earliest and latest time of each block of one side."""
    seq_offsets, num_targets, _, side, block = others
    layout = JaggedLayout(seq_offsets, timestamps.shape[0], num_targets)
    return block_spans(timestamps if side == "key" else _asked(timestamps, row_timestamps, layout), layout, block)


@attention_spans.register_fake
def _(timestamps: Tensor, row_timestamps: Tensor | None, *others: Any) -> Tensor:
    return timestamps.new_empty(timestamps.shape[0], 2)


def _asked(timestamps: Tensor, row_timestamps: Tensor | None, layout: JaggedLayout) -> Tensor:
    return next_event_timestamps(timestamps, layout) if row_timestamps is None else row_timestamps


@torch.library.custom_op("hstu_kernels::attention_forward", mutates_args=(), schema=f"({_CALL}, {_NUMBERS}) -> Tensor")
def attention_forward(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    """``[L, H, Dv]``, contiguous; the arguments are those of `operator_attention`, one by one."""
    call = _Call(q, k, v, *others)
    return call.forward()


@attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op(
    "hstu_kernels::attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_CALL}, {_NUMBERS}, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and the two tables; tensors without entries where none is ``needed``."""
    *arguments, needed = others
    call = _Call(q, k, v, *arguments)
    found = call.backward(grad, needed)
    return tuple(_none(q) if gradient is None or not n else gradient for gradient, n in zip(found, needed, strict=True))


@attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    needed, inputs = others[-1], (q, k, v, *others[:2])
    return tuple(x.new_empty(x.shape) if n else _none(q) for x, n in zip(inputs, needed, strict=True))


def _none(like: Tensor) -> Tensor:
    """An operator has to return a tensor."""
    return like.new_empty(0)


class _Call:
    """One call with its arguments put together again."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pos_table: Tensor | None,
        time_table: Tensor | None,
        timestamps: Tensor | None,
        row_timestamps: Tensor | None,
        seq_offsets: Tensor,
        num_targets: Tensor | None,
        contextual_seq_len: int,
        work: list[Tensor],
        *others: Any,
    ) -> None:
        *structure, self.alpha, self.scale, backend = others
        self.tensors = (q, k, v, pos_table, time_table)
        self.layout = _layout(seq_offsets, q.shape[0], num_targets, contextual_seq_len)
        self.mask = _mask(tuple(structure))
        self.bias = None
        if pos_table is not None or time_table is not None:
            self.bias = RelativeBias(pos_table, time_table, timestamps, row_timestamps)
        self.work = work
        self.backend = Backend(backend)

    def forward(self) -> Tensor:
        if self.backend is Backend.EAGER:
            plan = plan_eager(self.layout, self.mask, self.bias)
            return eager_forward(*self.tensors, plan, self.alpha, self.scale)
        from hstu_kernels.attention.triton.launch import triton_forward

        return triton_forward(*self.tensors, self._triton_plan(), self.alpha, self.scale, self._tiles())

    def backward(self, grad: Tensor, needed: list[bool]) -> tuple[Tensor | None, ...]:
        if self.backend is Backend.EAGER:
            plan = plan_eager(self.layout, self.mask, self.bias)
            return eager_backward(grad, *self.tensors, plan, self.alpha, self.scale)
        from hstu_kernels.attention.triton.launch import triton_backward

        plan_, tiles = self._triton_plan(), self._tiles()
        return triton_backward(grad, *self.tensors, plan_, self.alpha, self.scale, tiles, needed)

    def _tiles(self) -> Any:
        q, _, v = self.tensors[:3]
        assert q is not None and v is not None
        windowed = self.mask.max_attn_len > 0
        return tile_set(q.shape[2], v.shape[2], q.dtype, biased=self.bias is not None, windowed=windowed)

    def _triton_plan(self) -> TritonPlan:
        q, _, v, _, time_table = self.tensors
        assert q is not None and v is not None
        asked = known = bounds = None
        windowed = self.mask.max_attn_len > 0
        keys: tuple[Any, ...] = work_keys(q.shape[2], v.shape[2], q.dtype, self.bias is not None, windowed)
        lists = dict(zip(keys, self.work, strict=False))
        spans = {}
        if self.bias is not None and time_table is not None:
            known = self.bias.timestamps
            assert known is not None
            asked = _asked(known, self.bias.row_timestamps, self.layout).contiguous()
            known, bounds = known.contiguous(), device_boundaries(self.bias.num_buckets, q.device)
            keys = span_keys(q.shape[2], v.shape[2], q.dtype)
            spans = dict(zip(keys, self.work[len(lists) :], strict=True))
        return TritonPlan(self.layout, self.mask, asked, known, bounds, q.shape[0], lists, spans=spans)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    head, work, tail = inputs[:10], inputs[10], inputs[11:]
    *tensors, ctx.contextual_seq_len = head
    ctx.save_for_backward(*tensors, *work)
    ctx.tail = tail


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    tensors, work = saved[:9], saved[9:]
    needed = [bool(n) for n in ctx.needs_input_grad[:5]]
    found = attention_backward(grad, *tensors, ctx.contextual_seq_len, work, *ctx.tail, needed)
    gradients = [gradient if n else None for gradient, n in zip(found, needed, strict=True)]
    # One entry for each input, and for the work lists one for each list.
    rest = [None] * (10 - len(gradients))
    return *gradients, *rest, [None] * len(work), *([None] * len(ctx.tail))


attention_forward.register_autograd(_backward, setup_context=_setup_context)
