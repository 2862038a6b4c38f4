"""Cached scoring on Hopper GPUs without a bias: warps that fetch beside warps that multiply, as in `hopper_forward`.

Targets see all of their user's history and themselves. So a tile of 128 targets meets full blocks of cached keys; the
last one alone can reach over the history's end. What a target adds to itself comes from one block more, the tile's own
keys and values, through the same rings: of its logits the diagonal is taken, and each row's value times its weight
is what the sum begins with.
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

from hstu_kernels.attention.triton.hopper_forward import GROUP_ROWS, clear_behind, ring, silu_of, snake, weights_of
from hstu_kernels.attention.triton.target_sums import FIELDS

TILE_ROWS = gl.constexpr(128)
_FIELDS = gl.constexpr(FIELDS)


@gluon.jit
def _read_item(work_ptr, item, lines, piece_blocks, HEADS: gl.constexpr, BLOCK_N: gl.constexpr):
    """What an item is: its piece and head, a line, and of the history's blocks the first and how many of them."""
    piece = item // (lines * HEADS)
    rest = item % (lines * HEADS)
    line = work_ptr + (1 + rest // HEADS).to(gl.int64) * _FIELDS
    start = gl.load(line)
    length = gl.load(line + 1).to(gl.int32)
    row = gl.load(line + 2).to(gl.int32)
    cache_start = gl.load(line + 3)
    history = gl.load(line + 4).to(gl.int32)
    origin = piece * piece_blocks
    blocks = gl.minimum((history + BLOCK_N - 1) // BLOCK_N - origin, piece_blocks)
    return piece, rest % HEADS, start, length, row, cache_start, history, origin, gl.maximum(blocks, 0)


@gluon.jit
def _slot(used, STAGES: gl.constexpr):
    return used % STAGES, (used // STAGES) & 1


@gluon.jit
def _fetch_block(
    k_desc,
    v_desc,
    row,
    k_column,
    v_column,
    used,
    k_buffer,
    v_buffer,
    k_full,
    k_free,
    v_full,
    v_free,
    STAGES: gl.constexpr,
):
    slot, phase = _slot(used, STAGES)
    k_bar = k_full.index(slot)
    mbarrier.wait(k_free.index(slot), phase ^ 1)
    mbarrier.expect(k_bar, k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [row, k_column], k_bar, k_buffer.index(slot))
    v_bar = v_full.index(slot)
    mbarrier.wait(v_free.index(slot), phase ^ 1)
    mbarrier.expect(v_bar, v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(v_desc, [row, v_column], v_bar, v_buffer.index(slot))


@gluon.jit
def _fetch(
    work_ptr,
    descriptors,
    strides,
    buffers,
    barriers,
    pieces,
    piece_blocks,
    HEADS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The warp that fetches. A slot is free again once both groups said so."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    q_desc, k_desc, v_desc, cache_k_desc, cache_v_desc = descriptors
    q_stride, k_stride, v_stride, cache_k_stride, cache_v_stride = strides
    q_buffer, k_buffer, v_buffer, _totals = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    lines = gl.load(work_ptr).to(gl.int32)
    items = lines * HEADS * pieces
    fetched = program * 0
    tiles = program * 0
    for turn in range((items + programs - 1) // programs):
        item = snake(turn, programs, program)
        if item < items:
            piece, head, start, _length, row, cache_start, _history, origin, blocks = _read_item(
                work_ptr, item, lines, piece_blocks, HEADS, BLOCK_N
            )
            if (piece == 0) | (blocks > 0):
                first = start.to(gl.int32) + row
                mbarrier.wait(q_free, (tiles & 1) ^ 1)
                mbarrier.expect(q_full, 2 * q_desc.block_type.nbytes)
                column = head * q_stride
                tma.async_copy_global_to_shared(q_desc, [first, column], q_full, q_buffer.index(0))
                tma.async_copy_global_to_shared(q_desc, [first + GROUP_ROWS, column], q_full, q_buffer.index(1))
                tiles += 1
                if piece == 0:
                    for part in gl.static_range(TILE_ROWS // BLOCK_N):
                        own = first + part * BLOCK_N
                        _fetch_block(
                            k_desc,
                            v_desc,
                            own,
                            head * k_stride,
                            head * v_stride,
                            fetched,
                            k_buffer,
                            v_buffer,
                            k_full,
                            k_free,
                            v_full,
                            v_free,
                            STAGES,
                        )
                        fetched += 1
                cached = cache_start.to(gl.int32) + origin * BLOCK_N
                for i in range(blocks):
                    _fetch_block(
                        cache_k_desc,
                        cache_v_desc,
                        cached + i * BLOCK_N,
                        head * cache_k_stride,
                        head * cache_v_stride,
                        fetched,
                        k_buffer,
                        v_buffer,
                        k_full,
                        k_free,
                        v_full,
                        v_free,
                        STAGES,
                    )
                    fetched += 1


@gluon.jit
def _own_weights(logits, shift: gl.constexpr, half_alpha, LAYOUT: gl.constexpr):
    """``[64]``: SiLU of the logits of each row with itself, column ``row + shift``."""
    OF: gl.constexpr = logits.type.layout
    rows = gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, OF))
    cols = gl.arange(0, logits.shape[1], layout=gl.SliceLayout(0, OF))
    itself = gl.expand_dims(rows + shift, 1) == gl.expand_dims(cols, 0)
    own = gl.sum(gl.where(itself, logits, 0.0), 1)
    return gl.convert_layout(silu_of(own, half_alpha), gl.SliceLayout(1, LAYOUT))


@gluon.jit
def _multiply(
    group: gl.constexpr,
    out_ptr,
    work_ptr,
    buffers,
    barriers,
    numbers,
    HEADS: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT_BLOCKS: gl.constexpr,
):
    """The group of warps that owns rows ``64 * group`` to ``64 * group + 63`` of each tile."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    # The own block that holds this group's rows, and where in it they begin.
    OWN_PART: gl.constexpr = group * 64 // BLOCK_N
    OWN_SHIFT: gl.constexpr = group * 64 % BLOCK_N
    program, programs = gl.program_id(0), gl.num_programs(0)
    pieces, piece_blocks, total_rows, alpha, scale = numbers
    q_buffer, k_buffer, v_buffer, totals = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    DTYPE: gl.constexpr = q_buffer.dtype
    half_alpha = alpha * 0.5
    nothing = gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    lines = gl.load(work_ptr).to(gl.int32)
    items = lines * HEADS * pieces
    q = q_buffer.index(group)
    total = totals.index(group)
    used = program * 0
    tiles = program * 0
    for turn in range((items + programs - 1) // programs):
        item = snake(turn, programs, program)
        if item < items:
            piece, head, start, length, row, _cache_start, history, origin, blocks = _read_item(
                work_ptr, item, lines, piece_blocks, HEADS, BLOCK_N
            )
            if (piece == 0) | (blocks > 0):
                mbarrier.wait(q_full, tiles & 1)
                tiles += 1
                acc = gl.zeros([GROUP_ROWS, D], gl.float32, O_LAYOUT)
                if piece == 0:
                    for part in gl.static_range(TILE_ROWS // BLOCK_N):
                        slot, phase = _slot(used, STAGES)
                        mbarrier.wait(k_full.index(slot), phase)
                        if part == OWN_PART:
                            keys = k_buffer.index(slot).permute((1, 0))
                            coming = warpgroup_mma(q, keys, nothing, use_acc=False, is_async=True)
                            logits = warpgroup_mma_wait(0, deps=(coming,))
                            mbarrier.arrive(k_free.index(slot), count=1)
                            weights = _own_weights(logits, OWN_SHIFT, half_alpha, O_LAYOUT)
                            mbarrier.wait(v_full.index(slot), phase)
                            values = v_buffer.index(slot).slice(OWN_SHIFT, GROUP_ROWS).load(O_LAYOUT)
                            acc = gl.expand_dims(weights, 1) * values.to(gl.float32)
                        else:
                            # The other group's rows. Waited for, so that no arrival counts for an earlier block.
                            mbarrier.arrive(k_free.index(slot), count=1)
                            mbarrier.wait(v_full.index(slot), phase)
                        mbarrier.arrive(v_free.index(slot), count=1)
                        used += 1
                if blocks > 0:
                    slot, phase = _slot(used, STAGES)
                    mbarrier.wait(k_full.index(slot), phase)
                    keys = k_buffer.index(slot).permute((1, 0))
                    logits = warpgroup_mma(q, keys, nothing, use_acc=False, is_async=True)
                    logits = warpgroup_mma_wait(0, deps=(logits,))
                    mbarrier.arrive(k_free.index(slot), count=1)
                    begin = origin * BLOCK_N
                    p = weights_of(logits, begin, history - 1, half_alpha, begin + BLOCK_N > history, P_LAYOUT, DTYPE)
                    for i in range(1, blocks):
                        ahead = used + 1
                        next_slot, next_phase = _slot(ahead, STAGES)
                        mbarrier.wait(k_full.index(next_slot), next_phase)
                        keys = k_buffer.index(next_slot).permute((1, 0))
                        coming = warpgroup_mma(q, keys, nothing, use_acc=False, is_async=True)
                        slot, phase = _slot(used, STAGES)
                        mbarrier.wait(v_full.index(slot), phase)
                        growing = warpgroup_mma(p, v_buffer.index(slot), acc, is_async=True)
                        logits = warpgroup_mma_wait(1, deps=(coming,))
                        mbarrier.arrive(k_free.index(next_slot), count=1)
                        begin += BLOCK_N
                        edge = begin + BLOCK_N > history
                        following = weights_of(logits, begin, history - 1, half_alpha, edge, P_LAYOUT, DTYPE)
                        acc = warpgroup_mma_wait(0, deps=(growing,))
                        mbarrier.arrive(v_free.index(slot), count=1)
                        if i % SPLIT_BLOCKS == 0:
                            # The end of a stretch: the sums of stretches add up in their order, whoever has them.
                            if i > SPLIT_BLOCKS:
                                acc = total.load(O_LAYOUT) + acc
                            total.store(acc)
                            acc = gl.zeros([GROUP_ROWS, D], gl.float32, O_LAYOUT)
                        p = following
                        used = ahead
                    mbarrier.arrive(q_free, count=1)
                    slot, phase = _slot(used, STAGES)
                    mbarrier.wait(v_full.index(slot), phase)
                    if begin + BLOCK_N > history:
                        clear_behind(v_buffer.index(slot), begin, history)
                    growing = warpgroup_mma(p, v_buffer.index(slot), acc, is_async=True)
                    acc = warpgroup_mma_wait(0, deps=(growing,))
                    mbarrier.arrive(v_free.index(slot), count=1)
                    used += 1
                    if blocks > SPLIT_BLOCKS:
                        acc = total.load(O_LAYOUT) + acc
                else:
                    mbarrier.arrive(q_free, count=1)
                row += group * GROUP_ROWS
                rows = gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, O_LAYOUT))
                cols = gl.arange(0, D, layout=gl.SliceLayout(0, O_LAYOUT))
                # 64 bits up to the group's first row, 32 behind it.
                first = out_ptr + ((piece.to(gl.int64) * total_rows + start + row) * HEADS + head) * D
                places = gl.expand_dims(rows, 1) * (HEADS * D) + gl.expand_dims(cols, 0)
                inside = gl.expand_dims(rows < length - row, 1) & gl.expand_dims(cols < D, 0)
                gl.store(first + places, (acc * scale).to(out_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _first_group(
    out_ptr,
    work_ptr,
    buffers,
    barriers,
    numbers,
    HEADS: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT_BLOCKS: gl.constexpr,
):
    _multiply(0, out_ptr, work_ptr, buffers, barriers, numbers, HEADS, D, BLOCK_N, STAGES, SPLIT_BLOCKS)


@gluon.jit
def _second_group(
    out_ptr,
    work_ptr,
    buffers,
    barriers,
    numbers,
    HEADS: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT_BLOCKS: gl.constexpr,
):
    _multiply(1, out_ptr, work_ptr, buffers, barriers, numbers, HEADS, D, BLOCK_N, STAGES, SPLIT_BLOCKS)


@gluon.jit(do_not_specialize=["pieces", "piece_blocks", "total_rows", "alpha", "scale"])
def hopper_target_kernel(
    out_ptr,
    work_ptr,
    q_desc,
    k_desc,
    v_desc,
    cache_k_desc,
    cache_v_desc,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    cache_k_head_stride,
    cache_v_head_stride,
    pieces,
    piece_blocks,
    total_rows,
    alpha,
    scale,
    HEADS: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT_BLOCKS: gl.constexpr,
):
    """Any number of programs for the tiles of the list, by pieces of ``piece_blocks`` blocks of the history, and heads.

    ``out [T, H, D]``, contiguous, or in float32 ``[pieces, T, H, D]``, with ``scale`` 1, for `hstu_target_sum_kernel`.
    SPLIT_BLOCKS: of a stretch. Pieces are stretches, or there is one with all of them: the same bits.
    """
    q_buffer = gl.allocate_shared_memory(q_desc.dtype, [2, GROUP_ROWS, D], q_desc.layout)
    k_buffer = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, D], k_desc.layout)
    v_buffer = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK_N, D], v_desc.layout)
    # Rows eight floats apart in turn: eight rows of a warp's store meet different banks.
    TOTALS: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    totals = gl.allocate_shared_memory(gl.float32, [2, GROUP_ROWS, D], TOTALS)
    q_full, q_free = ring(1, 1).index(0), ring(1, 2).index(0)
    k_full, k_free = ring(STAGES, 1), ring(STAGES, 2)
    v_full, v_free = ring(STAGES, 1), ring(STAGES, 2)
    fence_async_shared()
    buffers = (q_buffer, k_buffer, v_buffer, totals)
    barriers = (q_full, q_free, k_full, k_free, v_full, v_free)
    descriptors = (q_desc, k_desc, v_desc, cache_k_desc, cache_v_desc)
    strides = (q_head_stride, k_head_stride, v_head_stride, cache_k_head_stride, cache_v_head_stride)
    numbers = (pieces, piece_blocks, total_rows, alpha, scale)
    gl.warp_specialize(
        [
            (_first_group, (out_ptr, work_ptr, buffers, barriers, numbers, HEADS, D, BLOCK_N, STAGES, SPLIT_BLOCKS)),
            (_second_group, (out_ptr, work_ptr, buffers, barriers, numbers, HEADS, D, BLOCK_N, STAGES, SPLIT_BLOCKS)),
            (_fetch, (work_ptr, descriptors, strides, buffers, barriers, pieces, piece_blocks, HEADS, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
