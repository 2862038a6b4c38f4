"""Launch of the cached target attention: no list of tiles, nothing asked of the device, so graphs can capture it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hstu_kernels.attention.triton.arguments import Facts, Tables, addressable, facts_of, panels, shape_of
from hstu_kernels.attention.triton.hopper_launch import multiprocessors
from hstu_kernels.attention.triton.hopper_target_launch import fits, hopper_target_attention, tiles_of
from hstu_kernels.attention.triton.schedule import device_boundaries
from hstu_kernels.attention.triton.target import hstu_target_kernel
from hstu_kernels.attention.triton.target_sums import hstu_target_bias_kernel, hstu_target_sum_kernel
from hstu_kernels.attention.triton.tiles import Tile, tile_set
from hstu_kernels.bias import RelativeBias
from hstu_kernels.layout import JaggedLayout, LayerKV
from hstu_kernels.mask import AttentionMask
from hstu_kernels.triton.launcher import Variant

# Keys of a stretch, whose sums are added up. Never chosen by the batch: a number may not depend on others.
SPLIT_ROWS = 2048
# Tiles for each multiprocessor from which on Hopper's programs go through whole histories: they fill it as they are,
# and the sums of stretches cost a fifth.
_PLENTY = 2
# Targets of a user, on average, up to which tiles of 128 are half empty, and the other kernel with its 64 is ahead.
_FEW_TARGETS = 64
_BIAS_BLOCK = 256
_SUM_ROWS, _SUM_COLUMNS = 8, 256
_tile_set = functools.lru_cache(maxsize=64)(tile_set)


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
    the rows of the result there hold anything. For tests: ``tile`` and ``split_rows``.
    """
    pos_table = None if bias is None else bias.pos_table
    time_table = None if bias is None else bias.time_table
    biased = pos_table is not None or time_table is not None
    rows, heads, qk_dim = q.shape
    own_choice = tile is None
    tile = tile or _tile_set(qk_dim, v.shape[2], q.dtype, biased=biased).forward
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
    batch, cached = layout.batch_size, cache.k.shape[0]
    offsets = (layout.seq_offsets, cache.layout.seq_offsets)
    splits = max(1, -(-min(cache.layout.max_seq_len, cached) // split_rows))
    if own_choice and not biased and fits(q, v, mask):
        parts = (splits, split_rows)
        if _by_hopper(inputs, cache, layout, out, parts, alpha=alpha, scale=scale):
            return out
    sums = None if splits == 1 else torch.empty(splits, *v.shape, dtype=torch.float32, device=v.device)
    described = panels((inputs[3], inputs[4]), tile.block_n)
    facts = facts_of(q, v, cache.layout.contextual_seq_len, pos_table, time_table)
    bias_arrays = (*_in_float32(pos_table, time_table), bounds, row_times, key_times)
    rab = None
    if biased:
        rab = torch.empty(cached, dtype=torch.float32, device=q.device)
        _variant("bias", None, split_rows, facts, tile, False)(
            cached // _BIAS_BLOCK + batch, (rab, *bias_arrays, *offsets), (batch,)
        )
    slots = rows // tile.block_m + batch
    _variant("target", mask, split_rows, facts, tile, described is not None)(
        splits * slots * heads,
        (*inputs, out, sums, *(described or (None, None)), rab, *bias_arrays, *offsets),
        (batch, slots, rows, *strides, float(alpha), float(scale)),
    )
    if sums is not None:
        _add_stretches(sums, out, offsets, batch, float(scale), split_rows)
    return out


def _by_hopper(
    inputs: Sequence[Tensor],
    cache: LayerKV,
    layout: JaggedLayout,
    out: Tensor,
    parts: tuple[int, int],
    *,
    alpha: float,
    scale: float,
) -> bool:
    """Write ``out`` by the kernel that is for Hopper alone, where it wins; which kernel runs changes no bit.

    ``parts``: stretches of the longest history and rows of one.
    """
    splits, split_rows = parts
    rows, heads, _ = out.shape
    if rows <= _FEW_TARGETS * layout.batch_size:
        return False
    sums = None
    if splits > 1 and tiles_of(layout, rows, heads) < _PLENTY * multiprocessors(out.get_device()):
        sums = torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)
    if not hopper_target_attention(
        inputs, cache.layout, layout, alpha=alpha, scale=scale, out=out, sums=sums, split_rows=split_rows
    ):
        return False
    if sums is not None:
        offsets = (layout.seq_offsets, cache.layout.seq_offsets)
        _add_stretches(sums, out, offsets, layout.batch_size, float(scale), split_rows)
    return True


def _add_stretches(
    sums: Tensor, out: Tensor, offsets: tuple[Tensor, Tensor], batch: int, scale: float, split_rows: int
) -> None:
    """Write ``out [T, H, Dv]``: the ``sums [stretches, T, H, Dv]`` in float32 that a history has, times ``scale``."""
    rows, heads, width = out.shape
    programs = (rows // _SUM_ROWS + batch) * -(-heads * width // _SUM_COLUMNS)
    _adder(heads * width, split_rows)(programs, (sums, out, *offsets), (batch, rows, scale))


@functools.lru_cache(maxsize=512)
def _variant(
    role: str, mask: AttentionMask | None, split_rows: int, facts: Facts, tile: Tile, descriptors: bool
) -> Variant:
    shape = shape_of(facts, tile, descriptors)
    if role == "bias":
        return Variant(hstu_target_bias_kernel, SHAPE=shape, BLOCK=_BIAS_BLOCK, num_warps=4)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    constants = {"SHAPE": shape, "MASK": mask, "SPLIT_ROWS": split_rows, "STAGES": tile.num_stages}
    return Variant(hstu_target_kernel, **constants, **options)


@functools.lru_cache(maxsize=64)
def _adder(width: int, split_rows: int) -> Variant:
    blocks = {"BLOCK_M": _SUM_ROWS, "BLOCK_W": _SUM_COLUMNS}
    return Variant(hstu_target_sum_kernel, WIDTH=width, **blocks, SPLIT_ROWS=split_rows, num_warps=4)


def _in_float32(pos_table: Tensor | None, time_table: Tensor | None) -> Tables:
    if pos_table is None and time_table is None:
        return None, None
    pos, time = (None if table is None else table.detach().float().contiguous() for table in (pos_table, time_table))
    return pos, time
