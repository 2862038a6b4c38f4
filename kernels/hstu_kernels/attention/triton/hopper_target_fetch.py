"""The warp that fetches for cached scoring on Hopper, and what it shares with those that multiply."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from hstu_kernels.attention.triton.hopper_fetch import snake
from hstu_kernels.attention.triton.hopper_pieces import GROUP_ROWS
from hstu_kernels.attention.triton.target_sums import FIELDS

_FIELDS = gl.constexpr(FIELDS)


@gluon.jit
def read_item(work_ptr, item, lines, piece_blocks, HEADS: gl.constexpr, BLOCK_N: gl.constexpr):
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
def slot_of(used, STAGES: gl.constexpr):
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
    slot, phase = slot_of(used, STAGES)
    k_bar = k_full.index(slot)
    mbarrier.wait(k_free.index(slot), phase ^ 1)
    mbarrier.expect(k_bar, k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [row, k_column], k_bar, k_buffer.index(slot))
    v_bar = v_full.index(slot)
    mbarrier.wait(v_free.index(slot), phase ^ 1)
    mbarrier.expect(v_bar, v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(v_desc, [row, v_column], v_bar, v_buffer.index(slot))


@gluon.jit
def fetch(
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
    q_buffer, k_buffer, v_buffer, _totals, _o_buffer = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = barriers
    lines = gl.load(work_ptr).to(gl.int32)
    items = lines * HEADS * pieces
    fetched = program * 0
    tiles = program * 0
    for turn in range((items + programs - 1) // programs):
        item = snake(turn, programs, program)
        if item < items:
            piece, head, start, _length, row, cache_start, _history, origin, blocks = read_item(
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
                    _fetch_block(
                        k_desc,
                        v_desc,
                        first,
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
                # Worked out here: what does not change from tile to tile would take one of few registers.
                here = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [origin], gl.int32, is_pure=False, pack=1)
                cached = cache_start.to(gl.int32) + here * BLOCK_N
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
