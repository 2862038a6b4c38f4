"""The list of pairs of tiles on Hopper, and the warp that fetches what they need, with a bias and without."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from hstu_kernels.attention.triton.hopper_pieces import GROUP_ROWS
from hstu_kernels.attention.triton.schedule import PAIR_LINE, PAIR_ROWS

_LINE = gl.constexpr(PAIR_LINE)
_TILE_ROWS = gl.constexpr(PAIR_ROWS // 2)


@gluon.jit
def snake(turn, programs, program):
    """To and fro, so that who took the most of one turn takes the least of the next."""
    return turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)


@gluon.jit
def _line_of(work_ptr, turn, items, HEADS: gl.constexpr):
    """Where the line of this program's pair of tiles in ``turn`` lies, and the head; behind the last one, another's."""
    item = snake(turn // 2, gl.num_programs(0), gl.program_id(0))
    return work_ptr + (gl.minimum(item, items - 1) // HEADS).to(gl.int64) * _LINE, item


@gluon.jit
def read_tile(work_ptr, turn, items, HEADS: gl.constexpr, BLOCK_N: gl.constexpr):
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
def read_blocks(work_ptr, turn, items, HEADS: gl.constexpr, BLOCK_N: gl.constexpr):
    """Of it the first row and the blocks."""
    _head, _start, _length, row, blocks = read_tile(work_ptr, turn, items, HEADS, BLOCK_N)
    return row, blocks


@gluon.jit
def prefetch_tile(work_ptr, turn, items, HEADS: gl.constexpr):
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
def fetch_blocks(
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
    head, start, _length, row, blocks = read_tile(work_ptr, program * 0, items, HEADS, BLOCK_N)
    for turn in range(turns):
        coming = read_tile(work_ptr, turn + 1, items, HEADS, BLOCK_N)
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
