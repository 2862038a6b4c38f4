"""The kernel that writes work lists: one launch where PyTorch would need some eighty."""

import triton
import triton.language as tl

from hstu_kernels.attention.triton.schedule import LINE
from hstu_kernels.attention.triton.segments import blocks_of, key_segments, row_segments

_LINE = tl.constexpr(LINE)


@triton.jit
def _put(lines, column, before, begin, end, from_block, to_block, live, BLOCK: tl.constexpr):
    """Write what of a segment, ``before`` blocks of others ahead of it, falls into blocks ``[from, to)`` of a tile.

    Returns the number of blocks up to the segment's end.
    """
    blocks = before + blocks_of(begin, end, BLOCK)
    origin = begin + (from_block - before) * BLOCK
    upto = tl.minimum(tl.maximum(blocks, from_block), to_block) - from_block
    tl.store(lines + column, tl.where(live, origin, 0).to(tl.int64))
    tl.store(lines + column + 1, tl.where(live, upto, 0).to(tl.int64))
    return blocks


@triton.jit
def _long_tile(slot, history, CONTEXTUAL: tl.constexpr, MASK: tl.constexpr, OWN: tl.constexpr, OF_QUERY: tl.constexpr):
    """Tile ``slot`` of the few that may be long, as `schedule.long_tiles` counts them, and whether it is one."""
    CONTEXT: tl.constexpr = (CONTEXTUAL + OWN - 1) // OWN if MASK.contextual_sees_history else 0
    if OF_QUERY:
        tail = tl.maximum(history - MASK.full_attn_tail_len, 0) // OWN
        tile = tl.where(slot < CONTEXT, slot, tail + slot - CONTEXT)
        found = (slot < CONTEXT) | (tile >= CONTEXT)
    else:
        tile = slot
        found = tile >= 0
    return tile, found & _is_long(tile, history, CONTEXTUAL, MASK, OWN, OF_QUERY)


@triton.jit
def _is_long(tile, history, CONTEXTUAL: tl.constexpr, MASK: tl.constexpr, OWN: tl.constexpr, OF_QUERY: tl.constexpr):
    """Whether a tile meets all of a sequence although its neighbours meet a window."""
    if OF_QUERY:
        CONTEXT: tl.constexpr = (CONTEXTUAL + OWN - 1) // OWN if MASK.contextual_sees_history else 0
        found = tile < CONTEXT
        if MASK.full_attn_tail_len > 0:
            of_tail = tile >= tl.maximum(history - MASK.full_attn_tail_len, 0) // OWN
            found = found | (of_tail & (tile * OWN < history))
    else:
        found = tile * OWN < tl.minimum(history, CONTEXTUAL + MASK.global_prefix_len)
    return found


@triton.jit
def _place_at_the_end(slot, low, place, ends_ptr, batch_size, OWN: tl.constexpr, ROWS: tl.constexpr):
    """Where the line of ``slot``, ``place`` lines behind the first of the sequence at place ``low``, is written.

    The sequences that begin in the last ROWS rows, at most 64, form one group, ordered by the blocks that a tile meets.
    Their tiles take the slots of the group; all others stay.
    """
    member = batch_size - 64 + tl.arange(0, 64)
    exists = member >= 0
    before = tl.load(ends_ptr + tl.maximum(member - 1, 0), mask=member > 0, other=0)
    end = tl.load(ends_ptr + tl.maximum(member, 0), mask=exists, other=0)
    exists = exists & (before >= tl.load(ends_ptr + batch_size - 1) - ROWS)
    first = (before // OWN).to(tl.int32) + member
    slots = (end // OWN - before // OWN).to(tl.int32) + 1
    tiles = ((end - before + OWN - 1) // OWN).to(tl.int32)
    group = tl.min(tl.where(exists, first, 2147483647), 0)
    if tl.max(slot, 0) >= group:
        # Own row of these matrices: a slot; column: a member.
        own = low[:, None] == member[None, :]
        left = tl.sum(tl.where(own, tiles[None, :] - 1, 0), 1) - place
        grouped = tl.sum(tl.where(own & exists[None, :] & (place[:, None] < slots[None, :]), 1, 0), 1) > 0
        ahead = tiles[None, :] - 1 - left[:, None]
        busier = tl.minimum(tl.maximum(ahead, 0), slots[None, :])
        equal = (ahead >= 0) & (ahead < slots[None, :]) & (member[None, :] < low[:, None])
        rank = tl.sum(tl.where(exists[None, :], busier + equal.to(tl.int32), 0), 1)
        slot = tl.where(grouped, group + rank, slot)
    return slot


@triton.jit(do_not_specialize=["batch_size", "search_steps", "pieces"])
def hstu_work_kernel(
    lines_ptr,
    order_ptr,
    ends_ptr,
    offsets_ptr,
    targets_ptr,
    batch_size,
    search_steps,
    pieces,
    CONTEXTUAL: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OF_QUERY: tl.constexpr,
    LONG: tl.constexpr,
    ROOM: tl.constexpr,
    SLOTS: tl.constexpr,
    END_ROWS: tl.constexpr,
):
    """SLOTS lines of ``lines [slots, LINE]`` int64, whose number is a multiple of SLOTS.

    ``order [B]``: the sequences, the longest first; ``ends [B]``: the sum of their lengths up to each. The sequence at
    place ``p`` owns the slots from ``begin(p) // OWN + p`` on: enough for its tiles, known without counting them; where
    that is one more than enough, the line is empty. ``search_steps``: at least ``log2(B)``.

    With LONG, the number of tiles of a sequence that may be long, the first ``pieces`` lines hold pieces of at most
    ROOM rows of the other side: piece by piece, LONG lines each, and found in the same way.

    Without a window the sequences that begin in the last END_ROWS rows are mixed, the busiest tile first.
    """
    OWN: tl.constexpr = BLOCK_M if OF_QUERY else BLOCK_N
    OTHER: tl.constexpr = BLOCK_N if OF_QUERY else BLOCK_M
    line = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    if LONG > 0:
        is_piece = line < pieces
        slot = tl.where(is_piece, line // LONG, line - pieces)
        room = tl.where(is_piece, ROOM, OWN)
    else:
        slot = line
        room = OWN
    low = tl.zeros([SLOTS], tl.int32)
    high = low + batch_size
    for _ in range(search_steps):
        middle = (low + high) // 2
        first_slot = (tl.load(ends_ptr + tl.maximum(middle - 1, 0)) // room).to(tl.int32) + middle
        further = (middle > low) & (first_slot <= slot)
        low = tl.where(further, middle, low)
        high = tl.where(further, high, tl.maximum(middle, low + 1))
    sequence = tl.load(order_ptr + low)
    start = tl.load(offsets_ptr + sequence)
    length = (tl.load(offsets_ptr + sequence + 1) - start).to(tl.int32)
    history = length
    if targets_ptr is not None:
        history -= tl.load(targets_ptr + sequence).to(tl.int32)
    place = slot - ((tl.load(ends_ptr + low) - length) // room).to(tl.int32) - low
    tiles = (length + OWN - 1) // OWN
    tile = place
    if OF_QUERY:
        # The last tiles of a sequence are its busiest.
        tile = tiles - 1 - tile
    if LONG > 0:
        long_tile, is_long = _long_tile(line % LONG, history, CONTEXTUAL, MASK, OWN, OF_QUERY)
        tile = tl.where(is_piece, long_tile, tile)
    live = (tile >= 0) & (tile < tiles)
    first = tile * OWN
    if OF_QUERY:
        b0, e0, b1, e1, b2, e2, b3, e3, b4, e4, b5, e5, b6, e6 = key_segments(
            first, length, history, CONTEXTUAL, MASK, BLOCK_M, BLOCK_N
        )
    else:
        b0, e0, b1, e1, b2, e2, b3, e3, b4, e4, b5, e5, b6, e6 = row_segments(
            first, length, history, CONTEXTUAL, MASK, BLOCK_M, BLOCK_N
        )
    from_block = tl.zeros([SLOTS], tl.int32)
    to_block = blocks_of(b0, e0, OTHER) + blocks_of(b1, e1, OTHER) + blocks_of(b2, e2, OTHER) + blocks_of(b3, e3, OTHER)
    to_block += blocks_of(b4, e4, OTHER) + blocks_of(b5, e5, OTHER) + blocks_of(b6, e6, OTHER)
    if LONG > 0:
        # Borders between pieces depend on the sequence alone.
        count = (to_block + ROOM // OTHER - 1) // (ROOM // OTHER)
        size = (to_block + count - 1) // tl.maximum(count, 1)
        in_pieces = (count > 1) & tl.where(is_piece, is_long, _is_long(tile, history, CONTEXTUAL, MASK, OWN, OF_QUERY))
        from_block = tl.where(is_piece, place * size, from_block)
        live = live & (in_pieces == is_piece) & (from_block < to_block)
        to_block = tl.where(is_piece, tl.minimum(from_block + size, to_block), to_block)
    if MASK.max_attn_len == 0:
        line = _place_at_the_end(slot, low, place, ends_ptr, batch_size, OWN, END_ROWS)
    lines = lines_ptr + line.to(tl.int64) * _LINE
    tl.store(lines, tl.where(live, start, 0))
    tl.store(lines + 1, tl.where(live, length, 0).to(tl.int64))
    tl.store(lines + 2, tl.where(live, history, 0).to(tl.int64))
    tl.store(lines + 3, tl.where(live, first, 0).to(tl.int64))
    blocks = _put(lines, 4, from_block * 0, b0, e0, from_block, to_block, live, OTHER)
    blocks = _put(lines, 6, blocks, b1, e1, from_block, to_block, live, OTHER)
    blocks = _put(lines, 8, blocks, b2, e2, from_block, to_block, live, OTHER)
    blocks = _put(lines, 10, blocks, b3, e3, from_block, to_block, live, OTHER)
    blocks = _put(lines, 12, blocks, b4, e4, from_block, to_block, live, OTHER)
    blocks = _put(lines, 14, blocks, b5, e5, from_block, to_block, live, OTHER)
    blocks = _put(lines, 16, blocks, b6, e6, from_block, to_block, live, OTHER)
