"""The list of pairs of tiles on Hopper, and the warp that fetches: for forwards, in part for cached targets."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from hstu_kernels.attention.triton.hopper_shared import GROUP_ROWS, slot_of
from hstu_kernels.attention.triton.schedule import PAIR_LINE, PAIR_ROWS

_LINE = gl.constexpr(PAIR_LINE)
_TILE_ROWS = gl.constexpr(PAIR_ROWS // 2)
# Whose q lie in shared memory at a time: a tile's and the next one's.
TILES_AHEAD = gl.constexpr(2)


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
    """Of `read_tile` the first row and the key blocks."""
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
def fetch_rows(q_desc, start, row, head, stride, tiles, buffers, barriers, TILES: gl.constexpr):
    """Have q of a tile, number ``tiles`` of all, fetched from ``row`` of a sequence on: 64 rows for each group."""
    q_buffer, q_full, q_free = buffers[0], barriers[0], barriers[1]
    place, phase = slot_of(tiles, TILES)
    q_bar = q_full.index(place)
    mbarrier.wait(q_free.index(place), phase ^ 1)
    mbarrier.expect(q_bar, 2 * q_desc.block_type.nbytes)
    column = head * stride
    first = start.to(gl.int32) + row
    tma.async_copy_global_to_shared(q_desc, [first, column], q_bar, q_buffer.index(2 * place))
    tma.async_copy_global_to_shared(q_desc, [first + GROUP_ROWS, column], q_bar, q_buffer.index(2 * place + 1))


@gluon.jit
def fetch_block(source, row, head, fetched, buffers, barriers, STAGES: gl.constexpr):
    """Have keys and values of a block, number ``fetched`` of all, fetched from ``row`` on.

    ``source``: descriptors of both, and strides of their heads.
    """
    k_desc, v_desc, k_stride, v_stride = source
    k_buffer, v_buffer = buffers[1], buffers[2]
    _q_full, _q_free, k_full, k_free, v_full, v_free = barriers
    slot, phase = slot_of(fetched, STAGES)
    before = phase ^ 1
    k_bar = k_full.index(slot)
    mbarrier.wait(k_free.index(slot), before)
    mbarrier.expect(k_bar, k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [row, head * k_stride], k_bar, k_buffer.index(slot))
    v_bar = v_full.index(slot)
    mbarrier.wait(v_free.index(slot), before)
    mbarrier.expect(v_bar, v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(v_desc, [row, head * v_stride], v_bar, v_buffer.index(slot))


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
    source = (k_desc, v_desc, k_head_stride, v_head_stride)
    turns = (items + programs - 1) // programs * 2
    fetched = program * 0
    tiles = program * 0
    head, start, _length, row, blocks = read_tile(work_ptr, program * 0, items, HEADS, BLOCK_N)
    for turn in range(turns):
        coming = read_tile(work_ptr, turn + 1, items, HEADS, BLOCK_N)
        first = start.to(gl.int32)
        if blocks > 0:
            fetch_rows(q_desc, start, row, head, q_head_stride, tiles, buffers, barriers, TILES_AHEAD)
            tiles += 1
            for i in range(blocks):
                begin = first + i * BLOCK_N
                fetch_block(source, begin, head, fetched, buffers, barriers, STAGES)
                fetched += 1
        head, start, _length, row, blocks = coming
