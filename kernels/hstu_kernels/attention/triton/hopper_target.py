"""Cached scoring on Hopper GPUs without a bias: warps that fetch beside warps that multiply, as in `hopper_forward`.

Targets see all of their user's history and themselves. So a tile of 128 targets meets full blocks of cached keys; the
last one alone can reach over the history's end. What a target adds to itself comes from one block more, the tile's own
keys and values, through the same rings: of its logits the diagonal is taken, and each row's value times its weight
is what the sum begins with. It is worked out beside the product with the first cached keys. The copy engine takes
results away, from where sums of stretches lie before.
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

from hstu_kernels.attention.triton.hopper_fetch import snake
from hstu_kernels.attention.triton.hopper_shared import GROUP_ROWS, allocate, silu_of, slot_of, store_rows, weights_of
from hstu_kernels.attention.triton.hopper_target_fetch import TILES_AHEAD, fetch, read_item


# Not one with the forward's: with this text behind it the forward's loop is scheduled anew, and was slower in the one
# run that had it (docs/performance-notes.md).
@gluon.jit
def _clear_behind(values, begin, length):
    """Zeros for rows of another sequence: a weight of 0 does not hide what is no number.

    Thirty-two rows at a time: what lies before the end is not touched, and what lies behind it is not read.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    ROWS: gl.constexpr = 32
    WIDTH: gl.constexpr = values.shape[1]
    # Both groups write, and the same: neither waits for the other.
    for part in gl.static_range(values.shape[0] // ROWS):
        first = begin + part * ROWS
        if first + ROWS > length:
            some = values.slice(part * ROWS, ROWS)
            zeros = gl.zeros([ROWS, WIDTH], values.dtype, LAYOUT)
            if first < length:
                rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
                some.store(gl.where(gl.expand_dims(rows < length, 1), some.load(LAYOUT), zeros))
            else:
                some.store(zeros)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _start_logits(q, used, first: gl.constexpr, k_buffer, k_full, nothing, STAGES: gl.constexpr):
    """The product of ``q`` and the keys of block ``used`` from row ``first`` on, as many as ``nothing`` has columns."""
    slot, phase = slot_of(used, STAGES)
    mbarrier.wait(k_full.index(slot), phase)
    keys = k_buffer.index(slot).slice(first, nothing.shape[1]).permute((1, 0))
    return warpgroup_mma(q, keys, nothing, use_acc=False, is_async=True)


@gluon.jit
def _own_terms(
    logits, used, first: gl.constexpr, v_buffer, v_full, v_free, half_alpha, LAYOUT: gl.constexpr, STAGES: gl.constexpr
):
    """``[64, D]``: of each row the value, row ``first`` and on of block ``used``, times SiLU of its logit with itself.

    ``logits [64, 64]``: of these rows with each other.
    """
    OF: gl.constexpr = logits.type.layout
    rows = gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, OF))
    cols = gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(0, OF))
    itself = gl.expand_dims(rows, 1) == gl.expand_dims(cols, 0)
    own = gl.sum(gl.where(itself, logits, 0.0), 1)
    weights = gl.convert_layout(silu_of(own, half_alpha), gl.SliceLayout(1, LAYOUT))
    slot, phase = slot_of(used, STAGES)
    mbarrier.wait(v_full.index(slot), phase)
    values = v_buffer.index(slot).slice(first, GROUP_ROWS).load(LAYOUT)
    mbarrier.arrive(v_free.index(slot), count=1)
    return gl.expand_dims(weights, 1) * values.to(gl.float32)


@gluon.jit
def _store_sums(out_ptr, acc, place, left, head, HEADS: gl.constexpr):
    """The first ``left`` rows of ``acc [64, D]``, float32, from row ``place`` on, by 32 bytes as memory has them."""
    LAYOUT: gl.constexpr = acc.type.layout
    D: gl.constexpr = acc.shape[1]
    rows = gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, LAYOUT))
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    # 64 bits up to the group's first row, 32 behind it.
    places = gl.expand_dims(rows, 1) * (HEADS * D) + gl.expand_dims(cols, 0)
    inside = gl.expand_dims(rows < left, 1) & gl.expand_dims(cols < D, 0)
    gl.store(out_ptr + (place * HEADS + head) * D + places, acc, mask=inside)


@gluon.jit
def _multiply(
    group: gl.constexpr,
    out,
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
    OWN_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, GROUP_ROWS, 16])
    # Where in the own block this group's rows begin.
    OWN: gl.constexpr = group * 64
    program, programs = gl.program_id(0), gl.num_programs(0)
    pieces, piece_blocks, total_rows, alpha, scale = numbers
    q_buffer, k_buffer, v_buffer, o_buffer = buffers
    # Rows eight floats apart in turn: eight rows of a warp's store meet different banks.
    TOTALS: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    totals = o_buffer._reinterpret(gl.float32, [2, GROUP_ROWS, D], TOTALS)
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    DTYPE: gl.constexpr = q_buffer.dtype
    half_alpha = alpha * 0.5
    nothing = gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    nothing_own = gl.zeros([GROUP_ROWS, GROUP_ROWS], gl.float32, OWN_LAYOUT)
    lines = gl.load(work_ptr).to(gl.int32)
    items = lines * HEADS * pieces
    q = q_buffer.index(group)
    total = totals.index(group)
    used = program * 0
    tiles = program * 0
    for turn in range((items + programs - 1) // programs):
        item = snake(turn, programs, program)
        if item < items:
            piece, head, start, length, row, _cache_start, history, origin, blocks = read_item(
                work_ptr, item, lines, piece_blocks, HEADS, BLOCK_N
            )
            if (piece == 0) | (blocks > 0):
                mbarrier.wait(q_full.index(0), tiles & 1)
                tiles += 1
                if blocks > 0:
                    if piece == 0:
                        own = _start_logits(q, used, OWN, k_buffer, k_full, nothing_own, STAGES)
                        logits = _start_logits(q, used + 1, 0, k_buffer, k_full, nothing, STAGES)
                        own = warpgroup_mma_wait(1, deps=(own,))
                        mbarrier.arrive(k_free.index(used % STAGES), count=1)
                        acc = _own_terms(own, used, OWN, v_buffer, v_full, v_free, half_alpha, O_LAYOUT, STAGES)
                        logits = warpgroup_mma_wait(0, deps=(logits,))
                        used += 1
                    else:
                        acc = gl.zeros([GROUP_ROWS, D], gl.float32, O_LAYOUT)
                        logits = _start_logits(q, used, 0, k_buffer, k_full, nothing, STAGES)
                        logits = warpgroup_mma_wait(0, deps=(logits,))
                    mbarrier.arrive(k_free.index(used % STAGES), count=1)
                    begin = origin * BLOCK_N
                    p = weights_of(logits, begin, history - 1, half_alpha, begin + BLOCK_N > history, P_LAYOUT, DTYPE)
                    for i in range(1, blocks):
                        ahead = used + 1
                        coming = _start_logits(q, ahead, 0, k_buffer, k_full, nothing, STAGES)
                        slot, phase = slot_of(used, STAGES)
                        mbarrier.wait(v_full.index(slot), phase)
                        growing = warpgroup_mma(p, v_buffer.index(slot), acc, is_async=True)
                        logits = warpgroup_mma_wait(1, deps=(coming,))
                        mbarrier.arrive(k_free.index(ahead % STAGES), count=1)
                        begin += BLOCK_N
                        edge = begin + BLOCK_N > history
                        following = weights_of(logits, begin, history - 1, half_alpha, edge, P_LAYOUT, DTYPE)
                        acc = warpgroup_mma_wait(0, deps=(growing,))
                        mbarrier.arrive(v_free.index(slot), count=1)
                        if i % SPLIT_BLOCKS == 0:
                            # The end of a stretch: the sums of stretches add up in their order, whoever has them.
                            if i > SPLIT_BLOCKS:
                                acc = total.load(O_LAYOUT) + acc
                            # A result that is still being read lies there.
                            tma.store_wait(0)
                            gl.thread_barrier()
                            total.store(acc)
                            acc = gl.zeros([GROUP_ROWS, D], gl.float32, O_LAYOUT)
                        p = following
                        used = ahead
                    mbarrier.arrive(q_free.index(0), count=1)
                    slot, phase = slot_of(used, STAGES)
                    mbarrier.wait(v_full.index(slot), phase)
                    # Read once more: through the loop over keys these would hold registers.
                    piece, head, start, length, row, _cache_start, _history, _origin, _blocks = read_item(
                        work_ptr, item, lines, piece_blocks, HEADS, BLOCK_N
                    )
                    if begin + BLOCK_N > history:
                        _clear_behind(v_buffer.index(slot), begin, history)
                    growing = warpgroup_mma(p, v_buffer.index(slot), acc, is_async=True)
                    acc = warpgroup_mma_wait(0, deps=(growing,))
                    mbarrier.arrive(v_free.index(slot), count=1)
                    used += 1
                    if blocks > SPLIT_BLOCKS:
                        acc = total.load(O_LAYOUT) + acc
                else:
                    own = _start_logits(q, used, OWN, k_buffer, k_full, nothing_own, STAGES)
                    own = warpgroup_mma_wait(0, deps=(own,))
                    mbarrier.arrive(k_free.index(used % STAGES), count=1)
                    mbarrier.arrive(q_free.index(0), count=1)
                    acc = _own_terms(own, used, OWN, v_buffer, v_full, v_free, half_alpha, O_LAYOUT, STAGES)
                    used += 1
                row += group * GROUP_ROWS
                if out[0].dtype.element_ty == DTYPE:
                    staged = o_buffer.index(2 * group)
                    store_rows(out, staged, acc, scale, head, start, row, length, HEADS, D)
                else:
                    _store_sums(out[0], acc, piece.to(gl.int64) * total_rows + start + row, length - row, head, HEADS)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["pieces", "piece_blocks", "total_rows", "alpha", "scale"])
def hopper_target_kernel(
    out_ptr,
    work_ptr,
    q_desc,
    k_desc,
    v_desc,
    cache_k_desc,
    cache_v_desc,
    out_desc,
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
    # Of results twice the memory: where one lies on its way to the copy engine its sums, in float32, were.
    buffers, barriers = allocate(q_desc, k_desc, v_desc, TILES_AHEAD, 4, BLOCK_N, STAGES)
    descriptors = (q_desc, k_desc, v_desc, cache_k_desc, cache_v_desc)
    strides = (q_head_stride, k_head_stride, v_head_stride, cache_k_head_stride, cache_v_head_stride)
    numbers = (pieces, piece_blocks, total_rows, alpha, scale)
    out = (out_ptr, out_desc)
    gl.warp_specialize(
        [
            (_multiply, (0, out, work_ptr, buffers, barriers, numbers, HEADS, D, BLOCK_N, STAGES, SPLIT_BLOCKS)),
            (_multiply, (1, out, work_ptr, buffers, barriers, numbers, HEADS, D, BLOCK_N, STAGES, SPLIT_BLOCKS)),
            (fetch, (work_ptr, descriptors, strides, buffers, barriers, pieces, piece_blocks, HEADS, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
