"""Launch of the cached target attention: no list of tiles, nothing asked of the device, so graphs can capture it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hstu_kernels.attention.triton.arguments import Tables, addressable, panels, shape_of
from hstu_kernels.attention.triton.schedule import device_boundaries
from hstu_kernels.attention.triton.target import hstu_target_kernel
from hstu_kernels.attention.triton.tiles import Tile, float32_precision, tile_set, unpipelined
from hstu_kernels.bias import RelativeBias
from hstu_kernels.layout import JaggedLayout, LayerKV
from hstu_kernels.mask import AttentionMask
from hstu_kernels.triton.launcher import Variant


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
    rows, heads, qk_dim = q.shape
    tile = _tile(qk_dim, v.shape[2], q.dtype, biased, tile)
    row_times = key_times = bounds = None
    if bias is not None and bias.time_table is not None:
        assert bias.row_timestamps is not None and bias.timestamps is not None
        row_times, key_times = bias.row_timestamps.contiguous(), bias.timestamps.contiguous()
        bounds = device_boundaries(bias.num_buckets, q.device)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    strides: list[int] = []
    inputs = []
    for x in (q, k, v, cache.k, cache.v):
        x, row, head = addressable(x)
        inputs.append(x)
        strides += (row, head)
    described = panels((inputs[3], inputs[4]), tile.block_n)
    kernel = _variant(
        heads,
        qk_dim,
        v.shape[2],
        q.dtype,
        mask,
        cache.layout.contextual_seq_len,
        -1 if pos_table is None else (pos_table.numel() - 1) // 2,
        -1 if time_table is None else time_table.numel() - 1,
        float32_precision() if q.dtype == torch.float32 else "ieee",
        tile,
        described is not None,
    )
    slots = rows // tile.block_m + layout.batch_size
    kernel(
        slots * heads,
        (
            *inputs,
            out,
            *(described or (None, None)),
            *_in_float32(pos_table, time_table),
            bounds,
            row_times,
            key_times,
            layout.seq_offsets,
            cache.layout.seq_offsets,
        ),
        (layout.batch_size, *strides, float(alpha), float(scale)),
    )
    return out


@functools.lru_cache(maxsize=64)
def _tile(qk_dim: int, v_dim: int, dtype: torch.dtype, biased: bool, chosen: Tile | None) -> Tile:
    tile = chosen or tile_set(qk_dim, v_dim, dtype, biased=biased).forward
    return unpipelined(tile) if biased else tile


@functools.lru_cache(maxsize=512)
def _variant(
    heads: int,
    qk_dim: int,
    v_dim: int,
    dtype: torch.dtype,
    mask: AttentionMask,
    contextual: int,
    reach: int,
    buckets: int,
    precision: str,
    tile: Tile,
    descriptors: bool,
) -> Variant:
    shape = shape_of(heads, qk_dim, v_dim, dtype, contextual, reach, buckets, precision, tile, descriptors)
    return Variant(hstu_target_kernel, SHAPE=shape, MASK=mask, num_warps=tile.num_warps, num_stages=tile.num_stages)


def _in_float32(pos_table: Tensor | None, time_table: Tensor | None) -> Tables:
    if pos_table is None and time_table is None:
        return None, None
    pos, time = (None if table is None else table.detach().float().contiguous() for table in (pos_table, time_table))
    return pos, time
