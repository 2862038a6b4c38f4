"""The forward of Hopper GPUs for causal attention with a relative bias: `hopper_forward` and `hopper_bias` in one.

The bias is where a product's sum begins. That of the next block is worked out while the two products of this one run,
so that what waits for memory there waits beside the tensor cores; which way it goes there is known a block earlier.
Sums add up in the order of `hstu_fwd_kernel`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hstu_kernels.attention.triton.hopper_bias import block_bias, block_class, low_times, read_span
from hstu_kernels.attention.triton.hopper_fetch import TILES_AHEAD, fetch_blocks, prefetch_tile, read_tile
from hstu_kernels.attention.triton.hopper_shared import (
    GROUP_ROWS,
    allocate,
    clear_behind,
    last_seen_by,
    pass_over,
    slot_of,
    store_rows,
    weights_of,
)

_BLOCK_N = gl.constexpr(64)


@gluon.jit
def _block_at(block, seen, rows, key_spans_ptr, BUCKETS: gl.constexpr):
    """Where a block begins and the span of its times; of what lies behind the last one nothing is seen."""
    row, start, length, _row_low, _row_high, _row_times = rows
    begin = gl.where(block < seen, block * _BLOCK_N, row + GROUP_ROWS)
    return begin, read_span(key_spans_ptr, start, begin, length, BUCKETS)


@gluon.jit
def _multiply(
    group: gl.constexpr,
    out,
    work_ptr,
    tables,
    spans,
    buffers,
    barriers,
    numbers,
    HEADS: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    REACH: gl.constexpr,
    BUCKETS: gl.constexpr,
):
    """The group of warps that owns rows ``64 * group`` to ``64 * group + 63`` of each tile."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    program, programs = gl.program_id(0), gl.num_programs(0)
    q_buffer, k_buffer, v_buffer, o_buffer = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    row_spans_ptr, key_spans_ptr = spans
    items, alpha, scale = numbers
    DTYPE: gl.constexpr = q_buffer.dtype
    half_alpha = alpha * 0.5
    used = program * 0
    tiles = program * 0
    for turn in range((items + programs - 1) // programs * 2):
        head, start, length, tile, blocks = read_tile(work_ptr, turn, items, HEADS, _BLOCK_N)
        row = tile + group * GROUP_ROWS
        # Of the two blocks on the diagonal the first group sees one.
        seen = blocks
        if group == 0:
            seen = gl.minimum(blocks, row // _BLOCK_N + 1)
        if blocks > 0:
            prefetch_tile(work_ptr, turn + 1, items, HEADS)
            row_low, row_high = read_span(row_spans_ptr, start, row, length, BUCKETS)
            if BUCKETS > 0:
                row_times = low_times(tables[3], start, row, length, gl.SliceLayout(1, S_LAYOUT))
            else:
                row_times = gl.zeros([GROUP_ROWS], gl.int32, gl.SliceLayout(1, S_LAYOUT))
            rows = (row, start, length, row_low, row_high, row_times)
            begin, span = _block_at(0, seen, rows, key_spans_ptr, BUCKETS)
            known = block_class(rows, begin, span, tables[1], BUCKETS)
            bias = block_bias(rows, begin, known, tables, REACH, BUCKETS, S_LAYOUT)
            begin, span = _block_at(1, seen, rows, key_spans_ptr, BUCKETS)
            known = block_class(rows, begin, span, tables[1], BUCKETS)
            last_seen = last_seen_by(row, S_LAYOUT)
            place, phase = slot_of(tiles, TILES_AHEAD)
            mbarrier.wait(q_full.index(place), phase)
            tiles += 1
            q = q_buffer.index(2 * place + group)
            slot = used % STAGES
            mbarrier.wait(k_full.index(slot), (used // STAGES) & 1)
            coming = warpgroup_mma(q, k_buffer.index(slot).permute((1, 0)), bias, is_async=True)
            bias = block_bias(rows, begin, known, tables, REACH, BUCKETS, S_LAYOUT)
            begin, span = _block_at(2, seen, rows, key_spans_ptr, BUCKETS)
            logits = warpgroup_mma_wait(0, deps=(coming,))
            mbarrier.arrive(k_free.index(slot), count=1)
            known = block_class(rows, begin, span, tables[1], BUCKETS)
            p = weights_of(logits, 0, last_seen, half_alpha, row == 0, P_LAYOUT, DTYPE)
            acc = gl.zeros([GROUP_ROWS, D], gl.float32, O_LAYOUT)
            for i in range(1, seen):
                ahead = used + 1
                next_slot = ahead % STAGES
                mbarrier.wait(k_full.index(next_slot), (ahead // STAGES) & 1)
                keys = k_buffer.index(next_slot).permute((1, 0))
                coming = warpgroup_mma(q, keys, bias, is_async=True)
                mbarrier.wait(v_full.index(slot), (used // STAGES) & 1)
                growing = warpgroup_mma(p, v_buffer.index(slot), acc, is_async=True)
                next_begin, span = _block_at(i + 2, seen, rows, key_spans_ptr, BUCKETS)
                bias = block_bias(rows, begin, known, tables, REACH, BUCKETS, S_LAYOUT)
                logits = warpgroup_mma_wait(1, deps=(coming,))
                mbarrier.arrive(k_free.index(next_slot), count=1)
                known = block_class(rows, next_begin, span, tables[1], BUCKETS)
                begin = next_begin
                own = i * _BLOCK_N
                following = weights_of(logits, own, last_seen, half_alpha, own >= row, P_LAYOUT, DTYPE)
                acc = warpgroup_mma_wait(0, deps=(growing,))
                mbarrier.arrive(v_free.index(slot), count=1)
                p = following
                used = ahead
                slot = next_slot
            mbarrier.arrive(q_free.index(place), count=1)
            mbarrier.wait(v_full.index(slot), (used // STAGES) & 1)
            used += 1
            if group == 0:
                used += pass_over(blocks - seen, used, barriers, STAGES)
            # Only the last block can reach over the end.
            own = (seen - 1) * _BLOCK_N
            if own + _BLOCK_N > length:
                clear_behind(v_buffer.index(slot), own, length)
            growing = warpgroup_mma(p, v_buffer.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(growing,))
            mbarrier.arrive(v_free.index(slot), count=1)
            store_rows(out, o_buffer.index(group), acc, scale, head, start, row, length, HEADS, D)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["items", "alpha", "scale"])
def hopper_biased_kernel(
    out_ptr,
    work_ptr,
    pos_ptr,
    time_ptr,
    bounds_ptr,
    row_times_ptr,
    key_times_ptr,
    row_spans_ptr,
    key_spans_ptr,
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    items,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    alpha,
    scale,
    HEADS: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    REACH: gl.constexpr,
    BUCKETS: gl.constexpr,
):
    """Any number of programs for ``items`` lines and heads; ``out [L, H, D]``, contiguous.

    ``work_ptr``: pairs of tiles of 128 rows, under a plain mask and without targets. REACH and
    BUCKETS as in `KernelShape`; spans are those of 64 rows and of 64 keys.
    """
    buffers, barriers = allocate(q_desc, k_desc, v_desc, TILES_AHEAD, 2, _BLOCK_N, STAGES)
    descriptors = (q_desc, k_desc, v_desc)
    strides = (q_head_stride, k_head_stride, v_head_stride)
    tables = (pos_ptr, time_ptr, bounds_ptr, row_times_ptr, key_times_ptr)
    spans = (row_spans_ptr, key_spans_ptr)
    numbers = (items, alpha, scale)
    out = (out_ptr, out_desc)
    gl.warp_specialize(
        [
            (
                _multiply,
                (0, out, work_ptr, tables, spans, buffers, barriers, numbers, HEADS, D, STAGES, REACH, BUCKETS),
            ),
            (
                _multiply,
                (1, out, work_ptr, tables, spans, buffers, barriers, numbers, HEADS, D, STAGES, REACH, BUCKETS),
            ),
            (fetch_blocks, (work_ptr, descriptors, strides, buffers, barriers, items, HEADS, _BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
