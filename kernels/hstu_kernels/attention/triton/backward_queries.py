"""The backward kernel of q, and of the tables along with it. Each gradient has one owner.

W_ij = SiLU(s_ij),  s_ij = alpha * (q_i . k_j) + rab_ij,  G_ij = (dout_i . v_j) * SiLU'(s_ij)      where visible
dq_i = alpha scale sum_j G_ij k_j,   the gradient of rab_ij: scale G_ij, added up over the heads
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from hstu_kernels.attention.triton.primitives import (
    key_block,
    load_line,
    load_own,
    load_rows,
    load_segments,
    load_times,
    silu_and_slope,
    store_sums,
    visible,
)
from hstu_kernels.attention.triton.rab import block_bias, load_span, own_span
from hstu_kernels.attention.triton.rab_grad import add_positions, add_times


@triton.jit
def _add_keys(
    acc,
    time_sums,
    q,
    dout,
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
    pos_sums_ptr,
    pos_factor_ptr,
    time_sums_ptr,
    alpha,
    edge,
    SHAPE: tl.constexpr,
    MASK: tl.constexpr,
    ENTRIES: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """``acc [M, Dqk]`` plus what the key block at ``begin`` adds to ``dq / (alpha scale)``, and the same of
    ``time_sums [ENTRIES]``, the gradient of the time table; that of the position table goes to ``pos_sums_ptr``.
    """
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
    logits = tl.dot(q, tl.trans(k), rab, input_precision=SHAPE.precision) * alpha
    _, slope = silu_and_slope(logits, SHAPE)
    slope *= tl.dot(dout, tl.trans(v), input_precision=SHAPE.precision)
    if edge:
        slope = tl.where(visible(rows[:, None], cols[None, :], history_end, SHAPE, MASK), slope, 0.0)
    acc = tl.dot(slope.to(k.dtype), k, acc, input_precision=SHAPE.precision)
    if ENTRIES > 0:
        time_sums = add_times(
            time_sums,
            time_sums_ptr,
            slope,
            rows[:, None],
            cols[None, :],
            row_times,
            key_times_ptr,
            seq_start,
            seq_len,
            row_low,
            row_high,
            key_low,
            key_high,
            bounds_ptr,
            SHAPE,
            ENTRIES,
        )
    if pos_sums_ptr is not None:
        add_positions(pos_sums_ptr, pos_factor_ptr, slope, rows, cols, row_begin, begin, history_end, SHAPE)
    return acc, time_sums


@triton.jit(do_not_specialize=["alpha", "scale", "pieces"])
def hstu_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dq_ptr,
    partial_ptr,
    k_desc,
    v_desc,
    pos_ptr,
    time_ptr,
    bounds_ptr,
    row_times_ptr,
    key_times_ptr,
    key_spans_ptr,
    pos_sums_ptr,
    pos_factor_ptr,
    time_sums_ptr,
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
    ENTRIES: tl.constexpr,
    COPIES: tl.constexpr,
):
    """``dq [L, H, Dqk]`` (rows by ``SHAPE.grad_stride``) from ``dout [L, H, Dv]`` (contiguous).

    One program for each query tile and head.

    Without the factor ``scale`` also the gradients of the tables, each where its pointer is given:
    ``pos_sums [COPIES, 2N - 1]``, copies that programs share, of float32, or of int64 and ``pos_factor`` times as much;
    and ``time_sums [programs, ENTRIES]``, of the blocks that span few time buckets; `hstu_bwd_bias_kernel` adds the
    others. ENTRIES is 0 without the latter; where `sums_by_warp`, they are ``[programs, ENTRIES, warps]``, filled with
    0, and take all blocks.
    """
    HEADS: tl.constexpr = SHAPE.heads
    BLOCK_M: tl.constexpr = SHAPE.block_m
    BLOCK_N: tl.constexpr = SHAPE.block_n
    V_STRIDE: tl.constexpr = SHAPE.heads * SHAPE.v_dim
    DQ_STRIDE: tl.constexpr = SHAPE.grad_stride if SHAPE.grad_stride > 0 else SHAPE.heads * SHAPE.qk_dim
    BLOCK_QK: tl.constexpr = SHAPE.block_qk
    if SHAPE.waits:
        # The next kernel may begin where the last programs of this one leave room, if it was told so and waits itself.
        gdc_launch_dependents()
    program = tl.program_id(0)
    head = (program % HEADS).to(tl.int64)
    line, seq_start, seq_len, history_end, row_begin = load_line(work_ptr, program // HEADS)
    q_ptr += seq_start * q_row_stride + head * q_head_stride
    k_ptr += seq_start * k_row_stride + head * k_head_stride
    v_ptr += seq_start * v_row_stride + head * v_head_stride
    dout_ptr += seq_start * V_STRIDE + head * SHAPE.v_dim
    dq_ptr += seq_start * DQ_STRIDE + head * SHAPE.qk_dim

    rows = row_begin + tl.arange(0, BLOCK_M)
    row_times = load_times(row_times_ptr, seq_start, rows, seq_len, SHAPE)
    row_low, row_high = own_span(row_times, SHAPE)
    # [M, Dqk], [M, Dv]
    q = load_own(
        q_ptr, q_row_stride, row_begin, seq_len, BLOCK_M, SHAPE.qk_dim, SHAPE.block_qk, SHAPE.own_in_registers > 1
    )
    dout = load_own(
        dout_ptr, V_STRIDE, row_begin, seq_len, BLOCK_M, SHAPE.v_dim, SHAPE.block_v, SHAPE.own_in_registers > 0
    )
    acc = tl.zeros([BLOCK_M, BLOCK_QK], tl.float32)
    if ENTRIES > 0 and not SHAPE.sums_by_warp:
        time_sums = tl.zeros([ENTRIES], tl.float32)
    else:
        time_sums = tl.zeros([1], tl.float32)
    if ENTRIES > 0:
        time_sums_ptr += program.to(tl.int64) * (ENTRIES * (SHAPE.warps if SHAPE.sums_by_warp else 1))
    if pos_sums_ptr is not None:
        pos_sums_ptr += (program % COPIES).to(tl.int64) * (2 * SHAPE.reach + 1)

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
        acc, time_sums = _add_keys(
            acc,
            time_sums,
            q,
            dout,
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
            pos_sums_ptr,
            pos_factor_ptr,
            time_sums_ptr,
            alpha,
            edge,
            SHAPE,
            MASK,
            ENTRIES,
            False,
        )
        key_low, key_high = following
    if reaches_over:
        acc, time_sums = _add_keys(
            acc,
            time_sums,
            q,
            dout,
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
            pos_sums_ptr,
            pos_factor_ptr,
            time_sums_ptr,
            alpha,
            last_edge,
            SHAPE,
            MASK,
            ENTRIES,
            True,
        )
    if ENTRIES > 0 and not SHAPE.sums_by_warp:
        tl.store(time_sums_ptr + tl.arange(0, ENTRIES), time_sums)
    store_sums(
        dq_ptr,
        partial_ptr,
        acc,
        alpha * scale,
        program // HEADS,
        pieces,
        head,
        DQ_STRIDE,
        row_begin,
        seq_len,
        SHAPE,
        BLOCK_M,
        SHAPE.qk_dim,
        BLOCK_QK,
    )
