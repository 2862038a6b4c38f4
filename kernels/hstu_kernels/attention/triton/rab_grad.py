"""Gradients of the bias tables from a block's gradient of the logits ``[M, N]``, kept in registers."""

import triton
import triton.language as tl

from hstu_kernels.attention.triton.rab import bucket_range, threshold, times_of


@triton.jit
def _add_few(
    sums,
    grad,
    row_times,
    key_times,
    row_high,
    key_low,
    lowest,
    bounds_ptr,
    SHAPE: tl.constexpr,
    ENTRIES: tl.constexpr,
    MORE: tl.constexpr,
):
    """``sums [ENTRIES]`` plus ``grad`` of a block that spans at most ``MORE + 1`` buckets from ``lowest`` on."""
    farthest = row_high - key_low
    row = (row_times - key_low).to(tl.int32)
    key = (key_times - key_low).to(tl.int32)
    entry = tl.arange(0, ENTRIES)
    # What lies beyond a threshold belongs to later buckets.
    within = tl.sum(tl.sum(grad, 1), 0)
    for i in tl.static_range(MORE):
        bound = threshold(bounds_ptr, lowest + i, farthest, SHAPE)
        beyond = tl.sum(tl.sum(tl.where(row - bound >= key, grad, 0.0), 1), 0)
        sums += tl.where(entry == lowest + i, within - beyond, 0.0)
        within = beyond
    return sums + tl.where(entry == lowest + MORE, within, 0.0)


@triton.jit
def add_few_times(
    sums,
    grad,
    rows,
    cols,
    row_times,
    key_times_ptr,
    seq_start,
    seq_len,
    row_low,
    row_high,
    key_low,
    key_high,
    bounds_ptr,
    SHAPE: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """``sums [ENTRIES]`` plus ``grad`` by time bucket, of a block that spans few; otherwise ``sums`` as they are."""
    FEW: tl.constexpr = SHAPE.few_buckets
    lowest, more = bucket_range(row_low, row_high, key_low, key_high, SHAPE)
    if more == 0:
        sums += tl.where(tl.arange(0, ENTRIES) == lowest, tl.sum(tl.sum(grad, 1), 0), 0.0)
    elif more <= FEW:
        asked, known = times_of(row_times, key_times_ptr, rows, cols, seq_start, seq_len, SHAPE, True)
        if more == 1:
            sums = _add_few(sums, grad, asked, known, row_high, key_low, lowest, bounds_ptr, SHAPE, ENTRIES, 1)
        else:
            sums = _add_few(sums, grad, asked, known, row_high, key_low, lowest, bounds_ptr, SHAPE, ENTRIES, FEW)
    return sums


@triton.jit
def add_positions(sums_ptr, grad, rows, cols, row_begin, key_begin, history_end, SHAPE: tl.constexpr):
    """Add ``grad`` to the position entries at ``sums_ptr``: one atomic for each diagonal of a square.

    Row ``r`` of a square turns left by ``r``: a column then holds two diagonals, one from before and one from behind
    the turn.
    """
    BLOCK_M: tl.constexpr = SHAPE.block_m
    BLOCK_N: tl.constexpr = SHAPE.block_n
    HEIGHT: tl.constexpr = BLOCK_M if BLOCK_M < BLOCK_N else BLOCK_N
    SQUARES: tl.constexpr = BLOCK_M // HEIGHT
    REACH: tl.constexpr = SHAPE.reach
    # Targets all stand at the history end: none of them lies on a diagonal.
    of_history = tl.where(rows[:, None] < history_end, grad, 0.0)
    turned_from = tl.arange(0, HEIGHT)[:, None] + tl.arange(0, BLOCK_N)[None, :]
    source = tl.broadcast_to((turned_from % BLOCK_N)[None, :, :], SQUARES, HEIGHT, BLOCK_N)
    turned = tl.gather(tl.reshape(of_history, SQUARES, HEIGHT, BLOCK_N), source, 2)
    straight = (turned_from < BLOCK_N)[None, :, :]
    # [SQUARES, N]
    before = tl.sum(tl.where(straight, turned, 0.0), 1)
    behind = tl.sum(tl.where(straight, 0.0, turned), 1)
    distance = (key_begin - row_begin) - HEIGHT * tl.arange(0, SQUARES)[:, None] + tl.arange(0, BLOCK_N)[None, :]
    entry = tl.minimum(tl.maximum(distance, -REACH), REACH) + REACH
    tl.atomic_add(sums_ptr + entry, before, sem="relaxed")
    entry = tl.minimum(tl.maximum(distance - BLOCK_N, -REACH), REACH) + REACH
    tl.atomic_add(sums_ptr + entry, behind, sem="relaxed")
    if row_begin + BLOCK_M > history_end:
        # Their own keys stand there, too.
        by_key = tl.sum(tl.where(rows[:, None] >= history_end, grad, 0.0), 0)
        to_target = tl.minimum(cols, history_end) - history_end
        tl.atomic_add(sums_ptr + tl.maximum(to_target, -REACH) + REACH, by_key, sem="relaxed")
