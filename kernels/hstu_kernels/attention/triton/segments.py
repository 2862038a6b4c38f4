"""Which blocks of the other side a tile meets, as the ends of segments.

Segments are pairs (begin, end) of columns or rows, in whole blocks and in ascending order; a begin at or behind its
end means none.
"""

import triton
import triton.language as tl


@triton.jit
def floor_to(x, BLOCK: tl.constexpr):
    return x // BLOCK * BLOCK


@triton.jit
def ceil_to(x, BLOCK: tl.constexpr):
    return (x + BLOCK - 1) // BLOCK * BLOCK


@triton.jit
def blocks_of(begin, end, BLOCK: tl.constexpr):
    return (tl.maximum(end - begin, 0) + BLOCK - 1) // BLOCK


@triton.jit
def key_segments(
    first,
    length,
    history,
    CONTEXTUAL: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys that the query tile at ``first`` meets, as `AttentionMask.key_range`: the ends of seven segments.

    Full are the first and the fourth; the last is empty.
    """
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
    begin = floor_to(begin, BLOCK_N)
    prefix = tl.minimum(tl.minimum(history, PREFIX), end)
    prefix_end = tl.minimum(tl.where(sees_all, 0, ceil_to(prefix, BLOCK_N)), begin)

    # Keys that every row of the tile sees.
    causal = tl.minimum(first + 1, history)
    prefix_full = tl.where(from_context, 0, floor_to(tl.minimum(causal, PREFIX), BLOCK_N))
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
    full_begin = tl.maximum(ceil_to(tl.where(unlimited, 0, nearest), BLOCK_N), begin)
    full_end = floor_to(causal, BLOCK_N)
    some = (full_end > full_begin) & (first >= CONTEXTUAL)
    full_begin = tl.where(some, full_begin, begin)
    full_end = tl.where(some, full_end, begin)

    # A tile of targets meets the history and itself; the targets in between see none of it.
    only_targets = first >= history
    middle_end = tl.where(only_targets, tl.minimum(ceil_to(history, BLOCK_N), end), end)
    middle_end = tl.maximum(middle_end, begin)
    own = tl.where(only_targets, tl.maximum(floor_to(first, BLOCK_N), ceil_to(history, BLOCK_N)), end)
    own = tl.maximum(own, begin)
    return (
        zero,
        prefix_full,
        prefix_full,
        prefix_end,
        begin,
        full_begin,
        full_begin,
        full_end,
        full_end,
        middle_end,
        own,
        end,
        end,
        end,
    )


@triton.jit
def row_segments(
    first,
    length,
    history,
    CONTEXTUAL: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Query rows that the key tile at ``first`` meets, the other way round. Full are the third and the sixth."""
    WIDTH: tl.constexpr = MASK.max_attn_len
    PREFIX: tl.constexpr = CONTEXTUAL + MASK.global_prefix_len
    zero = first * 0
    last = tl.minimum(first + BLOCK_N, length)
    is_history = first < history
    begin = floor_to(first, BLOCK_M)
    context_end = zero
    if CONTEXTUAL > 0:
        needed = is_history
        if not MASK.contextual_sees_history:
            needed = first < CONTEXTUAL
        context_end = tl.where(needed, tl.minimum(ceil_to(zero + CONTEXTUAL, BLOCK_M), begin), 0)

    unlimited = (first < PREFIX) | (last + WIDTH > history)
    if WIDTH == 0:
        unlimited = first >= 0
    end = tl.where(is_history, tl.where(unlimited, length, last + WIDTH), last)
    tail = tl.maximum(history - MASK.full_attn_tail_len, 0)
    tail_begin = tl.maximum(floor_to(tail, BLOCK_M), ceil_to(end, BLOCK_M))
    tail_end = length
    if MASK.window_targets:
        tail_end = history
    tail_end = tl.maximum(tl.where(is_history, tail_end, 0), tail_begin)

    # Rows that see every key of the tile.
    all_history = last <= history
    causal = tl.maximum(last - 1, CONTEXTUAL)
    full_begin = tl.maximum(ceil_to(causal, BLOCK_M), begin)
    near = (last <= PREFIX) | (history - first <= WIDTH)
    if WIDTH == 0:
        near = first >= 0
    full_end = floor_to(tl.minimum(tl.where(near, length, first + WIDTH + 1), end), BLOCK_M)
    some = all_history & (full_end > full_begin)
    full_begin = tl.where(some, full_begin, begin)
    full_end = tl.where(some, full_end, begin)
    tail_full_begin = tl.maximum(ceil_to(tl.maximum(tail, causal), BLOCK_M), tail_begin)
    tail_full_end = floor_to(tail_end, BLOCK_M)
    some = all_history & (tail_full_end > tail_full_begin)
    tail_full_begin = tl.where(some, tail_full_begin, tail_begin)
    tail_full_end = tl.where(some, tail_full_end, tail_begin)
    return (
        zero,
        context_end,
        begin,
        full_begin,
        full_begin,
        full_end,
        full_end,
        end,
        tail_begin,
        tail_full_begin,
        tail_full_begin,
        tail_full_end,
        tail_full_end,
        tail_end,
    )
