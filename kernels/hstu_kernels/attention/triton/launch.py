"""From tensors to launches: strides, tiles, work lists, and the autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from hstu_kernels.attention.triton import interpreting
from hstu_kernels.attention.triton.backward import hstu_bwd_dkdv_kernel, hstu_bwd_dq_kernel
from hstu_kernels.attention.triton.bias_grad import hstu_bwd_bias_kernel
from hstu_kernels.attention.triton.forward import hstu_fwd_kernel
from hstu_kernels.attention.triton.join import hstu_join_kernel
from hstu_kernels.attention.triton.schedule import TritonPlan
from hstu_kernels.attention.triton.tiles import KernelShape, Tile, TileSet, float32_precision, padded_width, tile_set
from hstu_kernels.bias import RelativeBias

# Partial sums of the position table that programs share; more of them: fewer programs wait for one address.
POSITION_COPIES = 32
# Rows of a long tile that one program adds up.
_JOINED_ROWS = 16
# Offsets inside a tile are int32: 256 rows of a stride below this never overflow.
_LARGEST_STRIDE = 1 << 22
# Beneath it a logit's product is nothing beside any bias.
_LEAST_ALPHA = 2.0**-100


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
    biased = pos_table is not None or time_table is not None
    tiles = tiles or tile_set(q.shape[2], v.shape[2], q.dtype, biased=biased)
    out: Tensor = _TritonAttention.apply(q, k, v, pos_table, time_table, plan, alpha, scale, tiles)  # type: ignore[no-untyped-call]
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
        plan: TritonPlan,
        alpha: float,
        scale: float,
        tiles: TileSet,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, pos_table, time_table)
        ctx.plan, ctx.alpha, ctx.scale, ctx.tiles = plan, alpha, scale, tiles
        return triton_forward(q, k, v, pos_table, time_table, plan, alpha, scale, tiles)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, pos_table, time_table = ctx.saved_tensors
        options = (ctx.plan, ctx.alpha, ctx.scale, ctx.tiles, ctx.needs_input_grad[:5])
        return *triton_backward(grad, q, k, v, pos_table, time_table, *options), None, None, None, None


def triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_table: Tensor | None,
    time_table: Tensor | None,
    plan: TritonPlan,
    alpha: float,
    scale: float,
    tiles: TileSet,
) -> Tensor:
    """The forward alone, outside autograd."""
    q, alpha = _divisible(q, alpha)
    q, k, v = addressable(q), addressable(k), addressable(v)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    tile = tiles.forward
    work = plan.query_work(tile.block_m, tile.block_n)
    shape = _kernel_shape(q, v, (k, v), pos_table, time_table, plan, tile)
    pieces = _Pieces(plan, "query", tile.block_m, q)
    partial = pieces.sums(tile.block_m, shape.block_v)
    if out.numel():
        hstu_fwd_kernel[(work.shape[0] * shape.heads,)](
            q,
            k,
            v,
            out,
            partial,
            *descriptors(shape, (k, v), tile.block_n),
            *_bias_arguments(pos_table, time_table, plan, alpha),
            plan.block_spans("key", tile.block_n),
            work,
            *strides(q, k, v),
            alpha,
            scale,
            pieces.count,
            SHAPE=shape,
            MASK=plan.mask,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        pieces.join(out, partial, work, scale)
    return out


class _Pieces:
    """The pieces of long tiles at the front of a work list: their partial sums, and what adds them up."""

    def __init__(self, plan: TritonPlan, side: str, block: int, like: Tensor) -> None:
        self.long, self.count = plan.pieces(side, block)
        self.heads, self.device = like.shape[1], like.device

    def sums(self, rows: int, width: int) -> Tensor | None:
        """``[pieces, H, rows, width]`` float32; ``None`` where no tile is cut."""
        if not self.count:
            return None
        return torch.empty(self.count, self.heads, rows, width, dtype=torch.float32, device=self.device)

    def join(self, out: Tensor, partial: Tensor | None, work: Tensor, factor: float) -> None:
        """Add ``partial`` up and write ``out``, times ``factor``."""
        if partial is None:
            return
        rows, width = partial.shape[2:]
        part = min(rows, _JOINED_ROWS)
        hstu_join_kernel[(self.count * self.heads * (rows // part),)](
            out,
            partial,
            work,
            self.count,
            factor,
            HEADS=self.heads,
            LONG=self.long,
            TILE=rows,
            ROWS=part,
            WIDTH=out.shape[2],
            BLOCK=width,
            num_warps=4,
        )


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
    tiles: TileSet,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and the two tables, outside autograd; ``None`` where ``needed`` says no."""
    need_q, need_k, need_v, need_pos, need_time = needed
    q, divisor = _divisible(q, alpha)
    vanishes, alpha = divisor != alpha, divisor
    q, k, v, grad = addressable(q), addressable(k), addressable(v), grad.contiguous()
    common = _bias_arguments(pos_table, time_table, plan, alpha)
    steps = strides(q, k, v)
    dq = dk = dv = None
    pos_sums, time_sums = _table_sums(
        q, pos_table if need_pos else None, time_table if need_time else None, plan, tiles
    )
    if need_q or need_pos or need_time:
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        tile = tiles.dq
        work = plan.query_work(tile.block_m, tile.block_n)
        shape = _kernel_shape(q, v, (k, v), pos_table, time_table, plan, tile)
        pieces = _Pieces(plan, "query", tile.block_m, q)
        partial = pieces.sums(tile.block_m, shape.block_qk)
        if dq.numel():
            hstu_bwd_dq_kernel[(work.shape[0] * shape.heads,)](
                q,
                k,
                v,
                grad,
                dq,
                partial,
                *descriptors(shape, (k, v), tile.block_n),
                *common,
                plan.block_spans("key", tile.block_n),
                pos_sums,
                time_sums,
                work,
                *steps,
                alpha,
                scale,
                pieces.count,
                SHAPE=shape,
                MASK=plan.mask,
                ENTRIES=0 if time_sums is None else time_sums.shape[1],
                COPIES=POSITION_COPIES,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
            pieces.join(dq, partial, work, alpha * scale)
    if need_k or need_v:
        dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        tile = tiles.dkdv
        work = plan.key_work(tile.block_m, tile.block_n)
        shape = _kernel_shape(q, v, (q, grad), pos_table, time_table, plan, tile)
        pieces = _Pieces(plan, "key", tile.block_n, q)
        partial, partial_v = pieces.sums(tile.block_n, shape.block_qk), pieces.sums(tile.block_n, shape.block_v)
        if dk.numel():
            hstu_bwd_dkdv_kernel[(work.shape[0] * shape.heads,)](
                q,
                k,
                v,
                grad,
                dk,
                dv,
                partial,
                partial_v,
                *descriptors(shape, (q, grad), tile.block_m),
                *common,
                plan.block_spans("query", tile.block_m),
                work,
                *steps,
                alpha,
                scale,
                pieces.count,
                SHAPE=shape,
                MASK=plan.mask,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
            pieces.join(dk, partial, work, alpha * scale)
            pieces.join(dv, partial_v, work, scale)
    if time_sums is not None and q.numel():
        tile = tiles.bias
        work = plan.query_work(tile.block_m, tile.block_n)
        hstu_bwd_bias_kernel[(work.shape[0],)](
            q,
            k,
            v,
            grad,
            time_sums[work.shape[0] * q.shape[1] :],
            *common,
            plan.block_spans("key", tile.block_n),
            work,
            *steps,
            alpha,
            SHAPE=_kernel_shape(q, v, (), pos_table, time_table, plan, tile),
            MASK=plan.mask,
            ENTRIES=time_sums.shape[1],
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    if vanishes and dq is not None:
        dq.zero_()
    dpos, dtime = _add_up(pos_sums, pos_table, scale), _add_up(time_sums, time_table, scale)
    return dq if need_q else None, dk, dv, dpos, dtime


def _table_sums(
    q: Tensor, pos_table: Tensor | None, time_table: Tensor | None, plan: TritonPlan, tiles: TileSet
) -> tuple[Tensor | None, Tensor | None]:
    """Partial sums in float32: ``[POSITION_COPIES, 2N - 1]`` that programs add to, and a line for each program.

    The lines are those of `hstu_bwd_dq_kernel` and, behind them, those of `hstu_bwd_bias_kernel`.
    """
    pos_sums = time_sums = None
    if pos_table is not None:
        pos_sums = torch.zeros(POSITION_COPIES, pos_table.numel(), dtype=torch.float32, device=q.device)
    if time_table is not None:
        lines = plan.query_work(tiles.dq.block_m, tiles.dq.block_n).shape[0] * (q.shape[1] + 1)
        entries = padded_width(time_table.numel())
        time_sums = torch.zeros(lines if q.numel() else 0, entries, dtype=torch.float32, device=q.device)
    return pos_sums, time_sums


def _add_up(sums: Tensor | None, table: Tensor | None, scale: float) -> Tensor | None:
    """The gradient of ``table``: partial sums added up in float64."""
    if sums is None or table is None:
        return None
    return (sums.sum(0, dtype=torch.float64)[: table.numel()] * scale).to(table.dtype)


def _kernel_shape(
    q: Tensor,
    v: Tensor,
    streamed: tuple[Tensor, ...],
    pos_table: Tensor | None,
    time_table: Tensor | None,
    plan: TritonPlan,
    tile: Tile,
) -> KernelShape:
    return KernelShape(
        heads=q.shape[1],
        qk_dim=q.shape[2],
        v_dim=v.shape[2],
        block_qk=padded_width(q.shape[2]),
        block_v=padded_width(v.shape[2]),
        block_m=tile.block_m,
        block_n=tile.block_n,
        contextual=plan.layout.contextual_seq_len,
        reach=-1 if pos_table is None else (pos_table.numel() - 1) // 2,
        buckets=-1 if time_table is None else time_table.numel() - 1,
        # The interpreter has no inline assembly, and float32 is worth the exact form.
        exact=q.dtype == torch.float32 or interpreting(),
        descriptors=describable(streamed),
        precision=float32_precision(),
        assembly=not interpreting(),
        own_in_registers=tile.own_in_registers if q.element_size() == 2 and not interpreting() else 0,
    )


def describable(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the tensor copy engine can fetch rows of these ``[L, H, D]`` tensors: a matter of chip and alignment."""
    return (
        bool(tensors)
        and all(
            x.element_size() == 2
            and x.shape[2] == padded_width(x.shape[2])
            and x.data_ptr() % 16 == 0
            and x.stride(0) % 8 == 0
            and x.stride(1) % 8 == 0
            # Rows and columns are 32-bit in a descriptor, and it wants some.
            and 0 < x.shape[0] < 1 << 31
            for x in tensors
        )
        and (interpreting() or torch.cuda.get_device_capability(tensors[0].device) >= (9, 0))
    )


def descriptors(shape: KernelShape, tensors: tuple[Tensor, ...], rows: int) -> tuple[TensorDescriptor | None, ...]:
    """One for each tensor, over its rows and the columns of all heads; None where the kernel takes pointers."""
    if not shape.descriptors:
        return (None,) * len(tensors)
    return tuple(
        TensorDescriptor(
            x, [x.shape[0], (x.shape[1] - 1) * x.stride(1) + x.shape[2]], [x.stride(0), 1], [rows, x.shape[2]]
        )
        for x in tensors
    )


def _bias_arguments(
    pos_table: Tensor | None, time_table: Tensor | None, plan: TritonPlan, alpha: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Tables in float32, divided by alpha: the kernels multiply the whole logit by it."""
    tables = [
        None if table is None else (table.detach().to(torch.float32) / alpha).contiguous()
        for table in (pos_table, time_table)
    ]
    return tables[0], tables[1], plan.boundaries, plan.row_times, plan.key_times


def _divisible(q: Tensor, alpha: float) -> tuple[Tensor, float]:
    """``q`` and ``alpha`` as they are; rows of 0 and 1.0 where ``alpha`` is too small to divide a bias by."""
    return (q, alpha) if abs(alpha) >= _LEAST_ALPHA else (torch.zeros_like(q), 1.0)


def strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:2])


def addressable(x: Tensor) -> Tensor:
    """``x`` itself where a kernel can address it: columns next to each other, rows not absurdly far apart."""
    return x if x.stride(2) == 1 and 0 < x.stride(0) < _LARGEST_STRIDE else x.contiguous()
