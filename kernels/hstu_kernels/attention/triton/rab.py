"""The relative bias of a block of logits, at a cost that falls with the number of time buckets the block spans.

rab_ij = pos_table[p_j - p_i + N - 1] + time_table[bucket(|t_i - t_j|)], the definition in `hstu_kernels.bias`. Where no
key of a block is younger than its rows, the block's extreme times bound its buckets. One bucket costs nothing for each
logit, a few cost a comparison and a selection each; only blocks near the diagonal look a bucket up for each logit.

Tables come divided by alpha: the bias is where a product's sum begins, so that it takes no registers beside the sum.
"""

import triton
import triton.language as tl

from hstu_kernels.attention.triton.assembly import constraints, diagonal_look_up
from hstu_kernels.attention.triton.primitives import load_times
from hstu_kernels.attention.triton.time_buckets import (
    bucket_range,
    is_narrow,
    lookup,
    narrow_bucket,
    threshold,
    wide_bucket,
)

# Look-ups of a thread's whole share of a block: the index grows or falls from column to column.
_RISING_32, _RISING_16 = tl.constexpr(diagonal_look_up(32, 1)), tl.constexpr(diagonal_look_up(16, 1))
_FALLING_32, _FALLING_16 = tl.constexpr(diagonal_look_up(32, -1)), tl.constexpr(diagonal_look_up(16, -1))
_LOOK_UP_32 = tl.constexpr(constraints("f", 32, "r", "l", elements=32))
_LOOK_UP_16 = tl.constexpr(constraints("f", 16, "r", "l", elements=16))


@triton.jit
def load_span(spans_ptr, seq_start, begin, seq_len, SHAPE: tl.constexpr):
    """The earliest and the latest time, int64, of the block at ``begin``; something else behind the last block."""
    if SHAPE.buckets > 0:
        at = spans_ptr + 2 * (seq_start + tl.maximum(tl.minimum(begin, seq_len - 1), 0))
        low, high = tl.load(at), tl.load(at + 1)
    else:
        low, high = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    return low, high


@triton.jit
def own_span(times, SHAPE: tl.constexpr):
    """The earliest and the latest of a tile's own times; rows behind the end repeat the last one's."""
    if SHAPE.buckets > 0:
        low, high = tl.min(times), tl.max(times)
    else:
        low, high = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    return low, high


@triton.jit
def times_of(own, times_ptr, rows, cols, seq_start, seq_len, SHAPE: tl.constexpr, KEYS_MOVE: tl.constexpr):
    """Times in the shapes of ``rows`` and ``cols``: the tile's ``own`` are at hand, the moving side's are read."""
    if KEYS_MOVE:
        row_times = tl.expand_dims(own, 1)
        key_times = load_times(times_ptr, seq_start, cols, seq_len, SHAPE)
    else:
        row_times = load_times(times_ptr, seq_start, rows, seq_len, SHAPE)
        key_times = tl.expand_dims(own, 1)
    return row_times, key_times


@triton.jit
def _few_buckets(
    row_times, key_times, row_high, key_low, lowest, time_ptr, bounds_ptr, SHAPE: tl.constexpr, MORE: tl.constexpr
):
    """Time entries of a block that spans at most ``MORE + 1`` buckets and has no key younger than a row."""
    farthest = row_high - key_low
    row = (row_times - key_low).to(tl.int32)
    key = (key_times - key_low).to(tl.int32)
    entry = tl.load(time_ptr + lowest)
    for i in tl.static_range(MORE):
        bound = threshold(bounds_ptr, lowest + i, farthest, SHAPE)
        beyond = tl.load(time_ptr + tl.minimum(lowest + i + 1, SHAPE.buckets))
        entry = tl.where(row - bound >= key, beyond, entry)
    return entry


@triton.jit
def _position_entries(rows, cols, seq_len, history_end, pos_ptr, SHAPE: tl.constexpr):
    """Position entries of a block; only sequences longer than the table pay for keeping inside it."""
    REACH: tl.constexpr = SHAPE.reach
    # Every target stands at the history end; rows behind the last one take its place.
    last = tl.minimum(history_end, seq_len - 1)
    entry = (tl.minimum(cols, last) + REACH) - tl.minimum(rows, last)
    # Two look-ups, so that the compiler leaves it a branch.
    if seq_len > REACH + 1:
        value = lookup(pos_ptr, tl.minimum(tl.maximum(entry, 0), 2 * REACH), SHAPE)
    else:
        value = lookup(pos_ptr, entry, SHAPE)
    return value


@triton.jit
def _positions_of_block(
    row_begin,
    key_begin,
    seq_len,
    history_end,
    pos_ptr,
    SHAPE: tl.constexpr,
    KEYS_MOVE: tl.constexpr,
):
    """Position entries ``[M, N]``, or ``[N, M]`` where rows move."""
    HEIGHT: tl.constexpr = SHAPE.block_m if KEYS_MOVE else SHAPE.block_n
    WIDTH: tl.constexpr = SHAPE.block_n if KEYS_MOVE else SHAPE.block_m
    rows, cols = _indices(row_begin, key_begin, SHAPE, KEYS_MOVE)
    if SHAPE.warps * 16 == HEIGHT and (WIDTH == 64 or WIDTH == 32):
        # Rows and columns that stand where they are, and a table for every distance: diagonals.
        last = tl.minimum(history_end, seq_len - 1)
        plain = (row_begin + SHAPE.block_m - 1 <= last) & (key_begin + SHAPE.block_n - 1 <= last)
        if plain & (seq_len <= SHAPE.reach + 1):
            index = (cols + SHAPE.reach) - rows
            base = pos_ptr.to(tl.int64, bitcast=True)
            if not KEYS_MOVE:
                if WIDTH == 64:
                    value = tl.inline_asm_elementwise(
                        _FALLING_32, _LOOK_UP_32, [index, base], dtype=tl.float32, is_pure=True, pack=32
                    )
                else:
                    value = tl.inline_asm_elementwise(
                        _FALLING_16, _LOOK_UP_16, [index, base], dtype=tl.float32, is_pure=True, pack=16
                    )
            elif WIDTH == 64:
                value = tl.inline_asm_elementwise(
                    _RISING_32, _LOOK_UP_32, [index, base], dtype=tl.float32, is_pure=True, pack=32
                )
            else:
                value = tl.inline_asm_elementwise(
                    _RISING_16, _LOOK_UP_16, [index, base], dtype=tl.float32, is_pure=True, pack=16
                )
        else:
            value = _position_entries(rows, cols, seq_len, history_end, pos_ptr, SHAPE)
    else:
        value = _position_entries(rows, cols, seq_len, history_end, pos_ptr, SHAPE)
    return value


@triton.jit
def _indices(row_begin, key_begin, SHAPE: tl.constexpr, KEYS_MOVE: tl.constexpr):
    """Rows and columns of a block, in shapes that broadcast to its own."""
    rows = row_begin + tl.arange(0, SHAPE.block_m)
    cols = key_begin + tl.arange(0, SHAPE.block_n)
    if KEYS_MOVE:
        rows, cols = tl.expand_dims(rows, 1), tl.expand_dims(cols, 0)
    else:
        rows, cols = tl.expand_dims(rows, 0), tl.expand_dims(cols, 1)
    return rows, cols


@triton.jit
def block_bias(
    row_begin,
    key_begin,
    own_times,
    times_ptr,
    seq_start,
    seq_len,
    history_end,
    row_low,
    row_high,
    key_low,
    key_high,
    pos_ptr,
    time_ptr,
    bounds_ptr,
    SHAPE: tl.constexpr,
    KEYS_MOVE: tl.constexpr,
):
    """The bias of the block at ``row_begin`` and ``key_begin``, from tables of float32: ``[N, M]`` where rows move.

    ``own_times`` are those of the side that owns the tile; the other side's at ``times_ptr`` are read where needed.
    """
    FEW: tl.constexpr = SHAPE.few_buckets
    HEIGHT: tl.constexpr = SHAPE.block_m if KEYS_MOVE else SHAPE.block_n
    WIDTH: tl.constexpr = SHAPE.block_n if KEYS_MOVE else SHAPE.block_m
    rows, cols = _indices(row_begin, key_begin, SHAPE, KEYS_MOVE)
    if SHAPE.buckets > 0:
        lowest, more = bucket_range(row_low, row_high, key_low, key_high, SHAPE)
        if more == 0:
            rab = tl.broadcast_to(tl.load(time_ptr + lowest), HEIGHT, WIDTH)
        else:
            row_times, key_times = times_of(own_times, times_ptr, rows, cols, seq_start, seq_len, SHAPE, KEYS_MOVE)
            if more == 1:
                rab = _few_buckets(row_times, key_times, row_high, key_low, lowest, time_ptr, bounds_ptr, SHAPE, 1)
            elif more <= FEW:
                rab = _few_buckets(row_times, key_times, row_high, key_low, lowest, time_ptr, bounds_ptr, SHAPE, FEW)
            elif is_narrow(row_low, row_high, key_low, key_high):
                rab = lookup(time_ptr, narrow_bucket(row_times, key_times, key_low, bounds_ptr, SHAPE), SHAPE)
            else:
                rab = lookup(time_ptr, wide_bucket(row_times, key_times, bounds_ptr, SHAPE), SHAPE)
    elif SHAPE.buckets == 0:
        rab = tl.broadcast_to(tl.load(time_ptr), HEIGHT, WIDTH)
    else:
        rab = tl.zeros([HEIGHT, WIDTH], tl.float32)
    if SHAPE.reach >= 0:
        rab += _positions_of_block(row_begin, key_begin, seq_len, history_end, pos_ptr, SHAPE, KEYS_MOVE)
    return rab
