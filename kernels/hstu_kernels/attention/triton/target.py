"""The kernel of cached scoring: targets against cached histories and themselves (M-FALCON, HSTU section 3.4).

All targets of a user stand at the history end, so they see the same keys: whether a pair is visible depends on the
column alone. SiLU attention has no normaliser over keys; what a target adds to itself is one more term of the sum.
"""

import triton
import triton.language as tl

from hstu_kernels.attention.triton.primitives import add_bias, load_rows, load_tile, load_times, silu, store_tile


@triton.jit
def _find_tile(slot, offsets_ptr, batch_size, BLOCK_M: tl.constexpr):
    """Sequence and first row (inside it) of tile slot ``slot``; the row lies behind the end of an empty slot.

    Sequence ``b`` owns the slots from ``offsets[b] // BLOCK_M + b`` on: enough for its tiles, known without a list.
    """
    low = 0
    high = batch_size
    while high - low > 1:
        middle = (low + high) // 2
        first = (tl.load(offsets_ptr + middle) // BLOCK_M).to(tl.int32) + middle
        if first <= slot:
            low = middle
        else:
            high = middle
    first = (tl.load(offsets_ptr + low) // BLOCK_M).to(tl.int32) + low
    return low, (slot - first) * BLOCK_M


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
    pos_ptr,
    time_ptr,
    bounds_ptr,
    key_times_ptr,
    alpha,
    SHAPE: tl.constexpr,
    EDGE: tl.constexpr,
):
    """``acc [M, Dv]`` plus what the cached block at ``begin`` adds."""
    BLOCK_M: tl.constexpr = SHAPE.block_m
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
    key_times = load_times(key_times_ptr, cache_start, cols, history_end, SHAPE)
    # [M, N]
    logits = tl.dot(q, tl.trans(k), input_precision=SHAPE.precision) * alpha
    rows = tl.zeros([BLOCK_M], tl.int32) + history_end
    logits = add_bias(
        logits,
        rows[:, None],
        cols[None, :],
        row_times[:, None],
        key_times[None, :],
        history_end,
        pos_ptr,
        time_ptr,
        bounds_ptr,
        SHAPE,
    )
    weights = silu(logits, SHAPE)
    if EDGE:
        seen = (cols < prefix_end) | ((cols >= lowest) & (cols < history_end))
        weights = tl.where(seen[None, :], weights, 0.0)
    return tl.dot(weights.to(v.dtype), v, acc, input_precision=SHAPE.precision)


@triton.jit(do_not_specialize=["batch_size", "alpha", "scale"])
def hstu_target_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cache_k_ptr,
    cache_v_ptr,
    out_ptr,
    k_desc,
    v_desc,
    pos_ptr,
    time_ptr,
    bounds_ptr,
    row_times_ptr,
    key_times_ptr,
    offsets_ptr,
    cache_offsets_ptr,
    batch_size,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    cache_k_row_stride,
    cache_k_head_stride,
    cache_v_row_stride,
    cache_v_head_stride,
    alpha,
    scale,
    SHAPE: tl.constexpr,
    MASK: tl.constexpr,
):
    """``out [T, H, Dv]`` (contiguous); one program for each slot of a target tile and head."""
    HEADS: tl.constexpr = SHAPE.heads
    BLOCK_M: tl.constexpr = SHAPE.block_m
    BLOCK_N: tl.constexpr = SHAPE.block_n
    BLOCK_V: tl.constexpr = SHAPE.block_v
    program = tl.program_id(0)
    head = (program % HEADS).to(tl.int64)
    sequence, begin = _find_tile(program // HEADS, offsets_ptr, batch_size, BLOCK_M)
    start = tl.load(offsets_ptr + sequence)
    length = (tl.load(offsets_ptr + sequence + 1) - start).to(tl.int32)
    if begin < length:
        cache_start = tl.load(cache_offsets_ptr + sequence)
        history_end = (tl.load(cache_offsets_ptr + sequence + 1) - cache_start).to(tl.int32)
        q_ptr += start * q_row_stride + head * q_head_stride
        k_ptr += start * k_row_stride + head * k_head_stride
        v_ptr += start * v_row_stride + head * v_head_stride
        cache_k_ptr += cache_start * cache_k_row_stride + head * cache_k_head_stride
        cache_v_ptr += cache_start * cache_v_row_stride + head * cache_v_head_stride

        indices = begin + tl.arange(0, BLOCK_M)
        row_times = load_times(row_times_ptr, start, indices, length, SHAPE)
        # [M, Dqk], [M, Dv]
        q = load_tile(q_ptr, q_row_stride, begin, length, BLOCK_M, SHAPE.qk_dim, SHAPE.block_qk, True)
        own_k = load_tile(k_ptr, k_row_stride, begin, length, BLOCK_M, SHAPE.qk_dim, SHAPE.block_qk, True)
        # [M, 1]
        own = tl.sum(q.to(tl.float32) * own_k.to(tl.float32), 1)[:, None] * alpha
        place = (tl.zeros([BLOCK_M], tl.int32) + history_end)[:, None]
        times = row_times[:, None]
        own = add_bias(own, place, place, times, times, history_end, pos_ptr, time_ptr, bounds_ptr, SHAPE)
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

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
        for i in range(full_end - full):
            acc = _add_cached(
                acc,
                q,
                cache_k_ptr,
                cache_v_ptr,
                k_desc,
                v_desc,
                cache_k_row_stride,
                cache_v_row_stride,
                head * cache_k_head_stride,
                head * cache_v_head_stride,
                (full + i) * BLOCK_N,
                lowest,
                prefix_end,
                history_end,
                row_times,
                cache_start,
                pos_ptr,
                time_ptr,
                bounds_ptr,
                key_times_ptr,
                alpha,
                SHAPE,
                False,
            )
        # The prefix, the block in which the window begins, and the one in which the history ends.
        before_full = prefix_blocks + full - first
        edges = before_full + tl.maximum(tl.cdiv(history_end, BLOCK_N) - full_end, 0)
        for i in range(edges):
            block = tl.where(i < prefix_blocks, i, first + i - prefix_blocks)
            block = tl.where(i < before_full, block, full_end + i - before_full)
            acc = _add_cached(
                acc,
                q,
                cache_k_ptr,
                cache_v_ptr,
                k_desc,
                v_desc,
                cache_k_row_stride,
                cache_v_row_stride,
                head * cache_k_head_stride,
                head * cache_v_head_stride,
                block * BLOCK_N,
                lowest,
                prefix_end,
                history_end,
                row_times,
                cache_start,
                pos_ptr,
                time_ptr,
                bounds_ptr,
                key_times_ptr,
                alpha,
                SHAPE,
                True,
            )
        own_v = load_tile(v_ptr, v_row_stride, begin, length, BLOCK_M, SHAPE.v_dim, SHAPE.block_v, True)
        acc += silu(own, SHAPE) * own_v.to(tl.float32)
        OUT_STRIDE: tl.constexpr = SHAPE.heads * SHAPE.v_dim
        out_ptr += start * OUT_STRIDE + head * SHAPE.v_dim
        store_tile(out_ptr, acc * scale, OUT_STRIDE, begin, length, BLOCK_M, SHAPE.v_dim, SHAPE.block_v)
