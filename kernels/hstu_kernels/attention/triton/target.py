"""The kernels of cached scoring: targets against cached histories and themselves (M-FALCON, HSTU section 3.4).

All targets of a user stand at the history end, so they see the same keys: whether a pair is visible depends on the
column alone. So does its bias, where the targets ask at one time: it is worked out once for each cached row instead of
for each logit. SiLU attention has no normaliser over keys, so that what a target adds to itself is one more term of
the sum, and a long history can be cut into stretches whose sums add up.
"""

import triton
import triton.language as tl

from hstu_kernels.attention.triton.primitives import add_bias, load_tile, load_times, scaled_silu, silu, store_tile
from hstu_kernels.attention.triton.target_keys import add_history
from hstu_kernels.attention.triton.target_sums import find_tile


@triton.jit
def _own_weights(q, own_k, history_end, row_times, pos_ptr, time_ptr, bounds_ptr, alpha, SHAPE: tl.constexpr):
    """``[M, 1]``: what each target weighs for itself."""
    BLOCK_M: tl.constexpr = SHAPE.block_m
    BIASED: tl.constexpr = SHAPE.reach >= 0 or SHAPE.buckets >= 0
    if SHAPE.warps > 0 and SHAPE.qk_dim == 128 and SHAPE.v_dim == 128 and not BIASED:
        # By the product of `hopper_target`, whose bits these are to be.
        rows = tl.arange(0, BLOCK_M)
        products = tl.dot(q, tl.trans(own_k))
        own = tl.sum(tl.where(rows[:, None] == rows[None, :], products, 0.0), 1)[:, None]
        weights = scaled_silu(own, alpha, SHAPE)
    else:
        own = tl.sum(q.to(tl.float32) * own_k.to(tl.float32), 1)[:, None] * alpha
        place = (tl.zeros([BLOCK_M], tl.int32) + history_end)[:, None]
        times = row_times[:, None]
        own = add_bias(own, place, place, times, times, history_end, pos_ptr, time_ptr, bounds_ptr, SHAPE)
        weights = silu(own, SHAPE)
    return weights


@triton.jit
def _stretch(
    q,
    k_ptr,
    v_ptr,
    cache_k_ptr,
    cache_v_ptr,
    k_desc,
    v_desc,
    k_row_stride,
    v_row_stride,
    cache_k_row_stride,
    cache_v_row_stride,
    k_column,
    v_column,
    split,
    begin,
    length,
    row_times,
    together,
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
    SPLIT_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``[M, Dv]``: what stretch ``split`` of the history adds; the first has the targets' own terms as well."""
    BLOCK_M: tl.constexpr = SHAPE.block_m
    BLOCK_V: tl.constexpr = SHAPE.block_v
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if split == 0:
        # [M, Dqk], [M, Dv]
        own_k = load_tile(k_ptr, k_row_stride, begin, length, BLOCK_M, SHAPE.qk_dim, SHAPE.block_qk, True)
        own_v = load_tile(v_ptr, v_row_stride, begin, length, BLOCK_M, SHAPE.v_dim, SHAPE.block_v, True)
        acc = _own_weights(q, own_k, history_end, row_times, pos_ptr, time_ptr, bounds_ptr, alpha, SHAPE)
        acc *= own_v.to(tl.float32)
    if together:
        acc = add_history(
            acc,
            q,
            cache_k_ptr,
            cache_v_ptr,
            k_desc,
            v_desc,
            cache_k_row_stride,
            cache_v_row_stride,
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
            SHAPE,
            MASK,
            True,
            SPLIT_ROWS,
            STAGES,
        )
    elif SHAPE.buckets > 0:
        # Unpipelined: look-ups in the loop would be buffered in shared memory.
        acc = add_history(
            acc,
            q,
            cache_k_ptr,
            cache_v_ptr,
            k_desc,
            v_desc,
            cache_k_row_stride,
            cache_v_row_stride,
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
            SHAPE,
            MASK,
            False,
            SPLIT_ROWS,
            1,
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
    # A comparison of each tile with its user's first request time, where there are times at all.
    TIMED: tl.constexpr = SHAPE.buckets > 0
    piece = tl.program_id(0) // (slots * HEADS)
    program = tl.program_id(0) % (slots * HEADS)
    head = (program % HEADS).to(tl.int64)
    sequence, begin = find_tile(program // HEADS, offsets_ptr, batch_size, BLOCK_M)
    start = tl.load(offsets_ptr + sequence)
    length = (tl.load(offsets_ptr + sequence + 1) - start).to(tl.int32)
    cache_start = tl.load(cache_offsets_ptr + sequence)
    history_end = (tl.load(cache_offsets_ptr + sequence + 1) - cache_start).to(tl.int32)
    if (begin < length) & ((piece == 0) | (piece * SPLIT_ROWS < history_end)):
        q_ptr += start * q_row_stride + head * q_head_stride
        k_ptr += start * k_row_stride + head * k_head_stride
        v_ptr += start * v_row_stride + head * v_head_stride
        cache_k_ptr += cache_start * cache_k_row_stride + head * cache_k_head_stride
        cache_v_ptr += cache_start * cache_v_row_stride + head * cache_v_head_stride

        indices = begin + tl.arange(0, BLOCK_M)
        row_times = load_times(row_times_ptr, start, indices, length, SHAPE)
        # [M, Dqk]
        q = load_tile(q_ptr, q_row_stride, begin, length, BLOCK_M, SHAPE.qk_dim, SHAPE.block_qk, True)
        together = True
        if TIMED:
            asked_at = tl.load(row_times_ptr + start)
            together = (tl.min(row_times) == asked_at) & (tl.max(row_times) == asked_at)
        acc = _stretch(
            q,
            k_ptr,
            v_ptr,
            cache_k_ptr,
            cache_v_ptr,
            k_desc,
            v_desc,
            k_row_stride,
            v_row_stride,
            cache_k_row_stride,
            cache_v_row_stride,
            head * cache_k_head_stride,
            head * cache_v_head_stride,
            piece,
            begin,
            length,
            row_times,
            together,
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
            SPLIT_ROWS,
            STAGES,
        )
        OUT_STRIDE: tl.constexpr = SHAPE.heads * SHAPE.v_dim
        if sums_ptr is None:
            out_ptr += start * OUT_STRIDE + head * SHAPE.v_dim
            store_tile(out_ptr, acc * scale, OUT_STRIDE, begin, length, BLOCK_M, SHAPE.v_dim, SHAPE.block_v)
        else:
            sums_ptr += (piece.to(tl.int64) * total_rows + start) * OUT_STRIDE + head * SHAPE.v_dim
            store_tile(sums_ptr, acc, OUT_STRIDE, begin, length, BLOCK_M, SHAPE.v_dim, SHAPE.block_v)
