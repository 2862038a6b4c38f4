"""Launch of the cached target attention: no list of tiles, nothing asked of the device, so graphs can capture it."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu_kernels.attention.triton import interpreting
from hstu_kernels.attention.triton.launch import addressable, describable, descriptors, strides
from hstu_kernels.attention.triton.schedule import device_boundaries
from hstu_kernels.attention.triton.target import hstu_target_kernel
from hstu_kernels.attention.triton.tiles import (
    KernelShape,
    Tile,
    float32_precision,
    padded_width,
    tile_set,
    unpipelined,
)
from hstu_kernels.bias import RelativeBias
from hstu_kernels.layout import JaggedLayout, LayerKV
from hstu_kernels.mask import AttentionMask


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
) -> Tensor:
    """Arguments and result as `hstu_kernels.hstu_target_attention`, without autograd; ``tile`` for tests."""
    pos_table = None if bias is None else bias.pos_table
    time_table = None if bias is None else bias.time_table
    biased = pos_table is not None or time_table is not None
    tile = tile or tile_set(q.shape[2], v.shape[2], q.dtype, biased=biased).forward
    tile = unpipelined(tile) if biased else tile
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
    )
    row_times = key_times = bounds = None
    if bias is not None and bias.time_table is not None:
        assert bias.row_timestamps is not None and bias.timestamps is not None
        row_times, key_times = bias.row_timestamps.contiguous(), bias.timestamps.contiguous()
        bounds = device_boundaries(bias.num_buckets, q.device)
    tables = (None if table is None else table.detach().float().contiguous() for table in (pos_table, time_table))
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if out.numel():
        slots = q.shape[0] // tile.block_m + layout.batch_size
        hstu_target_kernel[(slots * shape.heads,)](
            q,
            k,
            v,
            cache_k,
            cache_v,
            out,
            *descriptors(shape, (cache_k, cache_v), tile.block_n),
            *tables,
            bounds,
            row_times,
            key_times,
            layout.seq_offsets,
            cache.layout.seq_offsets,
            layout.batch_size,
            *strides(q, k, v, cache_k, cache_v),
            alpha,
            scale,
            SHAPE=shape,
            MASK=mask,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out
