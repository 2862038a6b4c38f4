"""Gradients of the bias tables from a block's gradient of the logits ``[M, N]``, kept in registers."""

import triton
import triton.language as tl

from hstu_kernels.attention.triton.assembly import add_by_bucket, add_by_threshold, add_diagonals, constraints
from hstu_kernels.attention.triton.rab import times_of
from hstu_kernels.attention.triton.time_buckets import bucket_range, general_bucket, threshold

# Sums of a thread's whole share of a block, by the columns of the block: what they add to comes last.
_COLUMNS = (32, 64)
_ONE_CLASS = tl.constexpr({n: add_by_threshold(n // 2, 0) for n in _COLUMNS})
_TWO_CLASSES = tl.constexpr({n: add_by_threshold(n // 2, 1) for n in _COLUMNS})
_FOUR_CLASSES = tl.constexpr({n: add_by_threshold(n // 2, 3) for n in _COLUMNS})
_BY_BUCKET = tl.constexpr({n: add_by_bucket(n // 2) for n in _COLUMNS})
_DIAGONALS = tl.constexpr({n: add_diagonals(n // 2) for n in _COLUMNS})
_EXACT_DIAGONALS = tl.constexpr({n: add_diagonals(n // 2, exact=True) for n in _COLUMNS})


def _operands(*arguments: str) -> tl.constexpr:
    return tl.constexpr({n: constraints("r", n // 8, *arguments, elements=n // 2) for n in _COLUMNS})


_ONE_CLASS_OPERANDS, _BY_BUCKET_OPERANDS = _operands("f", "l"), _operands("f", "r", "l")
_TWO_CLASSES_OPERANDS = _operands("f", "r", "r", "r", "l")
_FOUR_CLASSES_OPERANDS = _operands("f", "r", "r", "r", "r", "r", "l")
_DIAGONALS_OPERANDS, _EXACT_DIAGONALS_OPERANDS = _operands("f", "r", "l", "r"), _operands("f", "r", "l", "r", "f")


@triton.jit
def _add_times_by_warp(
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
    sums_ptr,
    SHAPE: tl.constexpr,
):
    """`add_times` to ``sums [entries, warps]``, a column a warp, of every block."""
    N: tl.constexpr = SHAPE.block_n
    lowest, more = bucket_range(row_low, row_high, key_low, key_high, SHAPE)
    sums = (sums_ptr + lowest * SHAPE.warps).to(tl.int64, bitcast=True)
    if more == 0:
        tl.inline_asm_elementwise(
            _ONE_CLASS[N], _ONE_CLASS_OPERANDS[N], [grad, sums], dtype=tl.int8, is_pure=False, pack=N // 2
        )
    elif more <= SHAPE.few_buckets:
        asked, known = times_of(row_times, key_times_ptr, rows, cols, seq_start, seq_len, SHAPE, True)
        row, key = (asked - key_low).to(tl.int32), (known - key_low).to(tl.int32)
        farthest = row_high - key_low
        first = threshold(bounds_ptr, lowest, farthest, SHAPE)
        if more == 1:
            tl.inline_asm_elementwise(
                _TWO_CLASSES[N],
                _TWO_CLASSES_OPERANDS[N],
                [grad, row, key, first, sums],
                dtype=tl.int8,
                is_pure=False,
                pack=N // 2,
            )
        else:
            tl.static_assert(SHAPE.few_buckets == 3)
            second = threshold(bounds_ptr, lowest + 1, farthest, SHAPE)
            third = threshold(bounds_ptr, lowest + 2, farthest, SHAPE)
            tl.inline_asm_elementwise(
                _FOUR_CLASSES[N],
                _FOUR_CLASSES_OPERANDS[N],
                [grad, row, key, first, second, third, sums],
                dtype=tl.int8,
                is_pure=False,
                pack=N // 2,
            )
    else:
        asked, known = times_of(row_times, key_times_ptr, rows, cols, seq_start, seq_len, SHAPE, True)
        bucket = general_bucket(asked, known, row_low, row_high, key_low, key_high, bounds_ptr, SHAPE)
        tl.inline_asm_elementwise(
            _BY_BUCKET[N],
            _BY_BUCKET_OPERANDS[N],
            [grad, bucket, sums_ptr.to(tl.int64, bitcast=True)],
            dtype=tl.int8,
            is_pure=False,
            pack=N // 2,
        )


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
def add_times(
    sums,
    sums_ptr,
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
    """``sums [ENTRIES]`` plus ``grad`` by time bucket, of a block that spans few; otherwise ``sums`` as they are.

    Where warps have sums of their own, ``sums_ptr`` points at them, any block is added there, and ``sums`` stay.
    """
    FEW: tl.constexpr = SHAPE.few_buckets
    if SHAPE.sums_by_warp:
        _add_times_by_warp(
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
            sums_ptr,
            SHAPE,
        )
    else:
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
def add_positions(sums_ptr, factor_ptr, grad, rows, cols, row_begin, key_begin, history_end, SHAPE: tl.constexpr):
    """Add ``grad`` to the position entries at ``sums_ptr``: one atomic for each diagonal of a warp, or of a square.

    With ``factor_ptr``, a float32, the entries are int64 and hold so many times as much: their bits repeat.
    """
    BLOCK_M: tl.constexpr = SHAPE.block_m
    N: tl.constexpr = SHAPE.block_n
    REACH: tl.constexpr = SHAPE.reach
    # Targets all stand at the history end: none of them lies on a diagonal.
    of_history = tl.where(rows[:, None] < history_end, grad, 0.0)
    if SHAPE.sums_by_warp:
        index = (cols[None, :] + REACH) - rows[:, None]
        sums = sums_ptr.to(tl.int64, bitcast=True)
        if factor_ptr is not None:
            tl.inline_asm_elementwise(
                _EXACT_DIAGONALS[N],
                _EXACT_DIAGONALS_OPERANDS[N],
                [of_history, index, sums, 2 * REACH, tl.load(factor_ptr)],
                dtype=tl.int8,
                is_pure=False,
                pack=N // 2,
            )
        else:
            tl.inline_asm_elementwise(
                _DIAGONALS[N],
                _DIAGONALS_OPERANDS[N],
                [of_history, index, sums, 2 * REACH],
                dtype=tl.int8,
                is_pure=False,
                pack=N // 2,
            )
    else:
        _add_squares(sums_ptr, factor_ptr, of_history, row_begin, key_begin, SHAPE)
    if row_begin + BLOCK_M > history_end:
        # Their own keys stand there, too.
        by_key = tl.sum(tl.where(rows[:, None] >= history_end, grad, 0.0), 0)
        to_target = tl.minimum(cols, history_end) - history_end
        _add_to_entries(sums_ptr + tl.maximum(to_target, -REACH) + REACH, factor_ptr, by_key)


@triton.jit
def _add_to_entries(ptrs, factor_ptr, value):
    if factor_ptr is not None:
        tl.atomic_add(ptrs, (value * tl.load(factor_ptr)).to(tl.int64), sem="relaxed")
    else:
        tl.atomic_add(ptrs, value, sem="relaxed")


@triton.jit
def _add_squares(sums_ptr, factor_ptr, of_history, row_begin, key_begin, SHAPE: tl.constexpr):
    """The sums of the diagonals of ``of_history [M, N]``, square by square.

    Row ``r`` of a square turns left by ``r``: a column then holds two diagonals, one from before and one from behind
    the turn.
    """
    BLOCK_M: tl.constexpr = SHAPE.block_m
    BLOCK_N: tl.constexpr = SHAPE.block_n
    HEIGHT: tl.constexpr = BLOCK_M if BLOCK_M < BLOCK_N else BLOCK_N
    SQUARES: tl.constexpr = BLOCK_M // HEIGHT
    REACH: tl.constexpr = SHAPE.reach
    turned_from = tl.arange(0, HEIGHT)[:, None] + tl.arange(0, BLOCK_N)[None, :]
    source = tl.broadcast_to((turned_from % BLOCK_N)[None, :, :], SQUARES, HEIGHT, BLOCK_N)
    turned = tl.gather(tl.reshape(of_history, SQUARES, HEIGHT, BLOCK_N), source, 2)
    straight = (turned_from < BLOCK_N)[None, :, :]
    # [SQUARES, N]
    before = tl.sum(tl.where(straight, turned, 0.0), 1)
    behind = tl.sum(tl.where(straight, 0.0, turned), 1)
    distance = (key_begin - row_begin) - HEIGHT * tl.arange(0, SQUARES)[:, None] + tl.arange(0, BLOCK_N)[None, :]
    entry = tl.minimum(tl.maximum(distance, -REACH), REACH) + REACH
    _add_to_entries(sums_ptr + entry, factor_ptr, before)
    entry = tl.minimum(tl.maximum(distance - BLOCK_N, -REACH), REACH) + REACH
    _add_to_entries(sums_ptr + entry, factor_ptr, behind)
