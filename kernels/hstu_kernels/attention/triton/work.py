"""The kernel that writes work lists: one launch where PyTorch would need some eighty.

Segments are pairs (begin, end) of columns or rows, in whole blocks; a begin at or behind its end means none.
"""

import triton
import triton.language as tl

from hstu_kernels.attention.triton.schedule import LINE

_LINE = tl.constexpr(LINE)


@triton.jit
def _floor(x, BLOCK: tl.constexpr):
    return x // BLOCK * BLOCK


@triton.jit
def _ceil(x, BLOCK: tl.constexpr):
    return (x + BLOCK - 1) // BLOCK * BLOCK


@triton.jit
def _put(lines, column, before, begin, end, live, BLOCK: tl.constexpr):
    """Write a segment behind ``before`` blocks of others; returns the number of blocks up to its end."""
    blocks = before + (tl.maximum(end - begin, 0) + BLOCK - 1) // BLOCK
    tl.store(lines + column, tl.where(live, begin - before * BLOCK, 0).to(tl.int64))
    tl.store(lines + column + 1, tl.where(live, blocks, 0).to(tl.int64))
    return blocks


@triton.jit
def _put_key_segments(
    lines,
    first,
    length,
    history,
    live,
    CONTEXTUAL: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys that the query tile at ``first`` meets, as `AttentionMask.key_range`."""
    WIDTH: tl.constexpr = MASK.max_attn_len
    TAIL: tl.constexpr = MASK.full_attn_tail_len
    PREFIX: tl.constexpr = CONTEXTUAL + MASK.global_prefix_len
    zero = first * 0
    last = tl.minimum(first + BLOCK_M, length)
    from_context = first < CONTEXTUAL
    end = last
    if CONTEXTUAL > 0:
        reached = history
        if not MASK.contextual_sees_history:
            reached = tl.minimum(history, CONTEXTUAL)
        end = tl.where(from_context, tl.maximum(end, reached), end)
    sees_all = from_context
    if WIDTH == 0:
        sees_all = first >= 0
    if TAIL > 0:
        sees_all = sees_all | ((last > history - TAIL) & (first < history))
    if not MASK.window_targets:
        sees_all = sees_all | (last > history)
    begin = tl.where(sees_all, 0, tl.maximum(tl.minimum(first, history) - WIDTH, 0))
    begin = _floor(begin, BLOCK_N)
    prefix = tl.minimum(tl.minimum(history, PREFIX), end)
    prefix_end = tl.minimum(tl.where(sees_all, 0, _ceil(prefix, BLOCK_N)), begin)

    # Keys that every row of the tile sees.
    causal = tl.minimum(first + 1, history)
    prefix_full = tl.where(from_context, 0, _floor(tl.minimum(causal, PREFIX), BLOCK_N))
    prefix_full = tl.minimum(prefix_full, prefix_end)
    unlimited = first < 0
    if TAIL > 0:
        unlimited = (first >= history - TAIL) & (first < history)
    if MASK.window_targets:
        unlimited = unlimited & (last <= history)
    else:
        unlimited = unlimited | (first >= history)
    if WIDTH == 0:
        unlimited = first >= 0
    nearest = tl.maximum(tl.minimum(last - 1, history) - WIDTH, 0)
    full_begin = tl.maximum(_ceil(tl.where(unlimited, 0, nearest), BLOCK_N), begin)
    full_end = _floor(causal, BLOCK_N)
    some = (full_end > full_begin) & (first >= CONTEXTUAL)
    full_begin = tl.where(some, full_begin, begin)
    full_end = tl.where(some, full_end, begin)

    # A tile of targets meets the history and itself; the targets in between see none of it.
    only_targets = first >= history
    middle_end = tl.where(only_targets, tl.minimum(_ceil(history, BLOCK_N), end), end)
    middle_end = tl.maximum(middle_end, begin)
    own = tl.where(only_targets, tl.maximum(_floor(first, BLOCK_N), _ceil(history, BLOCK_N)), end)
    blocks = _put(lines, 4, zero, zero, prefix_full, live, BLOCK_N)
    blocks = _put(lines, 6, blocks, full_begin, full_end, live, BLOCK_N)
    blocks = _put(lines, 8, zero, prefix_full, prefix_end, live, BLOCK_N)
    blocks = _put(lines, 10, blocks, begin, full_begin, live, BLOCK_N)
    blocks = _put(lines, 12, blocks, full_end, middle_end, live, BLOCK_N)
    blocks = _put(lines, 14, blocks, tl.maximum(own, begin), end, live, BLOCK_N)
    blocks = _put(lines, 16, blocks, zero, zero, live, BLOCK_N)


@triton.jit
def _put_row_segments(
    lines,
    first,
    length,
    history,
    live,
    CONTEXTUAL: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Query rows that the key tile at ``first`` meets: the other way round."""
    WIDTH: tl.constexpr = MASK.max_attn_len
    PREFIX: tl.constexpr = CONTEXTUAL + MASK.global_prefix_len
    zero = first * 0
    last = tl.minimum(first + BLOCK_N, length)
    is_history = first < history
    begin = _floor(first, BLOCK_M)
    context_end = zero
    if CONTEXTUAL > 0:
        needed = is_history
        if not MASK.contextual_sees_history:
            needed = first < CONTEXTUAL
        context_end = tl.where(needed, tl.minimum(_ceil(zero + CONTEXTUAL, BLOCK_M), begin), 0)

    unlimited = (first < PREFIX) | (last + WIDTH > history)
    if WIDTH == 0:
        unlimited = first >= 0
    end = tl.where(is_history, tl.where(unlimited, length, last + WIDTH), last)
    tail = tl.maximum(history - MASK.full_attn_tail_len, 0)
    tail_begin = tl.maximum(_floor(tail, BLOCK_M), _ceil(end, BLOCK_M))
    tail_end = length
    if MASK.window_targets:
        tail_end = history
    tail_end = tl.maximum(tl.where(is_history, tail_end, 0), tail_begin)

    # Rows that see every key of the tile.
    all_history = last <= history
    causal = tl.maximum(last - 1, CONTEXTUAL)
    full_begin = tl.maximum(_ceil(causal, BLOCK_M), begin)
    near = (last <= PREFIX) | (history - first <= WIDTH)
    if WIDTH == 0:
        near = first >= 0
    full_end = _floor(tl.minimum(tl.where(near, length, first + WIDTH + 1), end), BLOCK_M)
    some = all_history & (full_end > full_begin)
    full_begin = tl.where(some, full_begin, begin)
    full_end = tl.where(some, full_end, begin)
    tail_full_begin = tl.maximum(_ceil(tl.maximum(tail, causal), BLOCK_M), tail_begin)
    tail_full_end = _floor(tail_end, BLOCK_M)
    some = all_history & (tail_full_end > tail_full_begin)
    tail_full_begin = tl.where(some, tail_full_begin, tail_begin)
    tail_full_end = tl.where(some, tail_full_end, tail_begin)
    blocks = _put(lines, 4, zero, full_begin, full_end, live, BLOCK_M)
    blocks = _put(lines, 6, blocks, tail_full_begin, tail_full_end, live, BLOCK_M)
    blocks = _put(lines, 8, zero, zero, context_end, live, BLOCK_M)
    blocks = _put(lines, 10, blocks, begin, full_begin, live, BLOCK_M)
    blocks = _put(lines, 12, blocks, full_end, end, live, BLOCK_M)
    blocks = _put(lines, 14, blocks, tail_begin, tail_full_begin, live, BLOCK_M)
    blocks = _put(lines, 16, blocks, tail_full_end, tail_end, live, BLOCK_M)


@triton.jit(do_not_specialize=["batch_size", "search_steps"])
def hstu_work_kernel(
    lines_ptr,
    order_ptr,
    ends_ptr,
    offsets_ptr,
    targets_ptr,
    batch_size,
    search_steps,
    CONTEXTUAL: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OF_QUERY: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """SLOTS lines of ``lines [slots, LINE]`` int64, whose number is a multiple of SLOTS.

    ``order [B]``: the sequences, the longest first; ``ends [B]``: the sum of their lengths up to each. The sequence at
    place ``p`` owns the slots from ``begin(p) // OWN + p`` on: enough for its tiles, known without counting them; where
    that is one more than enough, the line is empty. ``search_steps``: at least ``log2(B)``.
    """
    OWN: tl.constexpr = BLOCK_M if OF_QUERY else BLOCK_N
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    low = tl.zeros([SLOTS], tl.int32)
    high = low + batch_size
    for _ in range(search_steps):
        middle = (low + high) // 2
        first_slot = (tl.load(ends_ptr + tl.maximum(middle - 1, 0)) // OWN).to(tl.int32) + middle
        further = (middle > low) & (first_slot <= slot)
        low = tl.where(further, middle, low)
        high = tl.where(further, high, tl.maximum(middle, low + 1))
    sequence = tl.load(order_ptr + low)
    start = tl.load(offsets_ptr + sequence)
    length = (tl.load(offsets_ptr + sequence + 1) - start).to(tl.int32)
    history = length
    if targets_ptr is not None:
        history -= tl.load(targets_ptr + sequence).to(tl.int32)
    first_slot = ((tl.load(ends_ptr + low) - length) // OWN).to(tl.int32) + low
    tile = slot - first_slot
    tiles = (length + OWN - 1) // OWN
    live = tile < tiles
    if OF_QUERY:
        # The last tiles of a sequence are its busiest.
        tile = tiles - 1 - tile
    first = tile * OWN
    lines = lines_ptr + slot.to(tl.int64) * _LINE
    tl.store(lines, tl.where(live, start, 0))
    tl.store(lines + 1, tl.where(live, length, 0).to(tl.int64))
    tl.store(lines + 2, tl.where(live, history, 0).to(tl.int64))
    tl.store(lines + 3, tl.where(live, first, 0).to(tl.int64))
    if OF_QUERY:
        _put_key_segments(lines, first, length, history, live, CONTEXTUAL, MASK, BLOCK_M, BLOCK_N)
    else:
        _put_row_segments(lines, first, length, history, live, CONTEXTUAL, MASK, BLOCK_M, BLOCK_N)
