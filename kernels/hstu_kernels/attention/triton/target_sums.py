"""Around the cached target attention: tiles without a list, the bias of cached rows, the sum of stretches."""

import triton
import triton.language as tl

from hstu_kernels.attention.triton.primitives import load_times, position_index, time_bucket

# Of a line of a list: the user's first target and their number, the tile's first target, the user's first cached row
# and their number. A list begins with the number of its lines.
FIELDS = 5
_FIELDS = tl.constexpr(FIELDS)
_STEP = tl.constexpr(128)


@triton.jit
def find_tile(slot, offsets_ptr, batch_size, BLOCK_M: tl.constexpr):
    """Sequence and first row (inside it) of tile slot ``slot``; the row lies behind the end of an empty slot.

    Sequence ``b`` owns the slots from ``offsets[b] // BLOCK_M + b`` on: enough for its tiles, known without a list.
    The search looks at 128 sequences a step: a step is as slow as a load.
    """
    low = 0
    span = batch_size
    while span > 1:
        stride = (span + 127) // 128
        place = tl.arange(0, 128) * stride
        first = (tl.load(offsets_ptr + low + place, mask=place < span, other=0) // BLOCK_M).to(tl.int32) + low + place
        found = tl.sum(((place < span) & (first <= slot)).to(tl.int32), 0) - 1
        low += found * stride
        span = tl.minimum(stride, span - found * stride)
    first = (tl.load(offsets_ptr + low) // BLOCK_M).to(tl.int32) + low
    return low, (slot - first) * BLOCK_M


@triton.jit(do_not_specialize=["batch_size"])
def hstu_target_bias_kernel(
    rab_ptr,
    pos_ptr,
    time_ptr,
    bounds_ptr,
    row_times_ptr,
    key_times_ptr,
    offsets_ptr,
    cache_offsets_ptr,
    batch_size,
    SHAPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``rab [cached rows]`` float32: the bias of every cached row for targets that ask when their user's first does."""
    sequence, begin = find_tile(tl.program_id(0), cache_offsets_ptr, batch_size, BLOCK)
    cache_start = tl.load(cache_offsets_ptr + sequence)
    history_end = (tl.load(cache_offsets_ptr + sequence + 1) - cache_start).to(tl.int32)
    start = tl.load(offsets_ptr + sequence)
    # Of a user without targets nothing is read.
    if (begin < history_end) & (start < tl.load(offsets_ptr + sequence + 1)):
        cols = begin + tl.arange(0, BLOCK)
        rab = tl.zeros([BLOCK], tl.float32)
        if SHAPE.reach >= 0:
            rab += tl.load(pos_ptr + position_index(history_end, cols, history_end, SHAPE))
        if SHAPE.buckets >= 0:
            key_times = load_times(key_times_ptr, cache_start, cols, history_end, SHAPE)
            rab += tl.load(time_ptr + time_bucket(tl.load(row_times_ptr + start), key_times, bounds_ptr, SHAPE))
        tl.store(rab_ptr + cache_start + cols, rab, mask=cols < history_end)


@triton.jit(do_not_specialize=["batch_size", "total_rows", "scale"])
def hstu_target_sum_kernel(
    sums_ptr,
    out_ptr,
    offsets_ptr,
    cache_offsets_ptr,
    batch_size,
    total_rows,
    scale,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
):
    """``out [T, W]``: the parts of the stretches that a user's history has, in their order, times ``scale``.

    One program for each slot of BLOCK_M rows and each BLOCK_W columns.
    """
    PARTS: tl.constexpr = (WIDTH + BLOCK_W - 1) // BLOCK_W
    sequence, begin = find_tile(tl.program_id(0) // PARTS, offsets_ptr, batch_size, BLOCK_M)
    start = tl.load(offsets_ptr + sequence)
    length = (tl.load(offsets_ptr + sequence + 1) - start).to(tl.int32)
    if begin < length:
        history = tl.load(cache_offsets_ptr + sequence + 1) - tl.load(cache_offsets_ptr + sequence)
        splits = tl.maximum(tl.cdiv(history.to(tl.int32), SPLIT_ROWS), 1)
        rows = begin + tl.arange(0, BLOCK_M)[:, None]
        columns = tl.program_id(0) % PARTS * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
        inside = (rows < length) & (columns < WIDTH)
        at = (start + rows) * WIDTH + columns
        part = at
        total = tl.load(sums_ptr + part, mask=inside, other=0.0)
        for _ in range(1, splits):
            part += total_rows.to(tl.int64) * WIDTH
            total += tl.load(sums_ptr + part, mask=inside, other=0.0)
        tl.store(out_ptr + at, (total * scale).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch_size"])
def hstu_target_list_kernel(
    work_ptr,
    offsets_ptr,
    cache_offsets_ptr,
    batch_size,
    TILE: tl.constexpr,
):
    """``work [1 + lines, FIELDS]`` int64: tiles of TILE targets, longest histories first; one program for each user.

    A user's tiles stand behind those of all who have a longer history, or as long a one and a smaller number.
    """
    user = tl.program_id(0)
    start = tl.load(offsets_ptr + user)
    length = (tl.load(offsets_ptr + user + 1) - start).to(tl.int32)
    cache_start = tl.load(cache_offsets_ptr + user)
    history = tl.load(cache_offsets_ptr + user + 1) - cache_start
    place = user * 0
    lines = user * 0
    for begin in range(0, batch_size, _STEP):
        other = begin + tl.arange(0, _STEP)
        exists = other < batch_size
        first = tl.load(offsets_ptr + other, mask=exists, other=0)
        behind = tl.load(offsets_ptr + other + 1, mask=exists, other=0)
        tiles = ((behind - first + TILE - 1) // TILE).to(tl.int32)
        rows = tl.load(cache_offsets_ptr + other + 1, mask=exists, other=0)
        rows -= tl.load(cache_offsets_ptr + other, mask=exists, other=0)
        ahead = (rows > history) | ((rows == history) & (other < user))
        place += tl.sum(tl.where(ahead, tiles, 0), 0)
        lines += tl.sum(tiles, 0)
    if user == 0:
        tl.store(work_ptr, lines.to(tl.int64))
    own = (length + TILE - 1) // TILE
    for begin in range(0, own, _STEP):
        tile = begin + tl.arange(0, _STEP)
        exists = tile < own
        line = work_ptr + (1 + place + tile).to(tl.int64) * _FIELDS
        tl.store(line, start, mask=exists)
        tl.store(line + 1, length.to(tl.int64), mask=exists)
        tl.store(line + 2, (tile * TILE).to(tl.int64), mask=exists)
        tl.store(line + 3, cache_start, mask=exists)
        tl.store(line + 4, history, mask=exists)
