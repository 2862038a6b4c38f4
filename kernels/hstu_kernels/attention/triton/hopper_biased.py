"""The forward of Hopper GPUs for causal attention with a bias of positions alone: `hopper_forward`, and a look-up.

The bias is where a product's sum begins. That of the next block is fetched while the two products of this one run, so
that what waits for memory there waits beside the tensor cores. With times the kernel that runs everywhere is the faster
one: their look-ups are chains of comparisons, which two groups of warps do not hide (docs/performance-notes.md).
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

from hstu_kernels.attention.triton.assembly import constraints, diagonal_look_up
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
_DIAGONALS = gl.constexpr(diagonal_look_up(32, 1))
_LOOK_UP = gl.constexpr(constraints("f", 32, "r", "l", elements=32))
_BOUNDED_DIAGONALS = gl.constexpr(diagonal_look_up(32, 1, bounded=True))
_BOUNDED_LOOK_UP = gl.constexpr(constraints("f", 32, "r", "l", "r", elements=32))


@gluon.jit
def _begin_of(block, seen, row):
    """Where a block begins; behind the last one stands one of which nothing is seen."""
    return gl.where(block < seen, block * _BLOCK_N, row + GROUP_ROWS)


@gluon.jit
def _positions(row, begin, pos_ptr, REACH: gl.constexpr, LAYOUT: gl.constexpr):
    """Entries ``[64, 64]`` for rows from ``row`` and keys from ``begin`` on; beyond the table stand its last ones.

    In assembly, each thread for the places in which a product leaves its elements: these warps have no shared memory
    to send anything through.
    """
    rows = gl.expand_dims(row + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT)), 1)
    cols = gl.expand_dims(begin + gl.arange(0, 64, layout=gl.SliceLayout(0, LAYOUT)), 0)
    index = (cols + REACH) - rows
    base = pos_ptr.to(gl.int64, bitcast=True)
    # Of the block's corners, those farthest apart.
    if (begin + (REACH - 63) - row >= 0) & (begin + 63 - row <= REACH):
        value = gl.inline_asm_elementwise(_DIAGONALS, _LOOK_UP, [index, base], dtype=gl.float32, is_pure=True, pack=32)
    else:
        value = gl.inline_asm_elementwise(
            _BOUNDED_DIAGONALS, _BOUNDED_LOOK_UP, [index, base, gl.to_tensor(2 * REACH)], dtype=gl.float32,
            is_pure=True, pack=32,
        )  # fmt: skip
    return value


@gluon.jit
def _multiply(
    group: gl.constexpr,
    out,
    work_ptr,
    pos_ptr,
    buffers,
    barriers,
    numbers,
    HEADS: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    REACH: gl.constexpr,
):
    """The group of warps that owns rows ``64 * group`` to ``64 * group + 63`` of each tile."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    program, programs = gl.program_id(0), gl.num_programs(0)
    q_buffer, k_buffer, v_buffer, o_buffer = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
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
            bias = _positions(row, _begin_of(0, seen, row), pos_ptr, REACH, S_LAYOUT)
            last_seen = last_seen_by(row, S_LAYOUT)
            place, phase = slot_of(tiles, TILES_AHEAD)
            mbarrier.wait(q_full.index(place), phase)
            tiles += 1
            q = q_buffer.index(2 * place + group)
            slot = used % STAGES
            mbarrier.wait(k_full.index(slot), (used // STAGES) & 1)
            coming = warpgroup_mma(q, k_buffer.index(slot).permute((1, 0)), bias, is_async=True)
            bias = _positions(row, _begin_of(1, seen, row), pos_ptr, REACH, S_LAYOUT)
            logits = warpgroup_mma_wait(0, deps=(coming,))
            mbarrier.arrive(k_free.index(slot), count=1)
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
                bias = _positions(row, _begin_of(i + 1, seen, row), pos_ptr, REACH, S_LAYOUT)
                logits = warpgroup_mma_wait(1, deps=(coming,))
                mbarrier.arrive(k_free.index(next_slot), count=1)
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
):
    """Any number of programs for ``items`` lines and heads; ``out [L, H, D]``, contiguous.

    ``work_ptr``: pairs of tiles of 128 rows, under a plain mask and without targets. ``pos_ptr [2 REACH + 1]``:
    float32, divided by alpha.
    """
    buffers, barriers = allocate(q_desc, k_desc, v_desc, TILES_AHEAD, 2, _BLOCK_N, STAGES)
    descriptors = (q_desc, k_desc, v_desc)
    strides = (q_head_stride, k_head_stride, v_head_stride)
    numbers = (items, alpha, scale)
    out = (out_ptr, out_desc)
    gl.warp_specialize(
        [
            (_multiply, (0, out, work_ptr, pos_ptr, buffers, barriers, numbers, HEADS, D, STAGES, REACH)),
            (_multiply, (1, out, work_ptr, pos_ptr, buffers, barriers, numbers, HEADS, D, STAGES, REACH)),
            (fetch_blocks, (work_ptr, descriptors, strides, buffers, barriers, items, HEADS, _BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
