"""What a tile of targets adds up over its user's cached history."""

import triton
import triton.language as tl

from hstu_kernels.attention.triton.primitives import load_rows, load_times, position_index, scaled_silu, silu
from hstu_kernels.attention.triton.time_buckets import lookup, wide_bucket


@triton.jit
def _add_cached(
    acc,
    q,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    k_row_stride,
    v_row_stride,
    k_column,
    v_column,
    begin,
    lowest,
    prefix_end,
    history_end,
    row_times,
    cache_start,
    rab_ptr,
    pos_ptr,
    time_ptr,
    bounds_ptr,
    key_times_ptr,
    alpha,
    SHAPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """``acc [M, Dv]`` plus what the cached block at ``begin`` adds; COLUMNS: the bias depends on the column alone."""
    BLOCK_N: tl.constexpr = SHAPE.block_n
    cols = begin + tl.arange(0, BLOCK_N)
    # [N, Dqk], [N, Dv]
    k = load_rows(
        k_ptr,
        k_desc,
        k_row_stride,
        k_column,
        cache_start,
        begin,
        history_end,
        BLOCK_N,
        SHAPE.qk_dim,
        SHAPE.block_qk,
        EDGE,
        SHAPE.descriptors,
    )
    v = load_rows(
        v_ptr,
        v_desc,
        v_row_stride,
        v_column,
        cache_start,
        begin,
        history_end,
        BLOCK_N,
        SHAPE.v_dim,
        SHAPE.block_v,
        EDGE,
        SHAPE.descriptors,
    )
    # [M, N]
    products = tl.dot(q, tl.trans(k), input_precision=SHAPE.precision)
    if COLUMNS:
        if SHAPE.reach >= 0 or SHAPE.buckets >= 0:
            if EDGE:
                rab = tl.load(rab_ptr + cache_start + cols, mask=cols < history_end, other=0.0)
            else:
                rab = tl.load(rab_ptr + cache_start + cols)
            weights = silu(products * alpha + rab[None, :], SHAPE)
        else:
            weights = scaled_silu(products, alpha, SHAPE)
    else:
        logits = products * alpha
        key_times = load_times(key_times_ptr, cache_start, cols, history_end, SHAPE)
        bucket = wide_bucket(row_times[:, None], key_times[None, :], bounds_ptr, SHAPE)
        logits += lookup(time_ptr, bucket, SHAPE)
        if SHAPE.reach >= 0:
            logits += tl.load(pos_ptr + position_index(history_end, cols, history_end, SHAPE))[None, :]
        weights = silu(logits, SHAPE)
    if EDGE:
        seen = (cols < prefix_end) | ((cols >= lowest) & (cols < history_end))
        weights = tl.where(seen[None, :], weights, 0.0)
    return tl.dot(weights.to(v.dtype), v, acc, input_precision=SHAPE.precision)


@triton.jit
def add_history(
    acc,
    q,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    k_row_stride,
    v_row_stride,
    k_column,
    v_column,
    split,
    row_times,
    cache_start,
    history_end,
    rab_ptr,
    pos_ptr,
    time_ptr,
    bounds_ptr,
    key_times_ptr,
    alpha,
    SHAPE: tl.constexpr,
    MASK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``acc [M, Dv]`` plus what the visible keys of stretch ``split`` add."""
    BLOCK_N: tl.constexpr = SHAPE.block_n
    SPLIT_BLOCKS: tl.constexpr = SPLIT_ROWS // BLOCK_N
    # Keys before prefix_end are visible, and those from `lowest` to the history end.
    prefix_end = history_end * 0
    lowest = prefix_end
    if MASK.window_targets and MASK.max_attn_len > 0:
        prefix_end = tl.minimum(SHAPE.contextual + MASK.global_prefix_len, history_end)
        lowest = tl.maximum(history_end - MASK.max_attn_len, prefix_end)
    prefix_blocks = tl.cdiv(prefix_end, BLOCK_N)
    first = tl.maximum(lowest // BLOCK_N, prefix_blocks)
    full = tl.maximum(tl.cdiv(lowest, BLOCK_N), prefix_blocks)
    full_end = tl.maximum(history_end // BLOCK_N, full)
    own_full = tl.maximum(full, split * SPLIT_BLOCKS)
    own_end = tl.minimum(full_end, (split + 1) * SPLIT_BLOCKS)
    for i in tl.range(own_end - own_full, num_stages=STAGES):
        acc = _add_cached(
            acc,
            q,
            k_ptr,
            v_ptr,
            k_desc,
            v_desc,
            k_row_stride,
            v_row_stride,
            k_column,
            v_column,
            (own_full + i) * BLOCK_N,
            lowest,
            prefix_end,
            history_end,
            row_times,
            cache_start,
            rab_ptr,
            pos_ptr,
            time_ptr,
            bounds_ptr,
            key_times_ptr,
            alpha,
            SHAPE,
            COLUMNS,
            False,
        )
    # The first stretch has the prefix and the block in which the window begins, the last one the history's last block.
    before_full = tl.where(split == 0, prefix_blocks + full - first, 0)
    last = tl.maximum(tl.cdiv(history_end, BLOCK_N) - full_end, 0)
    edges = before_full + tl.where(full_end // SPLIT_BLOCKS == split, last, 0)
    for i in tl.range(edges, num_stages=STAGES):
        block = tl.where(i < prefix_blocks, i, first + i - prefix_blocks)
        block = tl.where(i < before_full, block, full_end + i - before_full)
        acc = _add_cached(
            acc,
            q,
            k_ptr,
            v_ptr,
            k_desc,
            v_desc,
            k_row_stride,
            v_row_stride,
            k_column,
            v_column,
            block * BLOCK_N,
            lowest,
            prefix_end,
            history_end,
            row_times,
            cache_start,
            rab_ptr,
            pos_ptr,
            time_ptr,
            bounds_ptr,
            key_times_ptr,
            alpha,
            SHAPE,
            COLUMNS,
            True,
        )
    return acc
