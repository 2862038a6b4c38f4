"""The forward of Hopper GPUs for plain causal attention: warps that fetch beside warps that multiply.

One warp has the copy engine fetch q, k and v through rings of barriers. Two groups of four warps own 64 rows each, and
issue the next product of q and k before that of the weights and v, so that SiLU runs beside both. The programs stay:
each takes pair after pair of tiles from a list. No tile begins or ends alone: the first product of the next one is
issued with the last of this one, and the copy engine takes results away. Sums add up in the order of `hstu_fwd_kernel`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hstu_kernels.attention.triton.hopper_fetch import TILES_AHEAD, fetch_blocks, prefetch_tile, read_blocks, read_tile
from hstu_kernels.attention.triton.hopper_shared import (
    GROUP_ROWS,
    allocate,
    clear_behind,
    exact_weights_of,
    last_seen_by,
    pass_over,
    slot_of,
    store_rows,
    weights_of,
)


@gluon.jit
def _packed(weights):
    """The same, two to a register from here on: put together between two products they would make these wait."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [weights], dtype=weights.dtype, is_pure=False, pack=2)


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
):
    """The group of warps that owns rows ``64 * group`` to ``64 * group + 63`` of each tile."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    program, programs = gl.program_id(0), gl.num_programs(0)
    q_buffer, k_buffer, v_buffer, o_buffer = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    items, alpha, scale = numbers
    DTYPE: gl.constexpr = q_buffer.dtype
    half_alpha = alpha * 0.5
    nothing = gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    turns = (items + programs - 1) // programs * 2
    turn = program * 0
    tile, blocks = read_blocks(work_ptr, turn, items, HEADS, BLOCK_N)
    while (blocks == 0) & (turn < turns):
        turn += 1
        tile, blocks = read_blocks(work_ptr, turn, items, HEADS, BLOCK_N)
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
        last_seen = last_seen_by(tile + group * GROUP_ROWS, S_LAYOUT)
        weights = exact_weights_of(logits, 0, last_seen, half_alpha, tile == 0).to(DTYPE)
        while blocks > 0:
            prefetch_tile(work_ptr, turn + 1, items, HEADS)
            row = tile + group * GROUP_ROWS
            last_seen = last_seen_by(row, S_LAYOUT)
            place = tiles % TILES_AHEAD
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
                ahead += pass_over(blocks - seen, ahead, barriers, STAGES)
            # Only the last block can reach over the end.
            begin = (seen - 1) * BLOCK_N
            head, start, length, _row, _blocks = read_tile(work_ptr, turn, items, HEADS, BLOCK_N)
            if begin + BLOCK_N > length:
                clear_behind(v_buffer.index(slot), begin, length)
            turn += 1
            coming_tile, coming_blocks = read_blocks(work_ptr, turn, items, HEADS, BLOCK_N)
            while (coming_blocks == 0) & (turn < turns):
                turn += 1
                coming_tile, coming_blocks = read_blocks(work_ptr, turn, items, HEADS, BLOCK_N)
            if coming_blocks > 0:
                next_place, phase = slot_of(tiles, TILES_AHEAD)
                mbarrier.wait(q_full.index(next_place), phase)
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
                coming_seen = last_seen_by(coming_tile + group * GROUP_ROWS, S_LAYOUT)
                weights = exact_weights_of(logits, 0, coming_seen, half_alpha, coming_tile == 0).to(DTYPE)
                acc = warpgroup_mma_wait(0, deps=(growing,))
            else:
                growing = warpgroup_mma(p, v_buffer.index(slot), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(growing,))
            mbarrier.arrive(v_free.index(slot), count=1)
            store_rows(out, o_buffer.index(group), acc, scale, head, start, row, length, HEADS, D)
            used = ahead
            tile, blocks = coming_tile, coming_blocks
        tma.store_wait(0)


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
    buffers, barriers = allocate(q_desc, k_desc, v_desc, TILES_AHEAD, 2, BLOCK_N, STAGES)
    descriptors = (q_desc, k_desc, v_desc)
    strides = (q_head_stride, k_head_stride, v_head_stride)
    numbers = (items, alpha, scale)
    out = (out_ptr, out_desc)
    gl.warp_specialize(
        [
            (_multiply, (0, out, work_ptr, buffers, barriers, numbers, HEADS, D, BLOCK_N, STAGES)),
            (_multiply, (1, out, work_ptr, buffers, barriers, numbers, HEADS, D, BLOCK_N, STAGES)),
            (fetch_blocks, (work_ptr, descriptors, strides, buffers, barriers, items, HEADS, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
