"""The forward of Hopper GPUs for causal attention with a relative bias: `hopper_forward` and `hopper_bias` in one.

The bias is where a product's sum begins. That of the next block is worked out while the two products of this one run,
so that what waits for memory there waits beside the tensor cores. Sums add up in the order of `hstu_fwd_kernel`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hstu_kernels.attention.triton.hopper_bias import block_bias, low_times, read_span
from hstu_kernels.attention.triton.hopper_forward import GROUP_ROWS, ring, snake, weights_of
from hstu_kernels.attention.triton.schedule import LINE

_LINE = gl.constexpr(LINE)
_BLOCK_N = gl.constexpr(64)


@gluon.jit
def _read_line(work_ptr, index):
    """Sequence start and length, first row of the tile, then key blocks: where the full ones begin and how many they
    are, where the others begin, and how many there are in all."""
    line = work_ptr + index.to(gl.int64) * _LINE
    start = gl.load(line)
    length = gl.load(line + 1).to(gl.int32)
    row = gl.load(line + 3).to(gl.int32)
    full_origin = gl.load(line + 10).to(gl.int32)
    full = gl.load(line + 11).to(gl.int32)
    edge_origin = gl.load(line + 12).to(gl.int32)
    blocks = gl.load(line + 17).to(gl.int32)
    return start, length, row, full_origin, full, edge_origin, blocks


@gluon.jit
def _block_begin(i, full_origin, full, edge_origin):
    return gl.where(i < full, full_origin, edge_origin) + i * _BLOCK_N


@gluon.jit
def _fetch(work_ptr, descriptors, strides, buffers, barriers, items, HEADS: gl.constexpr, STAGES: gl.constexpr):
    """The warp that fetches. A slot is free again once both groups said so."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    q_desc, k_desc, v_desc = descriptors
    q_head_stride, k_head_stride, v_head_stride = strides
    q_buffer, k_buffer, v_buffer = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    fetched = program * 0
    tiles = program * 0
    for turn in range((items + programs - 1) // programs):
        item = snake(turn, programs, program)
        if item < items:
            head = item % HEADS
            start, _length, row, full_origin, full, edge_origin, blocks = _read_line(work_ptr, item // HEADS)
            first = start.to(gl.int32)
            if blocks > 0:
                mbarrier.wait(q_free, (tiles & 1) ^ 1)
                mbarrier.expect(q_full, 2 * q_desc.block_type.nbytes)
                column = head * q_head_stride
                tma.async_copy_global_to_shared(q_desc, [first + row, column], q_full, q_buffer.index(0))
                second_row = first + row + GROUP_ROWS
                tma.async_copy_global_to_shared(q_desc, [second_row, column], q_full, q_buffer.index(1))
                tiles += 1
                for i in range(blocks):
                    begin = first + _block_begin(i, full_origin, full, edge_origin)
                    slot = fetched % STAGES
                    phase = ((fetched // STAGES) & 1) ^ 1
                    k_bar = k_full.index(slot)
                    mbarrier.wait(k_free.index(slot), phase)
                    mbarrier.expect(k_bar, k_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(k_desc, [begin, head * k_head_stride], k_bar, k_buffer.index(slot))
                    v_bar = v_full.index(slot)
                    mbarrier.wait(v_free.index(slot), phase)
                    mbarrier.expect(v_bar, v_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(v_desc, [begin, head * v_head_stride], v_bar, v_buffer.index(slot))
                    fetched += 1


@gluon.jit
def _clear_behind(values, begin, length):
    """Zeros for rows of another sequence: a weight of 0 does not hide what is no number."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    x = values.load(LAYOUT)
    rows = begin + gl.arange(0, values.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    # Both groups write, and the same: neither waits for the other.
    values.store(gl.where(gl.expand_dims(rows < length, 1), x, gl.zeros_like(x)))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _multiply(
    group: gl.constexpr,
    out_ptr,
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
    q_buffer, k_buffer, v_buffer = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    row_spans_ptr, key_spans_ptr = spans
    items, alpha, scale = numbers
    DTYPE: gl.constexpr = q_buffer.dtype
    half_alpha = alpha * 0.5
    used = program * 0
    tiles = program * 0
    for turn in range((items + programs - 1) // programs):
        item = snake(turn, programs, program)
        if item < items:
            head = item % HEADS
            start, length, tile, full_origin, full, edge_origin, blocks = _read_line(work_ptr, item // HEADS)
            row = tile + group * GROUP_ROWS
            if blocks > 0:
                row_span = read_span(row_spans_ptr, start, row, length, BUCKETS)
                begin = _block_begin(0, full_origin, full, edge_origin)
                span = read_span(key_spans_ptr, start, begin, length, BUCKETS)
                next_begin = _block_begin(1, full_origin, full, edge_origin)
                next_span = read_span(key_spans_ptr, start, next_begin, length, BUCKETS)
                if BUCKETS > 0:
                    row_times = low_times(tables[3], start, row, length, gl.SliceLayout(1, S_LAYOUT))
                else:
                    row_times = gl.zeros([GROUP_ROWS], gl.int32, gl.SliceLayout(1, S_LAYOUT))
                bias = block_bias(
                    row, begin, start, length, row_span, span, row_times, tables, REACH, BUCKETS, True, S_LAYOUT
                )
                # Keys behind the end lie behind every row that is written, whatever another sequence holds there.
                last_seen = gl.expand_dims(row + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, S_LAYOUT)), 1)
                mbarrier.wait(q_full, tiles & 1)
                tiles += 1
                q = q_buffer.index(group)
                slot = used % STAGES
                mbarrier.wait(k_full.index(slot), (used // STAGES) & 1)
                coming = warpgroup_mma(q, k_buffer.index(slot).permute((1, 0)), bias, is_async=True)
                bias = block_bias(
                    row,
                    next_begin,
                    start,
                    length,
                    row_span,
                    next_span,
                    row_times,
                    tables,
                    REACH,
                    BUCKETS,
                    True,
                    S_LAYOUT,
                )
                next_begin = _block_begin(2, full_origin, full, edge_origin)
                next_span = read_span(key_spans_ptr, start, next_begin, length, BUCKETS)
                logits = warpgroup_mma_wait(0, deps=(coming,))
                mbarrier.arrive(k_free.index(slot), count=1)
                p = weights_of(logits, begin, last_seen, half_alpha, full <= 0, P_LAYOUT, DTYPE)
                acc = gl.zeros([GROUP_ROWS, D], gl.float32, O_LAYOUT)
                for i in range(1, blocks):
                    ahead = used + 1
                    next_slot = ahead % STAGES
                    mbarrier.wait(k_full.index(next_slot), (ahead // STAGES) & 1)
                    keys = k_buffer.index(next_slot).permute((1, 0))
                    coming = warpgroup_mma(q, keys, bias, is_async=True)
                    mbarrier.wait(v_full.index(slot), (used // STAGES) & 1)
                    growing = warpgroup_mma(p, v_buffer.index(slot), acc, is_async=True)
                    # Of what lies behind the last block nothing is seen.
                    next_begin = gl.where(i + 1 < blocks, next_begin, row + GROUP_ROWS)
                    bias = block_bias(
                        row,
                        next_begin,
                        start,
                        length,
                        row_span,
                        next_span,
                        row_times,
                        tables,
                        REACH,
                        BUCKETS,
                        False,
                        S_LAYOUT,
                    )
                    next_begin = _block_begin(i + 2, full_origin, full, edge_origin)
                    next_span = read_span(key_spans_ptr, start, next_begin, length, BUCKETS)
                    logits = warpgroup_mma_wait(1, deps=(coming,))
                    mbarrier.arrive(k_free.index(next_slot), count=1)
                    begin = _block_begin(i, full_origin, full, edge_origin)
                    following = weights_of(logits, begin, last_seen, half_alpha, i >= full, P_LAYOUT, DTYPE)
                    acc = warpgroup_mma_wait(0, deps=(growing,))
                    mbarrier.arrive(v_free.index(slot), count=1)
                    p = following
                    used = ahead
                    slot = next_slot
                mbarrier.arrive(q_free, count=1)
                mbarrier.wait(v_full.index(slot), (used // STAGES) & 1)
                # Only the last block can reach over the end.
                if begin + _BLOCK_N > length:
                    _clear_behind(v_buffer.index(slot), begin, length)
                last = warpgroup_mma(p, v_buffer.index(slot), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(last,))
                mbarrier.arrive(v_free.index(slot), count=1)
                used += 1
                rows = gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, O_LAYOUT))
                cols = gl.arange(0, D, layout=gl.SliceLayout(0, O_LAYOUT))
                # 64 bits up to the group's first row, 32 behind it.
                first = out_ptr + ((start + row) * HEADS + head) * D
                places = gl.expand_dims(rows, 1) * (HEADS * D) + gl.expand_dims(cols, 0)
                inside = gl.expand_dims(rows < length - row, 1) & gl.expand_dims(cols < D, 0)
                gl.store(first + places, (acc * scale).to(DTYPE), mask=inside)


@gluon.jit
def _first_group(
    out_ptr,
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
    _multiply(0, out_ptr, work_ptr, tables, spans, buffers, barriers, numbers, HEADS, D, STAGES, REACH, BUCKETS)


@gluon.jit
def _second_group(
    out_ptr,
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
    _multiply(1, out_ptr, work_ptr, tables, spans, buffers, barriers, numbers, HEADS, D, STAGES, REACH, BUCKETS)


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
    """Any number of programs for ``items`` pairs of a line and a head; ``out [L, H, D]``, contiguous.

    ``work_ptr``: query tiles of 128 rows against blocks of 64 keys, under a plain mask and without targets. REACH and
    BUCKETS as in `KernelShape`; spans are those of 64 rows and of 64 keys.
    """
    q_buffer = gl.allocate_shared_memory(q_desc.dtype, [2, GROUP_ROWS, D], q_desc.layout)
    k_buffer = gl.allocate_shared_memory(k_desc.dtype, [STAGES, _BLOCK_N, D], k_desc.layout)
    v_buffer = gl.allocate_shared_memory(v_desc.dtype, [STAGES, _BLOCK_N, D], v_desc.layout)
    q_full, q_free = ring(1, 1).index(0), ring(1, 2).index(0)
    k_full, k_free = ring(STAGES, 1), ring(STAGES, 2)
    v_full, v_free = ring(STAGES, 1), ring(STAGES, 2)
    fence_async_shared()
    buffers = (q_buffer, k_buffer, v_buffer)
    barriers = (q_full, q_free, k_full, k_free, v_full, v_free)
    descriptors = (q_desc, k_desc, v_desc)
    strides = (q_head_stride, k_head_stride, v_head_stride)
    tables = (pos_ptr, time_ptr, bounds_ptr, row_times_ptr, key_times_ptr)
    spans = (row_spans_ptr, key_spans_ptr)
    numbers = (items, alpha, scale)
    gl.warp_specialize(
        [
            (
                _first_group,
                (out_ptr, work_ptr, tables, spans, buffers, barriers, numbers, HEADS, D, STAGES, REACH, BUCKETS),
            ),
            (
                _second_group,
                (out_ptr, work_ptr, tables, spans, buffers, barriers, numbers, HEADS, D, STAGES, REACH, BUCKETS),
            ),
            (_fetch, (work_ptr, descriptors, strides, buffers, barriers, items, HEADS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
