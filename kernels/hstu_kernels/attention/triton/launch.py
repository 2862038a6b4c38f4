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
from hstu_kernels.attention.triton.schedule import TritonPlan
from hstu_kernels.attention.triton.tiles import KernelShape, Tile, TileSet, float32_precision, padded_width, tile_set
from hstu_kernels.bias import RelativeBias

# Partial sums of the position table that programs share; more of them: fewer programs wait for one address.
POSITION_COPIES = 32
# Offsets inside a tile are int32: 256 rows of a stride below this never overflow.
_LARGEST_STRIDE = 1 << 22


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
    q, k, v = addressable(q), addressable(k), addressable(v)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    tile = tiles.forward
    work = plan.query_work(tile.block_m, tile.block_n)
    shape = _kernel_shape(q, v, (k, v), pos_table, time_table, plan, tile)
    if out.numel():
        hstu_fwd_kernel[(work.shape[0] * shape.heads,)](
            q,
            k,
            v,
            out,
            *descriptors(shape, (k, v), tile.block_n),
            *_bias_arguments(pos_table, time_table, plan),
            work,
            *strides(q, k, v),
            alpha,
            scale,
            SHAPE=shape,
            MASK=plan.mask,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
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
    tiles: TileSet,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and the two tables, outside autograd; ``None`` where ``needed`` says no."""
    need_q, need_k, need_v, need_pos, need_time = needed
    q, k, v, grad = addressable(q), addressable(k), addressable(v), grad.contiguous()
    common = _bias_arguments(pos_table, time_table, plan)
    steps = strides(q, k, v)
    dq = dk = dv = dpos = dtime = None
    if need_q:
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        tile = tiles.dq
        work = plan.query_work(tile.block_m, tile.block_n)
        shape = _kernel_shape(q, v, (k, v), pos_table, time_table, plan, tile)
        if dq.numel():
            hstu_bwd_dq_kernel[(work.shape[0] * shape.heads,)](
                q,
                k,
                v,
                grad,
                dq,
                *descriptors(shape, (k, v), tile.block_n),
                *common,
                work,
                *steps,
                alpha,
                scale,
                SHAPE=shape,
                MASK=plan.mask,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    if need_k or need_v:
        dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        tile = tiles.dkdv
        work = plan.key_work(tile.block_m, tile.block_n)
        shape = _kernel_shape(q, v, (q, grad), pos_table, time_table, plan, tile)
        if dk.numel():
            hstu_bwd_dkdv_kernel[(work.shape[0] * shape.heads,)](
                q,
                k,
                v,
                grad,
                dk,
                dv,
                *descriptors(shape, (q, grad), tile.block_m),
                *common,
                work,
                *steps,
                alpha,
                scale,
                SHAPE=shape,
                MASK=plan.mask,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    if need_pos or need_time:
        dpos, dtime = _table_gradients(q, k, v, grad, pos_table, time_table, plan, alpha, scale, tiles.bias)
    return dq, dk, dv, dpos, dtime


def _table_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    pos_table: Tensor | None,
    time_table: Tensor | None,
    plan: TritonPlan,
    alpha: float,
    scale: float,
    tile: Tile,
) -> tuple[Tensor | None, Tensor | None]:
    """Partial sums in float32 by the kernel, added up in float64 here."""
    work = plan.query_work(tile.block_m, tile.block_n)
    shape = _kernel_shape(q, v, (), pos_table, time_table, plan, tile)
    entries = padded_width(shape.buckets + 1)
    pos_sums = time_sums = None
    if pos_table is not None:
        pos_sums = torch.zeros(POSITION_COPIES, pos_table.numel(), dtype=torch.float32, device=q.device)
    if time_table is not None:
        time_sums = torch.zeros(work.shape[0], entries, dtype=torch.float32, device=q.device)
    if q.numel():
        hstu_bwd_bias_kernel[(work.shape[0],)](
            q,
            k,
            v,
            grad,
            pos_sums,
            time_sums,
            *_bias_arguments(pos_table, time_table, plan),
            work,
            *strides(q, k, v),
            alpha,
            SHAPE=shape,
            MASK=plan.mask,
            ENTRIES=entries,
            COPIES=POSITION_COPIES,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    dpos = dtime = None
    if pos_table is not None and pos_sums is not None:
        dpos = (pos_sums.sum(0, dtype=torch.float64) * scale).to(pos_table.dtype)
    if time_table is not None and time_sums is not None:
        total = time_sums.sum(0, dtype=torch.float64)[: time_table.numel()]
        dtime = (total * scale).to(time_table.dtype)
    return dpos, dtime


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
    pos_table: Tensor | None, time_table: Tensor | None, plan: TritonPlan
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    tables = [
        None if table is None else table.detach().to(torch.float32).contiguous() for table in (pos_table, time_table)
    ]
    return tables[0], tables[1], plan.boundaries, plan.row_times, plan.key_times


def strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:2])


def addressable(x: Tensor) -> Tensor:
    """``x`` itself where a kernel can address it: columns next to each other, rows not absurdly far apart."""
    return x if x.stride(2) == 1 and 0 < x.stride(0) < _LARGEST_STRIDE else x.contiguous()
