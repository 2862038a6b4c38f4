"""The backward kernel of the time table for blocks that span many time buckets, that is blocks near the diagonal.

`hstu_bwd_dq_kernel` does the others, and these too where its warps have sums of their own, on Hopper. Elsewhere such a
block takes a pass of the whole program for each of its buckets, so the heads, which share the table, are added up
first: a program owns a query tile and rebuilds the gradient of the logits head by head.
"""

import triton
import triton.language as tl

from hstu_kernels.attention.triton.primitives import (
    key_block,
    load_line,
    load_segments,
    load_tile,
    load_times,
    silu_and_slope,
    visible,
)
from hstu_kernels.attention.triton.rab import block_bias, load_span, own_span
from hstu_kernels.attention.triton.time_buckets import bucket_range, general_bucket


@triton.jit
def _add_by_time(sums, grad, seen, bucket, ENTRIES: tl.constexpr):
    """``sums [ENTRIES]`` plus ``grad [M, N]`` reduced by time bucket."""
    lowest = tl.min(tl.where(seen, bucket, ENTRIES))
    highest = tl.max(tl.where(seen, bucket, -1))
    entry = tl.arange(0, ENTRIES)
    for b in range(lowest, highest + 1):
        total = tl.sum(tl.where(bucket == b, grad, 0.0))
        sums += tl.where(entry == b, total, 0.0)
    return sums


@triton.jit
def _head_gradient(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    q_row_stride,
    k_row_stride,
    v_row_stride,
    row_begin,
    begin,
    seq_len,
    rab,
    alpha,
    SHAPE: tl.constexpr,
):
    """Gradient ``[M, N]`` of one head's logits, before the mask; pointers stand at sequence and head."""
    BLOCK_M: tl.constexpr = SHAPE.block_m
    BLOCK_N: tl.constexpr = SHAPE.block_n
    V_STRIDE: tl.constexpr = SHAPE.heads * SHAPE.v_dim
    q = load_tile(q_ptr, q_row_stride, row_begin, seq_len, BLOCK_M, SHAPE.qk_dim, SHAPE.block_qk, True)
    k = load_tile(k_ptr, k_row_stride, begin, seq_len, BLOCK_N, SHAPE.qk_dim, SHAPE.block_qk, True)
    v = load_tile(v_ptr, v_row_stride, begin, seq_len, BLOCK_N, SHAPE.v_dim, SHAPE.block_v, True)
    dout = load_tile(dout_ptr, V_STRIDE, row_begin, seq_len, BLOCK_M, SHAPE.v_dim, SHAPE.block_v, True)
    logits = tl.dot(q, tl.trans(k), rab, input_precision=SHAPE.precision) * alpha
    _, slope = silu_and_slope(logits, SHAPE)
    return slope * tl.dot(dout, tl.trans(v), input_precision=SHAPE.precision)


@triton.jit(do_not_specialize=["alpha"])
def hstu_bwd_bias_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    time_sums_ptr,
    pos_ptr,
    time_ptr,
    bounds_ptr,
    row_times_ptr,
    key_times_ptr,
    key_spans_ptr,
    work_ptr,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    alpha,
    SHAPE: tl.constexpr,
    MASK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """The time table's gradient without the factor ``scale``: ``time_sums [tiles, ENTRIES]``, a line a program."""
    BLOCK_M: tl.constexpr = SHAPE.block_m
    BLOCK_N: tl.constexpr = SHAPE.block_n
    V_STRIDE: tl.constexpr = SHAPE.heads * SHAPE.v_dim
    program = tl.program_id(0)
    line, seq_start, seq_len, history_end, row_begin = load_line(work_ptr, program)
    q_ptr += seq_start * q_row_stride
    k_ptr += seq_start * k_row_stride
    v_ptr += seq_start * v_row_stride
    dout_ptr += seq_start * V_STRIDE

    rows = row_begin + tl.arange(0, BLOCK_M)
    row_times = load_times(row_times_ptr, seq_start, rows, seq_len, SHAPE)
    row_low, row_high = own_span(row_times, SHAPE)
    time_sums = tl.zeros([ENTRIES], tl.float32)
    o0, n0, o1, n1, o2, n2, o3, n3, o4, n4, o5, _n5, _o6, n6 = load_segments(line)
    for i in range(n6):
        begin, _ = key_block(i, o0, n0, o1, n1, o2, n2, o3, n3, o4, n4, o5, SHAPE, MASK)
        key_low, key_high = load_span(key_spans_ptr, seq_start, begin, seq_len, SHAPE)
        _, more = bucket_range(row_low, row_high, key_low, key_high, SHAPE)
        if more > SHAPE.few_buckets:
            cols = begin + tl.arange(0, BLOCK_N)
            # [M, N]
            rab = block_bias(
                row_begin,
                begin,
                row_times,
                key_times_ptr,
                seq_start,
                seq_len,
                history_end,
                row_low,
                row_high,
                key_low,
                key_high,
                pos_ptr,
                time_ptr,
                bounds_ptr,
                SHAPE,
                True,
            )
            grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for h in range(SHAPE.heads):
                head = tl.full([], h, tl.int64)
                grad += _head_gradient(
                    q_ptr + head * q_head_stride,
                    k_ptr + head * k_head_stride,
                    v_ptr + head * v_head_stride,
                    dout_ptr + head * SHAPE.v_dim,
                    q_row_stride,
                    k_row_stride,
                    v_row_stride,
                    row_begin,
                    begin,
                    seq_len,
                    rab,
                    alpha,
                    SHAPE,
                )
            seen = visible(rows[:, None], cols[None, :], history_end, SHAPE, MASK)
            seen = seen & (rows[:, None] < seq_len) & (cols[None, :] < seq_len)
            key_times = load_times(key_times_ptr, seq_start, cols, seq_len, SHAPE)
            bucket = general_bucket(
                row_times[:, None], key_times[None, :], row_low, row_high, key_low, key_high, bounds_ptr, SHAPE
            )
            grad = tl.where(seen, grad, 0.0)
            time_sums = _add_by_time(time_sums, grad, seen, bucket, ENTRIES)
    tl.store(time_sums_ptr + program.to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES), time_sums)
