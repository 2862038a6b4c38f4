"""What the kernels share: the mask, SiLU, the relative bias, tiles of rows, and the segments of a work line.

SHAPE is a `tiles.KernelShape`, MASK a `hstu_kernels.mask.AttentionMask`; both are compile-time constants.
"""

import triton
import triton.language as tl

from hstu_kernels.attention.triton.schedule import HEADER, LINE

_LINE = tl.constexpr(LINE)
_HEADER = tl.constexpr(HEADER)


@triton.jit
def visible(rows, cols, history_end, SHAPE: tl.constexpr, MASK: tl.constexpr):
    """`AttentionMask.visible`: ``rows`` and ``cols`` are int32 and broadcast together."""
    CONTEXTUAL: tl.constexpr = SHAPE.contextual
    WINDOW: tl.constexpr = MASK.max_attn_len
    PREFIX: tl.constexpr = SHAPE.contextual + MASK.global_prefix_len
    TAIL: tl.constexpr = MASK.full_attn_tail_len
    # Every target stands at the history end, whatever its index.
    position = tl.minimum(rows, history_end)
    causal = (cols <= rows) & (cols < history_end)
    if WINDOW > 0:
        seen = position - cols <= WINDOW
        if PREFIX > 0:
            seen = seen | (cols < PREFIX)
        if TAIL > 0:
            seen = seen | ((rows < history_end) & (rows >= history_end - TAIL))
        if MASK.window_targets:
            causal = causal & seen
        else:
            causal = causal & (seen | (rows >= history_end))
    if CONTEXTUAL > 0:
        if MASK.contextual_sees_history:
            from_context = (rows < CONTEXTUAL) & (cols < history_end)
        else:
            from_context = (rows < CONTEXTUAL) & (cols < tl.minimum(CONTEXTUAL, history_end))
        causal = from_context | (causal & (rows >= CONTEXTUAL))
    return causal | (rows == cols)


@triton.jit
def _tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def silu(x, SHAPE: tl.constexpr):
    """SiLU of float32 ``x``: one special-function instruction in the approximate form, two in the exact one."""
    if SHAPE.exact:
        value = x / (1.0 + tl.exp(-x))
    else:
        half = 0.5 * x
        value = half * _tanh(half) + half
    return value


@triton.jit
def scaled_silu(x, factor, SHAPE: tl.constexpr):
    """SiLU of ``factor * x``, the same bits with one multiplication less: to halve a number rounds nothing."""
    if SHAPE.exact:
        value = silu(x * factor, SHAPE)
    else:
        half = x * (0.5 * factor)
        value = half * _tanh(half) + half
    return value


@triton.jit
def silu_and_slope(x, SHAPE: tl.constexpr):
    """SiLU of float32 ``x`` and its derivative, from the same special function."""
    if SHAPE.exact:
        gate = 1.0 / (1.0 + tl.exp(-x))
        value = x * gate
    else:
        half = 0.5 * x
        tanh = _tanh(half)
        gate = 0.5 * tanh + 0.5
        value = half * tanh + half
    return value, gate + value * (1.0 - gate)


@triton.jit
def position_index(rows, cols, history_end, SHAPE: tl.constexpr):
    """Entry of the position table, as `hstu_kernels.bias.position_index`."""
    REACH: tl.constexpr = SHAPE.reach
    distance = tl.minimum(cols, history_end) - tl.minimum(rows, history_end)
    return tl.minimum(tl.maximum(distance, -REACH), REACH) + REACH


@triton.jit
def time_bucket(row_times, key_times, bounds_ptr, SHAPE: tl.constexpr):
    """Entry of the time table: an estimate in float32, at most one off, put right by the exact int64 thresholds."""
    BUCKETS: tl.constexpr = SHAPE.buckets
    seconds = tl.abs(row_times - key_times)
    if BUCKETS == 0:
        bucket = (seconds * 0).to(tl.int32)
    else:
        nats = tl.log(tl.maximum(seconds, 1).to(tl.float32))
        bucket = tl.minimum((nats * (1.0 / 0.301)).to(tl.int32), BUCKETS)
        below = tl.load(bounds_ptr + tl.maximum(bucket - 1, 0))
        above = tl.load(bounds_ptr + tl.minimum(bucket, BUCKETS - 1))
        down = (bucket > 0) & (seconds < below)
        up = (bucket < BUCKETS) & (seconds >= above)
        bucket = bucket + up.to(tl.int32) - down.to(tl.int32)
    return bucket


@triton.jit
def add_bias(logits, rows, cols, row_times, key_times, history_end, pos_ptr, time_ptr, bounds_ptr, SHAPE: tl.constexpr):
    """``logits`` plus the relative bias of float32 tables; ``rows`` and ``cols`` broadcast to its shape."""
    if SHAPE.reach >= 0:
        logits += tl.load(pos_ptr + position_index(rows, cols, history_end, SHAPE))
    if SHAPE.buckets >= 0:
        logits += tl.load(time_ptr + time_bucket(row_times, key_times, bounds_ptr, SHAPE))
    return logits


@triton.jit
def load_times(times_ptr, seq_start, indices, seq_len, SHAPE: tl.constexpr):
    """int64 seconds of rows ``indices`` of a sequence; behind its end the last row's, so that no bucket is far off.

    Of an empty sequence nothing is read: its times may begin where memory does.
    """
    if SHAPE.buckets >= 0:
        last = tl.minimum(indices, seq_len - 1)
        times = tl.load(times_ptr + seq_start + last, mask=last >= 0, other=0)
    else:
        # Not read: without a time table no bucket is asked for.
        times = indices
    return times


@triton.jit
def load_tile(
    ptr, row_stride, begin, seq_len, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr
):
    """``[ROWS, BLOCK]``: rows from ``begin`` of the sequence at ``ptr``; 0 beyond its end (EDGE) and beyond WIDTH."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    ptrs = ptr + begin.to(tl.int64) * row_stride + (row[:, None] * row_stride + column[None, :])
    if EDGE:
        if WIDTH == BLOCK:
            tile = tl.load(ptrs, mask=row[:, None] < seq_len - begin, other=0.0)
        else:
            tile = tl.load(ptrs, mask=(row[:, None] < seq_len - begin) & (column[None, :] < WIDTH), other=0.0)
    elif WIDTH == BLOCK:
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=column[None, :] < WIDTH, other=0.0)
    return tile


@triton.jit
def load_rows(
    ptr,
    desc,
    row_stride,
    head_column,
    seq_start,
    begin,
    seq_len,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """As `load_tile`; with DESCRIPTORS a full block comes through ``desc``, that is by the tensor copy engine.

    Not an edge block: the engine knows where the tensor ends, not where the sequence does.
    """
    if DESCRIPTORS and not EDGE:
        tile = desc.load([(seq_start + begin).to(tl.int32), head_column.to(tl.int32)])
    else:
        tile = load_tile(ptr, row_stride, begin, seq_len, ROWS, WIDTH, BLOCK, EDGE)
    return tile


@triton.jit
def store_tile(ptr, tile, row_stride, begin, seq_len, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The counterpart of `load_tile`, always bounded."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    ptrs = ptr + begin.to(tl.int64) * row_stride + (row[:, None] * row_stride + column[None, :])
    inside = (row[:, None] < seq_len - begin) & (column[None, :] < WIDTH)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_sums(
    ptr,
    partial_ptr,
    tile,
    factor,
    line,
    pieces,
    head,
    row_stride,
    begin,
    seq_len,
    SHAPE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of work line ``line``: of a piece as they are, in float32, of a whole tile times ``factor``."""
    if partial_ptr is not None:
        if line < pieces:
            place = (line.to(tl.int64) * SHAPE.heads + head) * (ROWS * BLOCK)
            inside = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
            tl.store(partial_ptr + place + inside, tile)
        else:
            store_tile(ptr, tile * factor, row_stride, begin, seq_len, ROWS, WIDTH, BLOCK)
    else:
        store_tile(ptr, tile * factor, row_stride, begin, seq_len, ROWS, WIDTH, BLOCK)


@triton.jit
def load_own(
    ptr,
    row_stride,
    begin,
    seq_len,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """As `load_tile`, bounded: an operand that stays for the whole loop, of two bytes an element if IN_REGISTERS.

    What the compiler sees as a load it keeps in shared memory and reads again for each product, and products of narrow
    tiles use up its bandwidth. What comes out of assembly stays in registers; pairs of columns, as the product wants
    them, come there without a detour through shared memory. They have to lie at multiples of four bytes (`in_pairs`).
    """
    if IN_REGISTERS and WIDTH == BLOCK:
        base = (ptr + begin.to(tl.int64) * row_stride).to(tl.int64, bitcast=True)
        row = tl.broadcast_to(tl.arange(0, ROWS)[:, None], ROWS, BLOCK // 2)
        even, odd = tl.inline_asm_elementwise(
            """{ .reg .u64 a; .reg .pred p; .reg .b32 x; setp.lt.s32 p, $2, $3; mad.wide.s32 a, $4, 2, $5; mov.b32 x, 0;
            @p ld.global.nc.b32 x, [a]; mov.b32 {$0, $1}, x; }""",
            "=h,=h,r,r,r,l",
            [row, seq_len - begin, row * row_stride + tl.arange(0, BLOCK // 2)[None, :] * 2, base],
            dtype=(ptr.dtype.element_ty, ptr.dtype.element_ty),
            is_pure=True,
            pack=1,
        )
        tile = tl.join(even, odd).reshape(ROWS, BLOCK)
    else:
        tile = load_tile(ptr, row_stride, begin, seq_len, ROWS, WIDTH, BLOCK, True)
    return tile


@triton.jit
def load_line(work_ptr, index):
    """Sequence start (int64), length, history end and tile begin of work line ``index``, and where the line lies."""
    line = work_ptr + index.to(tl.int64) * _LINE
    seq_start = tl.load(line)
    seq_len = tl.load(line + 1).to(tl.int32)
    history_end = tl.load(line + 2).to(tl.int32)
    begin = tl.load(line + 3).to(tl.int32)
    return line, seq_start, seq_len, history_end, begin


@triton.jit
def load_segments(line):
    """The segments of a line: origins, and the number of blocks up to the end of each."""
    at = line + _HEADER
    return (
        tl.load(at).to(tl.int32),
        tl.load(at + 1).to(tl.int32),
        tl.load(at + 2).to(tl.int32),
        tl.load(at + 3).to(tl.int32),
        tl.load(at + 4).to(tl.int32),
        tl.load(at + 5).to(tl.int32),
        tl.load(at + 6).to(tl.int32),
        tl.load(at + 7).to(tl.int32),
        tl.load(at + 8).to(tl.int32),
        tl.load(at + 9).to(tl.int32),
        tl.load(at + 10).to(tl.int32),
        tl.load(at + 11).to(tl.int32),
        tl.load(at + 12).to(tl.int32),
        tl.load(at + 13).to(tl.int32),
    )


@triton.jit
def key_block(i, o0, n0, o1, n1, o2, n2, o3, n3, o4, n4, o5, SHAPE: tl.constexpr, MASK: tl.constexpr):
    """First key of block ``i`` of a query tile, and whether hidden pairs may lie in it."""
    WINDOW: tl.constexpr = MASK.max_attn_len
    origin = tl.where(i < n4, o4, o5)
    origin = tl.where(i < n3, o3, origin)
    edge = i >= n3
    # Without a window a row meets one range of keys.
    if WINDOW > 0:
        origin = tl.where(i < n2, o2, origin)
        edge = edge | (i < n2)
        if SHAPE.contextual + MASK.global_prefix_len > 0:
            origin = tl.where(i < n1, o1, origin)
            origin = tl.where(i < n0, o0, origin)
            edge = edge & (i >= n0)
    return i * SHAPE.block_n + origin, edge


@triton.jit
def row_block(i, o0, n0, o1, n1, o2, n2, o3, n3, o4, n4, o5, n5, o6, SHAPE: tl.constexpr, MASK: tl.constexpr):
    """First row of block ``i`` of a key tile, and whether hidden pairs may lie in it."""
    WINDOW: tl.constexpr = MASK.max_attn_len
    origin = o3
    edge = (i < n1) | (i >= n2)
    if WINDOW > 0:
        origin = tl.where(i < n5, o5, o6)
        origin = tl.where(i < n4, o4, origin)
        origin = tl.where(i < n3, o3, origin)
        edge = edge & ((i < n4) | (i >= n5))
    origin = tl.where(i < n2, o2, origin)
    origin = tl.where(i < n1, o1, origin)
    if SHAPE.contextual > 0:
        origin = tl.where(i < n0, o0, origin)
    return i * SHAPE.block_m + origin, edge
