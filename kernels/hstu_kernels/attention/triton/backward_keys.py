"""The backward kernel of k and v. Each gradient has one owner, so that no two programs write to one place.

W_ij = SiLU(s_ij),  s_ij = alpha * (q_i . k_j) + rab_ij,  G_ij = (dout_i . v_j) * SiLU'(s_ij)      where visible
dv_j = scale sum_i W_ij dout_i,   dk_j = alpha scale sum_i G_ij q_i
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hstu_kernels.attention.triton.primitives import (
    load_line,
    load_own,
    load_rows,
    load_segments,
    load_times,
    row_block,
    silu_and_slope,
    store_sums,
    visible,
)
from hstu_kernels.attention.triton.rab import block_bias, load_span, own_span


@triton.jit
def _add_rows(
    dk,
    dv,
    k,
    v,
    q_ptr,
    dout_ptr,
    q_desc,
    dout_desc,
    q_row_stride,
    q_column,
    dout_column,
    begin,
    key_begin,
    cols,
    key_times,
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
    row_times_ptr,
    alpha,
    edge,
    SHAPE: tl.constexpr,
    MASK: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """``dk [N, Dqk]`` and ``dv [N, Dv]`` plus what the query rows at ``begin`` add. Logits stand transposed."""
    BLOCK_M: tl.constexpr = SHAPE.block_m
    V_STRIDE: tl.constexpr = SHAPE.heads * SHAPE.v_dim
    rows = begin + tl.arange(0, BLOCK_M)
    # [M, Dqk], [M, Dv]: rows behind the end are 0 and add nothing.
    q = load_rows(
        q_ptr,
        q_desc,
        q_row_stride,
        q_column,
        seq_start,
        begin,
        seq_len,
        BLOCK_M,
        SHAPE.qk_dim,
        SHAPE.block_qk,
        BOUNDED,
        SHAPE.descriptors,
    )
    dout = load_rows(
        dout_ptr,
        dout_desc,
        V_STRIDE,
        dout_column,
        seq_start,
        begin,
        seq_len,
        BLOCK_M,
        SHAPE.v_dim,
        SHAPE.block_v,
        BOUNDED,
        SHAPE.descriptors,
    )
    # [N, M]
    rab = block_bias(
        begin,
        key_begin,
        key_times,
        row_times_ptr,
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
        False,
    )
    logits = tl.dot(k, tl.trans(q), rab, input_precision=SHAPE.precision) * alpha
    weights, slope = silu_and_slope(logits, SHAPE)
    slope *= tl.dot(v, tl.trans(dout), input_precision=SHAPE.precision)
    if edge:
        seen = visible(rows[None, :], cols[:, None], history_end, SHAPE, MASK)
        weights = tl.where(seen, weights, 0.0)
        slope = tl.where(seen, slope, 0.0)
    dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=SHAPE.precision)
    dk = tl.dot(slope.to(q.dtype), q, dk, input_precision=SHAPE.precision)
    return dk, dv


@triton.jit(do_not_specialize=["alpha", "scale", "pieces"])
def hstu_bwd_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dk_ptr,
    dv_ptr,
    dk_partial_ptr,
    dv_partial_ptr,
    q_desc,
    dout_desc,
    pos_ptr,
    time_ptr,
    bounds_ptr,
    row_times_ptr,
    key_times_ptr,
    row_spans_ptr,
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
    """``dk [L, H, Dqk]``, ``dv [L, H, Dv]`` (rows by ``SHAPE.grad_stride``); a program for each key tile and head."""
    HEADS: tl.constexpr = SHAPE.heads
    BLOCK_M: tl.constexpr = SHAPE.block_m
    BLOCK_N: tl.constexpr = SHAPE.block_n
    V_STRIDE: tl.constexpr = SHAPE.heads * SHAPE.v_dim
    DK_STRIDE: tl.constexpr = SHAPE.grad_stride if SHAPE.grad_stride > 0 else SHAPE.heads * SHAPE.qk_dim
    DV_STRIDE: tl.constexpr = SHAPE.grad_stride if SHAPE.grad_stride > 0 else V_STRIDE
    BLOCK_QK: tl.constexpr = SHAPE.block_qk
    BLOCK_V: tl.constexpr = SHAPE.block_v
    if SHAPE.waits:
        # What adds up pieces may begin early, too.
        gdc_launch_dependents()
    program = tl.program_id(0)
    head = (program % HEADS).to(tl.int64)
    line, seq_start, seq_len, history_end, key_begin = load_line(work_ptr, program // HEADS)
    q_ptr += seq_start * q_row_stride + head * q_head_stride
    k_ptr += seq_start * k_row_stride + head * k_head_stride
    v_ptr += seq_start * v_row_stride + head * v_head_stride
    dout_ptr += seq_start * V_STRIDE + head * SHAPE.v_dim
    dk_ptr += seq_start * DK_STRIDE + head * SHAPE.qk_dim
    dv_ptr += seq_start * DV_STRIDE + head * SHAPE.v_dim

    cols = key_begin + tl.arange(0, BLOCK_N)
    key_times = load_times(key_times_ptr, seq_start, cols, seq_len, SHAPE)
    key_low, key_high = own_span(key_times, SHAPE)
    # [N, Dqk], [N, Dv]
    k = load_own(
        k_ptr, k_row_stride, key_begin, seq_len, BLOCK_N, SHAPE.qk_dim, SHAPE.block_qk, SHAPE.own_in_registers > 1
    )
    v = load_own(
        v_ptr, v_row_stride, key_begin, seq_len, BLOCK_N, SHAPE.v_dim, SHAPE.block_v, SHAPE.own_in_registers > 0
    )
    dk = tl.zeros([BLOCK_N, BLOCK_QK], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)

    o0, n0, o1, n1, o2, n2, o3, n3, o4, n4, o5, n5, o6, n6 = load_segments(line)
    last_begin, last_edge = row_block(n6 - 1, o0, n0, o1, n1, o2, n2, o3, n3, o4, n4, o5, n5, o6, SHAPE, MASK)
    # Only the last block can reach over the end of the sequence; the others come by the copy engine.
    reaches_over = (n6 > 0) & (last_begin + BLOCK_M > seq_len)
    inside = n6 - reaches_over.to(tl.int32)
    first_begin, _ = row_block(0, o0, n0, o1, n1, o2, n2, o3, n3, o4, n4, o5, n5, o6, SHAPE, MASK)
    row_low, row_high = load_span(row_spans_ptr, seq_start, first_begin, seq_len, SHAPE)
    for i in range(inside):
        begin, edge = row_block(i, o0, n0, o1, n1, o2, n2, o3, n3, o4, n4, o5, n5, o6, SHAPE, MASK)
        next_begin, _next_edge = row_block(i + 1, o0, n0, o1, n1, o2, n2, o3, n3, o4, n4, o5, n5, o6, SHAPE, MASK)
        following = load_span(row_spans_ptr, seq_start, next_begin, seq_len, SHAPE)
        dk, dv = _add_rows(
            dk,
            dv,
            k,
            v,
            q_ptr,
            dout_ptr,
            q_desc,
            dout_desc,
            q_row_stride,
            head * q_head_stride,
            head * SHAPE.v_dim,
            begin,
            key_begin,
            cols,
            key_times,
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
            row_times_ptr,
            alpha,
            edge,
            SHAPE,
            MASK,
            False,
        )
        row_low, row_high = following
    if reaches_over:
        dk, dv = _add_rows(
            dk,
            dv,
            k,
            v,
            q_ptr,
            dout_ptr,
            q_desc,
            dout_desc,
            q_row_stride,
            head * q_head_stride,
            head * SHAPE.v_dim,
            last_begin,
            key_begin,
            cols,
            key_times,
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
            row_times_ptr,
            alpha,
            last_edge,
            SHAPE,
            MASK,
            True,
        )
    if SHAPE.waits:
        # It may run beside the end of dq. Who comes next waits for this kernel alone, and so for both.
        gdc_wait()
    store_sums(
        dk_ptr,
        dk_partial_ptr,
        dk,
        alpha * scale,
        program // HEADS,
        pieces,
        head,
        DK_STRIDE,
        key_begin,
        seq_len,
        SHAPE,
        BLOCK_N,
        SHAPE.qk_dim,
        BLOCK_QK,
    )
    store_sums(
        dv_ptr,
        dv_partial_ptr,
        dv,
        scale,
        program // HEADS,
        pieces,
        head,
        DV_STRIDE,
        key_begin,
        seq_len,
        SHAPE,
        BLOCK_N,
        SHAPE.v_dim,
        BLOCK_V,
    )
