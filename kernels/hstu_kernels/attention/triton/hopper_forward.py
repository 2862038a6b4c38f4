"""The forward of Hopper GPUs for plain causal attention: warps that fetch beside warps that multiply.

One warp has the copy engine fetch q, k and v through rings of barriers. Two groups of four warps own 64 rows each, and
issue the next product of q and k before that of the weights and v, so that SiLU runs beside both. The programs stay:
each takes pair after pair of tiles from a list. No tile begins or ends alone: the first product of the next one is
issued with the last of this one, and the copy engine takes results away. Sums add up in the order of `hstu_fwd_kernel`.
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

from hstu_kernels.attention.triton.schedule import PAIR_LINE, PAIR_ROWS

_LINE = gl.constexpr(PAIR_LINE)
# Rows of one group of warps: those of a product.
GROUP_ROWS = gl.constexpr(64)
_TILE_ROWS = gl.constexpr(PAIR_ROWS // 2)


@gluon.jit
def _line_of(work_ptr, turn, items, HEADS: gl.constexpr):
    """Where the line of this program's pair of tiles in ``turn`` lies, and the head; behind the last one, another's."""
    item = snake(turn // 2, gl.num_programs(0), gl.program_id(0))
    return work_ptr + (gl.minimum(item, items - 1) // HEADS).to(gl.int64) * _LINE, item


@gluon.jit
def _read_tile(work_ptr, turn, items, HEADS: gl.constexpr, BLOCK_N: gl.constexpr):
    """What this program does in ``turn``: head, sequence start and length, first row, key blocks; 0 blocks: nothing.

    Turns go in twos. The tiles of a pair lie as far from the sequence's end as from its begin, so that all pairs of a
    sequence take the same time: the programs, which go through the list side by side, share what they read.
    """
    line, item = _line_of(work_ptr, turn, items, HEADS)
    start = gl.load(line)
    length = gl.load(line + 1).to(gl.int32)
    place = gl.load(line + 2).to(gl.int32)
    last = (length + _TILE_ROWS - 1) // _TILE_ROWS - 1
    late = last - place
    tile = gl.where(turn % 2 == 0, late, place)
    exists = (item < items) & (length > 0) & ((turn % 2 == 0) | (place < late))
    row = tile * _TILE_ROWS
    blocks = (gl.minimum(row + _TILE_ROWS, length) + BLOCK_N - 1) // BLOCK_N
    return item % HEADS, start, length, row, gl.where(exists, blocks, 0)


@gluon.jit
def _read_blocks(work_ptr, turn, items, HEADS: gl.constexpr, BLOCK_N: gl.constexpr):
    """Of it the first row and the blocks."""
    _head, _start, _length, row, blocks = _read_tile(work_ptr, turn, items, HEADS, BLOCK_N)
    return row, blocks


@gluon.jit
def _prefetch_tile(work_ptr, turn, items, HEADS: gl.constexpr):
    """Have the line of ``turn`` near: to read it ahead would hold registers through the loop over keys."""
    line, _item = _line_of(work_ptr, turn, items, HEADS)
    gl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [line.to(gl.int64, bitcast=True)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def snake(turn, programs, program):
    """To and fro, so that who took the most of one turn takes the least of the next."""
    return turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)


@gluon.jit
def _fetch(
    work_ptr,
    descriptors,
    strides,
    buffers,
    barriers,
    items,
    HEADS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The warp that fetches. A slot is free again once both groups said so."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    q_desc, k_desc, v_desc = descriptors
    q_head_stride, k_head_stride, v_head_stride = strides
    q_buffer, k_buffer, v_buffer, _o_buffer = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    turns = (items + programs - 1) // programs * 2
    fetched = program * 0
    tiles = program * 0
    head, start, _length, row, blocks = _read_tile(work_ptr, program * 0, items, HEADS, BLOCK_N)
    for turn in range(turns):
        coming = _read_tile(work_ptr, turn + 1, items, HEADS, BLOCK_N)
        first = start.to(gl.int32)
        if blocks > 0:
            place = tiles % 2
            q_bar = q_full.index(place)
            mbarrier.wait(q_free.index(place), ((tiles // 2) & 1) ^ 1)
            mbarrier.expect(q_bar, 2 * q_desc.block_type.nbytes)
            column = head * q_head_stride
            tma.async_copy_global_to_shared(q_desc, [first + row, column], q_bar, q_buffer.index(2 * place))
            second_row = first + row + GROUP_ROWS
            tma.async_copy_global_to_shared(q_desc, [second_row, column], q_bar, q_buffer.index(2 * place + 1))
            tiles += 1
            for i in range(blocks):
                begin = first + i * BLOCK_N
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
        head, start, _length, row, blocks = coming


@gluon.jit
def silu_of(logits, half_alpha):
    """SiLU of ``alpha * logits``."""
    half = logits * half_alpha
    tanh = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=gl.float32, is_pure=True, pack=1)
    return half * tanh + half


@gluon.jit
def weights_of(logits, begin, last, half_alpha, edge, P_LAYOUT: gl.constexpr, DTYPE: gl.constexpr):
    """SiLU of ``alpha * logits [64, N]`` as the operand of the next product; 0 behind column ``last [64, 1]``.

    ``begin``: the first column. ``edge``: whether some lie behind.
    """
    return gl.convert_layout(exact_weights_of(logits, begin, last, half_alpha, edge).to(DTYPE), P_LAYOUT)


@gluon.jit
def exact_weights_of(logits, begin, last, half_alpha, edge):
    """The same in float32, in the layout of ``logits``."""
    weights = silu_of(logits, half_alpha)
    if edge:
        cols = begin + gl.arange(0, logits.shape[1], layout=gl.SliceLayout(0, logits.type.layout))
        weights = gl.where(gl.expand_dims(cols, 0) <= last, weights, 0.0)
    return weights


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
def _packed(weights):
    """The same, two to a register from here on: put together between two products they would make these wait."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [weights], dtype=weights.dtype, is_pure=False, pack=2)


@gluon.jit
def _last_seen(row, LAYOUT: gl.constexpr):
    """The last column, ``[64, 1]``, that each row from ``row`` on sees.

    Keys behind the end lie behind every row that is written, whatever another sequence holds there.
    """
    return gl.expand_dims(row + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, LAYOUT)), 1)


@gluon.jit
def store_rows(
    out_ptr,
    out_desc,
    staged,
    acc,
    scale,
    head,
    start,
    row,
    length,
    HEADS: gl.constexpr,
    D: gl.constexpr,
):
    """The rows of a group from ``row`` on, by way of ``staged [64, D]``; by the copy engine where all of them exist."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    # What was staged before has been read.
    tma.store_wait(0)
    gl.thread_barrier()
    staged.store((acc * scale).to(staged.dtype))
    fence_async_shared()
    gl.thread_barrier()
    if row + GROUP_ROWS <= length:
        tma.async_copy_shared_to_global(out_desc, [start.to(gl.int32) + row, head * D], staged)
    else:
        rows = gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, ROWS))
        cols = gl.arange(0, D, layout=gl.SliceLayout(0, ROWS))
        # 64 bits up to the group's first row, 32 behind it.
        first = out_ptr + ((start + row) * HEADS + head) * D
        places = gl.expand_dims(rows, 1) * (HEADS * D) + gl.expand_dims(cols, 0)
        inside = gl.expand_dims(rows < length - row, 1) & gl.expand_dims(cols < D, 0)
        gl.store(first + places, staged.load(ROWS), mask=inside)


@gluon.jit
def _pass_over(count, place, barriers, STAGES: gl.constexpr):
    """Say that the block at ``place`` of the rings has been read, which nobody will, if ``count`` is 1; ``count``."""
    _q_full, _q_free, k_full, k_free, v_full, v_free = barriers
    if count > 0:
        slot = place % STAGES
        phase = (place // STAGES) & 1
        # Not before it is there: until then the slot still counts for the block before it.
        mbarrier.wait(k_full.index(slot), phase)
        mbarrier.wait(v_full.index(slot), phase)
        mbarrier.arrive(k_free.index(slot), count=1)
        mbarrier.arrive(v_free.index(slot), count=1)
    return count


@gluon.jit
def _multiply(
    group: gl.constexpr,
    out_ptr,
    out_desc,
    work_ptr,
    buffers,
    barriers,
    items,
    alpha,
    scale,
    HEADS: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The group of warps that owns rows ``64 * group`` to ``64 * group + 63`` of each tile."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    program, programs = gl.program_id(0), gl.num_programs(0)
    q_buffer, k_buffer, v_buffer, o_buffer = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    DTYPE: gl.constexpr = q_buffer.dtype
    half_alpha = alpha * 0.5
    nothing = gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    turns = (items + programs - 1) // programs * 2
    turn = program * 0
    tile, blocks = _read_blocks(work_ptr, turn, items, HEADS, BLOCK_N)
    while (blocks == 0) & (turn < turns):
        turn += 1
        tile, blocks = _read_blocks(work_ptr, turn, items, HEADS, BLOCK_N)
    used = program * 0
    tiles = program * 0
    if blocks > 0:
        # Nothing runs beside the first product of a program.
        mbarrier.wait(q_full.index(0), 0)
        mbarrier.wait(k_full.index(0), 0)
        logits = warpgroup_mma(
            q_buffer.index(group), k_buffer.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        logits = warpgroup_mma_wait(0, deps=(logits,))
        mbarrier.arrive(k_free.index(0), count=1)
        last_seen = _last_seen(tile + group * GROUP_ROWS, S_LAYOUT)
        weights = exact_weights_of(logits, 0, last_seen, half_alpha, tile == 0).to(DTYPE)
        while blocks > 0:
            _prefetch_tile(work_ptr, turn + 1, items, HEADS)
            row = tile + group * GROUP_ROWS
            last_seen = _last_seen(row, S_LAYOUT)
            place = tiles % 2
            q = q_buffer.index(2 * place + group)
            p = gl.convert_layout(_packed(weights), P_LAYOUT)
            acc = gl.zeros([GROUP_ROWS, D], gl.float32, O_LAYOUT)
            slot = used % STAGES
            # Of the two narrow blocks on the diagonal the first group sees one, and the second group one half.
            NARROW: gl.constexpr = BLOCK_N == GROUP_ROWS
            seen, edges = blocks, tile
            if NARROW:
                edges = row
                if group == 0:
                    seen = gl.minimum(blocks, row // BLOCK_N + 1)
            for i in range(1, seen):
                ahead = used + 1
                next_slot = ahead % STAGES
                mbarrier.wait(k_full.index(next_slot), (ahead // STAGES) & 1)
                keys = k_buffer.index(next_slot).permute((1, 0))
                coming = warpgroup_mma(q, keys, nothing, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(slot), (used // STAGES) & 1)
                growing = warpgroup_mma(p, v_buffer.index(slot), acc, is_async=True)
                logits = warpgroup_mma_wait(1, deps=(coming,))
                mbarrier.arrive(k_free.index(next_slot), count=1)
                begin = i * BLOCK_N
                following = weights_of(logits, begin, last_seen, half_alpha, begin >= edges, P_LAYOUT, DTYPE)
                acc = warpgroup_mma_wait(0, deps=(growing,))
                mbarrier.arrive(v_free.index(slot), count=1)
                p = following
                used = ahead
                slot = next_slot
            mbarrier.arrive(q_free.index(place), count=1)
            tiles += 1
            mbarrier.wait(v_full.index(slot), (used // STAGES) & 1)
            ahead = used + 1
            if NARROW and group == 0:
                ahead += _pass_over(blocks - seen, ahead, barriers, STAGES)
            # Only the last block can reach over the end.
            begin = (seen - 1) * BLOCK_N
            head, start, length, _row, _blocks = _read_tile(work_ptr, turn, items, HEADS, BLOCK_N)
            if begin + BLOCK_N > length:
                _clear_behind(v_buffer.index(slot), begin, length)
            turn += 1
            coming_tile, coming_blocks = _read_blocks(work_ptr, turn, items, HEADS, BLOCK_N)
            while (coming_blocks == 0) & (turn < turns):
                turn += 1
                coming_tile, coming_blocks = _read_blocks(work_ptr, turn, items, HEADS, BLOCK_N)
            if coming_blocks > 0:
                next_place = tiles % 2
                mbarrier.wait(q_full.index(next_place), (tiles // 2) & 1)
                next_slot = ahead % STAGES
                mbarrier.wait(k_full.index(next_slot), (ahead // STAGES) & 1)
                keys = k_buffer.index(next_slot).permute((1, 0))
                p = _packed(p)
                coming = warpgroup_mma(
                    q_buffer.index(2 * next_place + group), keys, nothing, use_acc=False, is_async=True
                )
                growing = warpgroup_mma(p, v_buffer.index(slot), acc, is_async=True)
                logits = warpgroup_mma_wait(1, deps=(coming,))
                mbarrier.arrive(k_free.index(next_slot), count=1)
                coming_seen = _last_seen(coming_tile + group * GROUP_ROWS, S_LAYOUT)
                weights = exact_weights_of(logits, 0, coming_seen, half_alpha, coming_tile == 0).to(DTYPE)
                acc = warpgroup_mma_wait(0, deps=(growing,))
            else:
                growing = warpgroup_mma(p, v_buffer.index(slot), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(growing,))
            mbarrier.arrive(v_free.index(slot), count=1)
            store_rows(out_ptr, out_desc, o_buffer.index(group), acc, scale, head, start, row, length, HEADS, D)
            used = ahead
            tile, blocks = coming_tile, coming_blocks
        tma.store_wait(0)


@gluon.jit
def _first_group(
    out_ptr,
    out_desc,
    work_ptr,
    buffers,
    barriers,
    items,
    alpha,
    scale,
    HEADS: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    _multiply(0, out_ptr, out_desc, work_ptr, buffers, barriers, items, alpha, scale, HEADS, D, BLOCK_N, STAGES)


@gluon.jit
def _second_group(
    out_ptr,
    out_desc,
    work_ptr,
    buffers,
    barriers,
    items,
    alpha,
    scale,
    HEADS: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    _multiply(1, out_ptr, out_desc, work_ptr, buffers, barriers, items, alpha, scale, HEADS, D, BLOCK_N, STAGES)


@gluon.jit
def ring(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit(do_not_specialize=["items", "alpha", "scale"])
def hopper_fwd_kernel(
    out_ptr,
    work_ptr,
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
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Any number of programs for ``items`` lines and heads; ``out [L, H, D]``, contiguous.

    ``work_ptr``: pairs of tiles of 128 rows, under a plain mask and without targets.
    """
    # Two tiles of two groups.
    q_buffer = gl.allocate_shared_memory(q_desc.dtype, [4, GROUP_ROWS, D], q_desc.layout)
    k_buffer = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, D], k_desc.layout)
    v_buffer = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK_N, D], v_desc.layout)
    # Results on their way to the copy engine.
    o_buffer = gl.allocate_shared_memory(q_desc.dtype, [2, GROUP_ROWS, D], q_desc.layout)
    q_full, q_free = ring(2, 1), ring(2, 2)
    k_full, k_free = ring(STAGES, 1), ring(STAGES, 2)
    v_full, v_free = ring(STAGES, 1), ring(STAGES, 2)
    fence_async_shared()
    buffers = (q_buffer, k_buffer, v_buffer, o_buffer)
    barriers = (q_full, q_free, k_full, k_free, v_full, v_free)
    descriptors = (q_desc, k_desc, v_desc)
    strides = (q_head_stride, k_head_stride, v_head_stride)
    gl.warp_specialize(
        [
            (
                _first_group,
                (out_ptr, out_desc, work_ptr, buffers, barriers, items, alpha, scale, HEADS, D, BLOCK_N, STAGES),
            ),
            (
                _second_group,
                (out_ptr, out_desc, work_ptr, buffers, barriers, items, alpha, scale, HEADS, D, BLOCK_N, STAGES),
            ),
            (_fetch, (work_ptr, descriptors, strides, buffers, barriers, items, HEADS, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
