"""The backward kernel of the bias tables. The heads share the tables, so it sums over heads before it reduces by entry.

A program owns a query tile. For each key block it rebuilds the gradient of the logits head by head, adds the heads up
and reduces once: by time bucket (few distinct ones in a block, since times are sorted), by diagonal for the position
table.
"""

import triton
import triton.language as tl

from hstu_kernels.attention.triton.primitives import (
    add_bias,
    edge_begin,
    full_begin,
    load_edge,
    load_full,
    load_line,
    load_tile,
    load_times,
    silu_and_slope,
    time_bucket,
    visible,
)


@triton.jit
def _add_by_time(sums, grad, seen, row_times, key_times, bounds_ptr, SHAPE: tl.constexpr, ENTRIES: tl.constexpr):
    """``sums [ENTRIES]`` plus ``grad [M, N]`` reduced by time bucket."""
    bucket = time_bucket(row_times, key_times, bounds_ptr, SHAPE)
    lowest = tl.min(tl.where(seen, bucket, ENTRIES))
    highest = tl.max(tl.where(seen, bucket, -1))
    entry = tl.arange(0, ENTRIES)
    for b in range(lowest, highest + 1):
        total = tl.sum(tl.where(bucket == b, grad, 0.0))
        sums += tl.where(entry == b, total, 0.0)
    return sums


@triton.jit
def _add_by_position(sums_ptr, grad, rows, cols, row_begin, key_begin, history_end, SHAPE: tl.constexpr):
    """Add ``grad [M, N]`` to the position entries at ``sums_ptr``: one atomic for each diagonal."""
    BLOCK_M: tl.constexpr = SHAPE.block_m
    BLOCK_N: tl.constexpr = SHAPE.block_n
    DIAGONALS: tl.constexpr = 2 * (BLOCK_M if BLOCK_M > BLOCK_N else BLOCK_N)
    REACH: tl.constexpr = SHAPE.reach
    # Column d of the skewed tile holds the entries with col - row = d - (M - 1) inside the block.
    row = tl.arange(0, BLOCK_M)
    diagonal = tl.arange(0, DIAGONALS)
    source = row[:, None] + diagonal[None, :] - (BLOCK_M - 1)
    inside = (source >= 0) & (source < BLOCK_N)
    of_history = tl.where(rows[:, None] < history_end, grad, 0.0)
    skewed = tl.gather(of_history, tl.where(inside, source, 0), 1)
    by_diagonal = tl.sum(tl.where(inside, skewed, 0.0), 0)
    distance = key_begin - row_begin + diagonal - (BLOCK_M - 1)
    entry = tl.minimum(tl.maximum(distance, -REACH), REACH) + REACH
    tl.atomic_add(sums_ptr + entry, by_diagonal, mask=diagonal < BLOCK_M + BLOCK_N - 1, sem="relaxed")
    if row_begin + BLOCK_M > history_end:
        # Targets all stand at the history end, and so do their own keys.
        by_key = tl.sum(tl.where(rows[:, None] >= history_end, grad, 0.0), 0)
        to_target = tl.minimum(cols, history_end) - history_end
        key_entry = tl.minimum(tl.maximum(to_target, -REACH), REACH) + REACH
        tl.atomic_add(sums_ptr + key_entry, by_key, sem="relaxed")


@triton.jit
def hstu_bwd_bias_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    pos_sums_ptr,
    time_sums_ptr,
    pos_ptr,
    time_ptr,
    bounds_ptr,
    row_times_ptr,
    key_times_ptr,
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
    COPIES: tl.constexpr,
):
    """Gradients of the tables, without the factor ``scale``.

    ``time_sums [tiles, ENTRIES]``: a line for each program; ``pos_sums [COPIES, 2N - 1]``: copies that programs share.
    """
    HEADS: tl.constexpr = SHAPE.heads
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
    time_sums = tl.zeros([ENTRIES], tl.float32)
    full0, blocks0, full1, full = load_full(line)
    e0, n0, e1, n1, e2, n2, e3, n3, e4, n4 = load_edge(line)
    for i in range(full + n4):
        of_edge = edge_begin(i - full, e0, n0, e1, n1, e2, n2, e3, n3, e4, BLOCK_N)
        begin = tl.where(i < full, full_begin(i, full0, blocks0, full1, BLOCK_N), of_edge)
        cols = begin + tl.arange(0, BLOCK_N)
        key_times = load_times(key_times_ptr, seq_start, cols, seq_len, SHAPE)
        # [M, N]
        rab = add_bias(
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
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
        grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for h in range(HEADS):
            head = tl.full([], h, tl.int64)
            q = load_tile(
                q_ptr + head * q_head_stride,
                q_row_stride,
                row_begin,
                seq_len,
                BLOCK_M,
                SHAPE.qk_dim,
                SHAPE.block_qk,
                True,
            )
            k = load_tile(
                k_ptr + head * k_head_stride, k_row_stride, begin, seq_len, BLOCK_N, SHAPE.qk_dim, SHAPE.block_qk, True
            )
            v = load_tile(
                v_ptr + head * v_head_stride, v_row_stride, begin, seq_len, BLOCK_N, SHAPE.v_dim, SHAPE.block_v, True
            )
            dout = load_tile(
                dout_ptr + head * SHAPE.v_dim, V_STRIDE, row_begin, seq_len, BLOCK_M, SHAPE.v_dim, SHAPE.block_v, True
            )
            _, slope = silu_and_slope(tl.dot(q, tl.trans(k), input_precision=SHAPE.precision) * alpha + rab, SHAPE)
            grad += slope * tl.dot(dout, tl.trans(v), input_precision=SHAPE.precision)
        seen = visible(rows[:, None], cols[None, :], history_end, SHAPE, MASK)
        seen = seen & (rows[:, None] < seq_len) & (cols[None, :] < seq_len)
        grad = tl.where(seen, grad, 0.0)
        if SHAPE.buckets >= 0:
            time_sums = _add_by_time(
                time_sums, grad, seen, row_times[:, None], key_times[None, :], bounds_ptr, SHAPE, ENTRIES
            )
        if SHAPE.reach >= 0:
            copy = pos_sums_ptr + (program % COPIES).to(tl.int64) * (2 * SHAPE.reach + 1)
            _add_by_position(copy, grad, rows, cols, row_begin, begin, history_end, SHAPE)
    if SHAPE.buckets >= 0:
        tl.store(time_sums_ptr + program.to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES), time_sums)
