"""The forward kernel: one program for each query tile and head."""

import triton
import triton.language as tl

from hstu_kernels.attention.triton.primitives import (
    key_block,
    load_line,
    load_own,
    load_rows,
    load_segments,
    load_times,
    scaled_silu,
    store_sums,
    visible,
)
from hstu_kernels.attention.triton.rab import block_bias, load_span, own_span


@triton.jit
def _add_keys(
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
    row_begin,
    rows,
    row_times,
    row_low,
    row_high,
    key_low,
    key_high,
    seq_start,
    seq_len,
    history_end,
    pos_ptr,
    time_ptr,
    bounds_ptr,
    key_times_ptr,
    alpha,
    edge,
    SHAPE: tl.constexpr,
    MASK: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """``acc [M, Dv]`` plus what the key block at ``begin`` adds; ``k_ptr`` and ``v_ptr`` point at sequence and head."""
    BLOCK_N: tl.constexpr = SHAPE.block_n
    cols = begin + tl.arange(0, BLOCK_N)
    # [N, Dqk], [N, Dv]
    k = load_rows(
        k_ptr,
        k_desc,
        k_row_stride,
        k_column,
        seq_start,
        begin,
        seq_len,
        BLOCK_N,
        SHAPE.qk_dim,
        SHAPE.block_qk,
        BOUNDED,
        SHAPE.descriptors,
    )
    v = load_rows(
        v_ptr,
        v_desc,
        v_row_stride,
        v_column,
        seq_start,
        begin,
        seq_len,
        BLOCK_N,
        SHAPE.v_dim,
        SHAPE.block_v,
        BOUNDED,
        SHAPE.descriptors,
    )
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
    weights = scaled_silu(tl.dot(q, tl.trans(k), rab, input_precision=SHAPE.precision), alpha, SHAPE)
    if edge:
        weights = tl.where(visible(rows[:, None], cols[None, :], history_end, SHAPE, MASK), weights, 0.0)
    return tl.dot(weights.to(v.dtype), v, acc, input_precision=SHAPE.precision)


@triton.jit(do_not_specialize=["alpha", "scale", "pieces"])
def hstu_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    partial_ptr,
    k_desc,
    v_desc,
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
    scale,
    pieces,
    SHAPE: tl.constexpr,
    MASK: tl.constexpr,
):
    """``out [L, H, Dv]`` (contiguous) from ``q, k [L, H, Dqk]`` and ``v [L, H, Dv]``; grid ``lines * H``.

    The first ``pieces`` lines go to ``partial [pieces, H, M, Dv]`` without ``scale``, where there is one.
    """
    HEADS: tl.constexpr = SHAPE.heads
    BLOCK_M: tl.constexpr = SHAPE.block_m
    BLOCK_N: tl.constexpr = SHAPE.block_n
    BLOCK_V: tl.constexpr = SHAPE.block_v
    program = tl.program_id(0)
    head = (program % HEADS).to(tl.int64)
    line, seq_start, seq_len, history_end, row_begin = load_line(work_ptr, program // HEADS)
    q_ptr += seq_start * q_row_stride + head * q_head_stride
    k_ptr += seq_start * k_row_stride + head * k_head_stride
    v_ptr += seq_start * v_row_stride + head * v_head_stride

    rows = row_begin + tl.arange(0, BLOCK_M)
    row_times = load_times(row_times_ptr, seq_start, rows, seq_len, SHAPE)
    row_low, row_high = own_span(row_times, SHAPE)
    # [M, Dqk], [M, Dv]
    q = load_own(
        q_ptr, q_row_stride, row_begin, seq_len, BLOCK_M, SHAPE.qk_dim, SHAPE.block_qk, SHAPE.own_in_registers > 0
    )
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    o0, n0, o1, n1, o2, n2, o3, n3, o4, n4, o5, _n5, _o6, n6 = load_segments(line)
    last_begin, last_edge = key_block(n6 - 1, o0, n0, o1, n1, o2, n2, o3, n3, o4, n4, o5, SHAPE, MASK)
    # Only the last block can reach over the end of the sequence; the others come by the copy engine.
    reaches_over = (n6 > 0) & (last_begin + BLOCK_N > seq_len)
    inside = n6 - reaches_over.to(tl.int32)
    first_begin, _ = key_block(0, o0, n0, o1, n1, o2, n2, o3, n3, o4, n4, o5, SHAPE, MASK)
    key_low, key_high = load_span(key_spans_ptr, seq_start, first_begin, seq_len, SHAPE)
    for i in range(inside):
        begin, edge = key_block(i, o0, n0, o1, n1, o2, n2, o3, n3, o4, n4, o5, SHAPE, MASK)
        next_begin, _next_edge = key_block(i + 1, o0, n0, o1, n1, o2, n2, o3, n3, o4, n4, o5, SHAPE, MASK)
        following = load_span(key_spans_ptr, seq_start, next_begin, seq_len, SHAPE)
        acc = _add_keys(
            acc,
            q,
            k_ptr,
            v_ptr,
            k_desc,
            v_desc,
            k_row_stride,
            v_row_stride,
            head * k_head_stride,
            head * v_head_stride,
            begin,
            row_begin,
            rows,
            row_times,
            row_low,
            row_high,
            key_low,
            key_high,
            seq_start,
            seq_len,
            history_end,
            pos_ptr,
            time_ptr,
            bounds_ptr,
            key_times_ptr,
            alpha,
            edge,
            SHAPE,
            MASK,
            False,
        )
        key_low, key_high = following
    if reaches_over:
        acc = _add_keys(
            acc,
            q,
            k_ptr,
            v_ptr,
            k_desc,
            v_desc,
            k_row_stride,
            v_row_stride,
            head * k_head_stride,
            head * v_head_stride,
            last_begin,
            row_begin,
            rows,
            row_times,
            row_low,
            row_high,
            key_low,
            key_high,
            seq_start,
            seq_len,
            history_end,
            pos_ptr,
            time_ptr,
            bounds_ptr,
            key_times_ptr,
            alpha,
            last_edge,
            SHAPE,
            MASK,
            True,
        )
    OUT_STRIDE: tl.constexpr = SHAPE.heads * SHAPE.v_dim
    out_ptr += seq_start * OUT_STRIDE + head * SHAPE.v_dim
    store_sums(
        out_ptr,
        partial_ptr,
        acc,
        scale,
        program // HEADS,
        pieces,
        head,
        OUT_STRIDE,
        row_begin,
        seq_len,
        SHAPE,
        BLOCK_M,
        SHAPE.v_dim,
        BLOCK_V,
    )
