"""The kernels of cached scoring: targets against cached histories and themselves (M-FALCON, HSTU section 3.4).

All targets of a user stand at the history end, so they see the same keys: whether a pair is visible depends on the
column alone. So does its bias, where the targets ask at one time: it is worked out once for each cached row instead of
for each logit. SiLU attention has no normaliser over keys, so that what a target adds to itself is one more term of
the sum, and a long history can be cut into stretches whose sums add up.
"""

import triton
import triton.language as tl

from hstu_kernels.attention.triton.primitives import (
    add_bias,
    load_rows,
    load_tile,
    load_times,
    position_index,
    silu,
    store_tile,
    time_bucket,
)
from hstu_kernels.attention.triton.rab import lookup, wide_bucket


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


@triton.jit(do_not_specialize=["batch_size"])
def hstu_target_bias_kernel(
    rab_ptr,
    pos_ptr,
    time_ptr,
    bounds_ptr,
    row_times_ptr,
    key_times_ptr,
    offsets_ptr,
    cache_offsets_ptr,
    batch_size,
    SHAPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``rab [cached rows]`` float32: the bias of every cached row for targets that ask when their user's first does."""
    sequence, begin = _find_tile(tl.program_id(0), cache_offsets_ptr, batch_size, BLOCK)
    cache_start = tl.load(cache_offsets_ptr + sequence)
    history_end = (tl.load(cache_offsets_ptr + sequence + 1) - cache_start).to(tl.int32)
    start = tl.load(offsets_ptr + sequence)
    # Of a user without targets nothing is read.
    if (begin < history_end) & (start < tl.load(offsets_ptr + sequence + 1)):
        cols = begin + tl.arange(0, BLOCK)
        rab = tl.zeros([BLOCK], tl.float32)
        if SHAPE.reach >= 0:
            rab += tl.load(pos_ptr + position_index(history_end, cols, history_end, SHAPE))
        if SHAPE.buckets >= 0:
            key_times = load_times(key_times_ptr, cache_start, cols, history_end, SHAPE)
            rab += tl.load(time_ptr + time_bucket(tl.load(row_times_ptr + start), key_times, bounds_ptr, SHAPE))
        tl.store(rab_ptr + cache_start + cols, rab, mask=cols < history_end)


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
    logits = tl.dot(q, tl.trans(k), input_precision=SHAPE.precision) * alpha
    if COLUMNS:
        if SHAPE.reach >= 0 or SHAPE.buckets >= 0:
            if EDGE:
                rab = tl.load(rab_ptr + cache_start + cols, mask=cols < history_end, other=0.0)
            else:
                rab = tl.load(rab_ptr + cache_start + cols)
            logits += rab[None, :]
    else:
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
def _add_history(
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
    # The first stretch has them all: the prefix, the block in which the window begins, and the history's last one.
    before_full = prefix_blocks + full - first
    edges = before_full + tl.maximum(tl.cdiv(history_end, BLOCK_N) - full_end, 0)
    edges = tl.where(split == 0, edges, 0)
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


@triton.jit(do_not_specialize=["batch_size", "slots", "total_rows", "alpha", "scale"])
def hstu_target_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cache_k_ptr,
    cache_v_ptr,
    out_ptr,
    sums_ptr,
    k_desc,
    v_desc,
    rab_ptr,
    pos_ptr,
    time_ptr,
    bounds_ptr,
    row_times_ptr,
    key_times_ptr,
    offsets_ptr,
    cache_offsets_ptr,
    batch_size,
    slots,
    total_rows,
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
    SPLIT_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program for each stretch of the history, slot of a target tile, and head.

    Writes ``out [T, H, Dv]`` (contiguous), or, where there is ``sums [stretches, T, H, Dv]`` in float32, each
    stretch's part of it without the factor ``scale``, for `hstu_target_sum_kernel`.
    """
    HEADS: tl.constexpr = SHAPE.heads
    BLOCK_M: tl.constexpr = SHAPE.block_m
    BLOCK_V: tl.constexpr = SHAPE.block_v
    # A comparison of each tile with its user's first request time, where there are times at all.
    TIMED: tl.constexpr = SHAPE.buckets > 0
    split = tl.program_id(0) // (slots * HEADS)
    program = tl.program_id(0) % (slots * HEADS)
    head = (program % HEADS).to(tl.int64)
    sequence, begin = _find_tile(program // HEADS, offsets_ptr, batch_size, BLOCK_M)
    start = tl.load(offsets_ptr + sequence)
    length = (tl.load(offsets_ptr + sequence + 1) - start).to(tl.int32)
    cache_start = tl.load(cache_offsets_ptr + sequence)
    history_end = (tl.load(cache_offsets_ptr + sequence + 1) - cache_start).to(tl.int32)
    if (begin < length) & ((split == 0) | (split * SPLIT_ROWS < history_end)):
        q_ptr += start * q_row_stride + head * q_head_stride
        k_ptr += start * k_row_stride + head * k_head_stride
        v_ptr += start * v_row_stride + head * v_head_stride
        cache_k_ptr += cache_start * cache_k_row_stride + head * cache_k_head_stride
        cache_v_ptr += cache_start * cache_v_row_stride + head * cache_v_head_stride

        indices = begin + tl.arange(0, BLOCK_M)
        row_times = load_times(row_times_ptr, start, indices, length, SHAPE)
        # [M, Dqk]
        q = load_tile(q_ptr, q_row_stride, begin, length, BLOCK_M, SHAPE.qk_dim, SHAPE.block_qk, True)
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        together = True
        if TIMED:
            asked_at = tl.load(row_times_ptr + start)
            together = (tl.min(row_times) == asked_at) & (tl.max(row_times) == asked_at)
        if together:
            acc = _add_history(
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
                SHAPE,
                MASK,
                True,
                SPLIT_ROWS,
                STAGES,
            )
        elif TIMED:
            # Unpipelined: look-ups in the loop would be buffered in shared memory.
            acc = _add_history(
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
                SHAPE,
                MASK,
                False,
                SPLIT_ROWS,
                1,
            )
        if split == 0:
            # [M, Dqk], [M, 1], [M, Dv]
            own_k = load_tile(k_ptr, k_row_stride, begin, length, BLOCK_M, SHAPE.qk_dim, SHAPE.block_qk, True)
            own = tl.sum(q.to(tl.float32) * own_k.to(tl.float32), 1)[:, None] * alpha
            place = (tl.zeros([BLOCK_M], tl.int32) + history_end)[:, None]
            times = row_times[:, None]
            own = add_bias(own, place, place, times, times, history_end, pos_ptr, time_ptr, bounds_ptr, SHAPE)
            own_v = load_tile(v_ptr, v_row_stride, begin, length, BLOCK_M, SHAPE.v_dim, SHAPE.block_v, True)
            acc += silu(own, SHAPE) * own_v.to(tl.float32)
        OUT_STRIDE: tl.constexpr = SHAPE.heads * SHAPE.v_dim
        if sums_ptr is None:
            out_ptr += start * OUT_STRIDE + head * SHAPE.v_dim
            store_tile(out_ptr, acc * scale, OUT_STRIDE, begin, length, BLOCK_M, SHAPE.v_dim, SHAPE.block_v)
        else:
            sums_ptr += (split.to(tl.int64) * total_rows + start) * OUT_STRIDE + head * SHAPE.v_dim
            store_tile(sums_ptr, acc, OUT_STRIDE, begin, length, BLOCK_M, SHAPE.v_dim, SHAPE.block_v)


@triton.jit(do_not_specialize=["batch_size", "total_rows", "scale"])
def hstu_target_sum_kernel(
    sums_ptr,
    out_ptr,
    offsets_ptr,
    cache_offsets_ptr,
    batch_size,
    total_rows,
    scale,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
):
    """``out [T, W]``: the parts of the stretches that a user's history has, in their order, times ``scale``.

    One program for each slot of BLOCK_M rows and each BLOCK_W columns.
    """
    PARTS: tl.constexpr = (WIDTH + BLOCK_W - 1) // BLOCK_W
    sequence, begin = _find_tile(tl.program_id(0) // PARTS, offsets_ptr, batch_size, BLOCK_M)
    start = tl.load(offsets_ptr + sequence)
    length = (tl.load(offsets_ptr + sequence + 1) - start).to(tl.int32)
    if begin < length:
        history = tl.load(cache_offsets_ptr + sequence + 1) - tl.load(cache_offsets_ptr + sequence)
        splits = tl.maximum(tl.cdiv(history.to(tl.int32), SPLIT_ROWS), 1)
        rows = begin + tl.arange(0, BLOCK_M)[:, None]
        columns = tl.program_id(0) % PARTS * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
        inside = (rows < length) & (columns < WIDTH)
        at = (start + rows) * WIDTH + columns
        part = at
        total = tl.load(sums_ptr + part, mask=inside, other=0.0)
        for _ in range(1, splits):
            part += total_rows.to(tl.int64) * WIDTH
            total += tl.load(sums_ptr + part, mask=inside, other=0.0)
        tl.store(out_ptr + at, (total * scale).to(out_ptr.dtype.element_ty), mask=inside)
