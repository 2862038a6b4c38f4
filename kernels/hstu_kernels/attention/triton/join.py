"""The kernel that adds up the pieces of long tiles, in the order of their columns or rows: the same sum every time."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hstu_kernels.attention.triton.primitives import store_tile
from hstu_kernels.attention.triton.schedule import LINE

_LINE = tl.constexpr(LINE)


@triton.jit
def _tile_of(work_ptr, piece):
    """Sequence start, length and tile begin of line ``piece``; the length of an empty line is 0."""
    line = work_ptr + piece.to(tl.int64) * _LINE
    return tl.load(line), tl.load(line + 1).to(tl.int32), tl.load(line + 3).to(tl.int32)


@triton.jit(do_not_specialize=["pieces", "factor"])
def hstu_join_kernel(
    out_ptr,
    partial_ptr,
    work_ptr,
    pieces,
    factor,
    HEADS: tl.constexpr,
    LONG: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Rows of ``out [L, H, WIDTH]``, STRIDE apart, that ``partial [pieces, H, TILE, BLOCK]`` hold, times ``factor``.

    One program for each line of a piece, head and ROWS rows of the tile; the program of a tile's first piece adds.
    A tile's next piece stands LONG lines further. EARLY: launched beside the end of the kernel ahead.
    """
    if EARLY:
        gdc_launch_dependents()
    PARTS: tl.constexpr = TILE // ROWS
    program = tl.program_id(0)
    part = program % PARTS
    head = (program // PARTS % HEADS).to(tl.int64)
    piece = program // (PARTS * HEADS)
    seq_start, seq_len, begin = _tile_of(work_ptr, piece)
    before_start, before_len, before_begin = _tile_of(work_ptr, tl.maximum(piece - LONG, 0))
    continues = (piece >= LONG) & (before_len > 0) & (before_start == seq_start) & (before_begin == begin)
    if EARLY:
        # Every program, also one that adds nothing: who comes next waits for this kernel alone.
        gdc_wait()
    if (seq_len > 0) & (continues == 0):
        inside = (part * ROWS + tl.arange(0, ROWS))[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        more = seq_len > 0
        while more:
            total += tl.load(partial_ptr + (piece.to(tl.int64) * HEADS + head) * (TILE * BLOCK) + inside)
            piece += LONG
            next_start, next_len, next_begin = _tile_of(work_ptr, tl.minimum(piece, pieces - 1))
            more = (piece < pieces) & (next_len > 0) & (next_start == seq_start) & (next_begin == begin)
        out_ptr += seq_start * STRIDE + head * WIDTH
        store_tile(out_ptr, total * factor, STRIDE, begin + part * ROWS, seq_len, ROWS, WIDTH, BLOCK)
