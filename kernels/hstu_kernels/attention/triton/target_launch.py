"""Launch of the cached target attention: no list of tiles, nothing asked of the device, so graphs can capture it."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu_kernels.attention.triton import interpreting
from hstu_kernels.attention.triton.launch import addressable, describable, descriptors, strides
from hstu_kernels.attention.triton.schedule import device_boundaries
from hstu_kernels.attention.triton.target import hstu_target_bias_kernel, hstu_target_kernel, hstu_target_sum_kernel
from hstu_kernels.attention.triton.tiles import KernelShape, Tile, float32_precision, padded_width, tile_set
from hstu_kernels.bias import RelativeBias
from hstu_kernels.layout import JaggedLayout, LayerKV
from hstu_kernels.mask import AttentionMask

# Keys of a stretch: a program goes through one at most. Never chosen by the batch: a number may not depend on others.
SPLIT_ROWS = 2048
_BIAS_BLOCK = 256
_SUM_ROWS, _SUM_COLUMNS = 8, 256


def triton_target_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: LayerKV,
    layout: JaggedLayout,
    mask: AttentionMask,
    *,
    alpha: float,
    scale: float,
    bias: RelativeBias | None,
    tile: Tile | None = None,
    split_rows: int = SPLIT_ROWS,
) -> Tensor:
    """Arguments and result as `hstu_kernels.hstu_target_attention`, without autograd.

    ``layout`` may end before ``T`` and ``cache.layout`` before the cache's rows: what lies behind is not touched, and
    the rows of the result there hold anything. ``tile`` and ``split_rows`` for tests.
    """
    pos_table = None if bias is None else bias.pos_table
    time_table = None if bias is None else bias.time_table
    biased = pos_table is not None or time_table is not None
    tile = tile or tile_set(q.shape[2], v.shape[2], q.dtype, biased=biased).forward
    q, k, v, cache_k, cache_v = (addressable(x) for x in (q, k, v, cache.k, cache.v))
    shape = KernelShape(
        heads=q.shape[1],
        qk_dim=q.shape[2],
        v_dim=v.shape[2],
        block_qk=padded_width(q.shape[2]),
        block_v=padded_width(v.shape[2]),
        block_m=tile.block_m,
        block_n=tile.block_n,
        contextual=cache.layout.contextual_seq_len,
        reach=-1 if pos_table is None else (pos_table.numel() - 1) // 2,
        buckets=-1 if time_table is None else time_table.numel() - 1,
        exact=q.dtype == torch.float32 or interpreting(),
        descriptors=describable((cache_k, cache_v)),
        precision=float32_precision(),
        assembly=not interpreting(),
    )
    row_times = key_times = bounds = None
    if bias is not None and bias.time_table is not None:
        assert bias.row_timestamps is not None and bias.timestamps is not None
        row_times, key_times = bias.row_timestamps.contiguous(), bias.timestamps.contiguous()
        bounds = device_boundaries(bias.num_buckets, q.device)
    tables = [None if table is None else table.detach().float().contiguous() for table in (pos_table, time_table)]
    total, batch = q.shape[0], layout.batch_size
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if not out.numel():
        return out
    offsets = (layout.seq_offsets, cache.layout.seq_offsets, batch)
    rab = None
    if biased:
        rab = torch.empty(cache_k.shape[0], dtype=torch.float32, device=q.device)
        hstu_target_bias_kernel[(cache_k.shape[0] // _BIAS_BLOCK + batch,)](
            rab, *tables, bounds, row_times, key_times, *offsets, SHAPE=shape, BLOCK=_BIAS_BLOCK, num_warps=4
        )
    splits = max(1, -(-min(cache.layout.max_seq_len, cache_k.shape[0]) // split_rows))
    sums = None if splits == 1 else torch.empty(splits, *v.shape, dtype=torch.float32, device=v.device)
    slots = total // tile.block_m + batch
    hstu_target_kernel[(splits * slots * shape.heads,)](
        q,
        k,
        v,
        cache_k,
        cache_v,
        out,
        sums,
        *descriptors(shape, (cache_k, cache_v), tile.block_n),
        rab,
        *tables,
        bounds,
        row_times,
        key_times,
        *offsets,
        slots,
        total,
        *strides(q, k, v, cache_k, cache_v),
        alpha,
        scale,
        SHAPE=shape,
        MASK=mask,
        SPLIT_ROWS=split_rows,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if sums is not None:
        width = shape.heads * shape.v_dim
        hstu_target_sum_kernel[(total // _SUM_ROWS + batch, -(-width // _SUM_COLUMNS))](
            sums,
            out,
            *offsets,
            total,
            scale,
            WIDTH=width,
            BLOCK_M=_SUM_ROWS,
            BLOCK_W=_SUM_COLUMNS,
            SPLIT_ROWS=split_rows,
            num_warps=4,
        )
    return out
