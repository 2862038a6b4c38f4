"""The kernel that writes lists of pairs of tiles, for programs that stay."""

import triton
import triton.language as tl

from hstu_kernels.attention.triton.schedule import PAIR_LINE, PAIR_ROWS

_LINE, _ROWS = tl.constexpr(PAIR_LINE), tl.constexpr(PAIR_ROWS)


@triton.jit
def _put(lines_ptr, line, start, length, place, inside):
    """Write lines ``[SLOTS]`` where ``inside``."""
    own = lines_ptr + line.to(tl.int64) * _LINE
    tl.store(own, start, mask=inside)
    tl.store(own + 1, length, mask=inside)
    tl.store(own + 2, place, mask=inside)


@triton.jit(do_not_specialize=["batch_size", "count"])
def hstu_pair_kernel(lines_ptr, order_ptr, ends_ptr, offsets_ptr, batch_size, count, SLOTS: tl.constexpr):
    """``lines [count, PAIR_LINE]`` int64: sequence start and length, and which pair of its tiles.

    One program for each sequence. ``order [B]``: the sequences, the longest first; ``ends [B]``: the sum of their
    lengths up to each. A sequence has a line for each PAIR_ROWS rows, and none stands empty before the last: programs
    that take lines in turn would share the work badly. ``count``: at least as many as there are; the others have
    length 0.
    """
    place = tl.program_id(0)
    slot = tl.arange(0, SLOTS)
    first = tl.zeros([], tl.int32)
    for j in range(0, place, SLOTS):
        member = j + slot
        end = tl.load(ends_ptr + member, mask=member < place, other=0)
        begin = tl.load(ends_ptr + member - 1, mask=(member > 0) & (member < place), other=0)
        first += tl.sum((end - begin + _ROWS - 1) // _ROWS, 0).to(tl.int32)
    sequence = tl.load(order_ptr + place)
    start = tl.load(offsets_ptr + sequence)
    length = tl.load(offsets_ptr + sequence + 1) - start
    own = ((length + _ROWS - 1) // _ROWS).to(tl.int32)
    for j in range(0, own, SLOTS):
        pair = j + slot
        _put(lines_ptr, first + pair, start, length, pair.to(tl.int64), pair < own)
    if place == batch_size - 1:
        nothing = tl.zeros([], tl.int64)
        for j in range(first + own, count, SLOTS):
            line = j + slot
            _put(lines_ptr, line, nothing, nothing, line.to(tl.int64) * 0, line < count)
