"""The warp that fetches for cached scoring on Hopper, and what it shares with those that multiply."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hstu_kernels.attention.triton.hopper_fetch import fetch_block, fetch_rows, snake
from hstu_kernels.attention.triton.target_sums import FIELDS

_FIELDS = gl.constexpr(FIELDS)
# Whose q lie in shared memory at a time.
TILES_AHEAD = gl.constexpr(1)


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
    own = (k_desc, v_desc, k_stride, v_stride)
    cache = (cache_k_desc, cache_v_desc, cache_k_stride, cache_v_stride)
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
                fetch_rows(q_desc, start, row, head, q_stride, tiles, buffers, barriers, TILES_AHEAD)
                tiles += 1
                if piece == 0:
                    fetch_block(own, first, head, fetched, buffers, barriers, STAGES)
                    fetched += 1
                # Worked out here: what does not change from tile to tile would take one of few registers.
                here = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [origin], gl.int32, is_pure=False, pack=1)
                cached = cache_start.to(gl.int32) + here * BLOCK_N
                for i in range(blocks):
                    begin = cached + i * BLOCK_N
                    fetch_block(cache, begin, head, fetched, buffers, barriers, STAGES)
                    fetched += 1
