"""The relative bias of a block of logits ``[64, 64]``, in the places in which a product of Hopper leaves them.

What `rab.block_bias` does for causal rows without targets, for warps that have no shared memory to send anything
through: each thread looks up what its own elements need. Tables come divided by alpha. The values are the same bits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hstu_kernels.attention.triton.assembly import constraints, diagonal_look_up

# As in `time_buckets`.
_BUCKETS_PER_OCTAVE = gl.constexpr(2.302814)
_LAST_NARROW = gl.constexpr(71)
_GUARD = gl.constexpr(1e-3)
_OLDEST = gl.constexpr(1 << 30)
_UNKNOWN = gl.constexpr(1 << 20)
# A block that spans so many thresholds compares with each of them.
_FEW = gl.constexpr(3)

_DIAGONALS = gl.constexpr(diagonal_look_up(32, 1))
_LOOK_UP = gl.constexpr(constraints("f", 32, "r", "l", elements=32))
_BOUNDED_DIAGONALS = gl.constexpr(diagonal_look_up(32, 1, bounded=True))
_BOUNDED_LOOK_UP = gl.constexpr(constraints("f", 32, "r", "l", "r", elements=32))

# One instruction a step, in assembly: the compiler neither moves these loads into shared memory nor vectorises them.
_ENTRY = gl.constexpr("{ .reg .u64 a; mad.wide.u32 a, $1, 4, $2; ld.global.nc.f32 $0, [a]; }")
_LOW_BOUND = gl.constexpr("{ .reg .u64 a; mad.wide.u32 a, $1, 8, $2; ld.global.nc.s32 $0, [a]; }")
_BOUND = gl.constexpr("{ .reg .u64 a; mad.wide.u32 a, $1, 8, $2; ld.global.nc.s64 $0, [a]; }")
# The nearest threshold: exponent and mantissa read as one fixed-point number are log2 to 0.09, a fifth of a bucket.
_NEAREST = gl.constexpr(
    """{ .reg .s32 d; .reg .f32 f; sub.s32 d, $1, $2; abs.s32 d, d; cvt.rn.f32.s32 f, d; mov.b32 d, f;
    shr.s32 d, d, 12; mad.lo.s32 d, d, 4716, -1224096154; shr.s32 d, d, 22; max.s32 d, d, 1; min.s32 $0, d, $3; }"""
)
_BENEATH = gl.constexpr(
    """{ .reg .s32 d; .reg .pred p; sub.s32 d, $1, $2; abs.s32 d, d; setp.lt.s32 p, d, $3;
    selp.s32 d, -1, 0, p; add.s32 $0, $4, d; }"""
)
# Any two times, read one after the other: rare, so it is written for few registers.
_WIDE = gl.constexpr(
    """{ .reg .u64 a; .reg .s64 d, t; .reg .s32 n, m; .reg .f32 f; .reg .pred p;
    mad.wide.s32 a, $1, 8, $3; ld.volatile.global.s64 d, [a]; mad.wide.s32 a, $2, 8, $4; ld.volatile.global.s64 t, [a];
    sub.s64 d, d, t; abs.s64 d, d; max.s64 d, d, 1;
    cvt.rn.f32.s64 f, d; mov.b32 n, f; shr.s32 n, n, 14; mad.lo.s32 n, n, 2358, -153012019; shr.s32 n, n, 19;
    max.s32 n, n, 1; min.s32 n, n, $7; mad.wide.s32 a, n, 8, $5; ld.volatile.global.s64 t, [a+-8];
    setp.lt.s64 p, d, t; selp.s32 m, -1, 0, p; add.s32 n, n, m; mad.wide.s32 a, n, 4, $6;
    ld.volatile.global.f32 $0, [a]; }"""
)


@gluon.jit
def read_span(spans_ptr, start, begin, length, BUCKETS: gl.constexpr):
    """The earliest and the latest time, int64, of the 64 rows at ``begin``; something else behind the end."""
    if BUCKETS > 0:
        at = spans_ptr + 2 * (start + gl.maximum(gl.minimum(begin, length - 1), 0))
        low, high = gl.load(at), gl.load(at + 1)
    else:
        low, high = start * 0, start * 0
    return low, high


@gluon.jit
def _log2(x):
    return gl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def bucket_range(row_low, row_high, key_low, key_high, BUCKETS: gl.constexpr):
    """As `time_buckets.bucket_range`: the lowest bucket of a block, and how many more it may span."""
    farthest = row_high - key_low
    # A difference that wraps around is negative.
    known = (row_low >= key_high) & (farthest >= 0) & (farthest < _OLDEST)
    near = gl.maximum((row_low - key_high).to(gl.int32), 1).to(gl.float32)
    far = gl.maximum(farthest.to(gl.int32), 1).to(gl.float32)
    lowest = gl.minimum((_log2(near) * _BUCKETS_PER_OCTAVE - _GUARD).to(gl.int32), BUCKETS)
    highest = gl.minimum((_log2(far) * _BUCKETS_PER_OCTAVE + _GUARD).to(gl.int32), BUCKETS)
    return lowest, gl.where(known, highest - lowest, _UNKNOWN)


@gluon.jit
def _is_narrow(row_low, row_high, key_low, key_high):
    """As `time_buckets.is_narrow`: whether every difference of times is below 2^31, and none of them wraps around."""
    widest: gl.constexpr = 1 << 31
    later, earlier = row_high - key_low, key_high - row_low
    spread, key_spread = row_high - row_low, key_high - key_low
    small = (later < widest) & (later > -widest) & (earlier < widest) & (earlier > -widest)
    return small & (spread >= 0) & (spread < widest) & (key_spread >= 0) & (key_spread < widest)


@gluon.jit
def low_times(times_ptr, start, begin, length, LAYOUT: gl.constexpr):
    """The low halves, int32 ``[64]``, of the times of rows from ``begin`` on; behind the end the last row's.

    Differences below 2^31 come out right of them alone.
    """
    index = gl.minimum(begin + gl.arange(0, 64, layout=LAYOUT), length - 1)
    at = (times_ptr + start).to(gl.int64, bitcast=True)
    return gl.inline_asm_elementwise(_LOW_BOUND, "=r,r,l", [index, at], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _few_buckets(rows, keys, farthest, lowest, entry, time_ptr, bounds_ptr, MORE: gl.constexpr, BUCKETS: gl.constexpr):
    """As `rab._few_buckets`; ``rows [64, 1]`` and ``keys [1, 64]`` are int32, counted from the earliest key."""
    for i in gl.static_range(MORE):
        bound = gl.load(bounds_ptr + gl.minimum(lowest + i, BUCKETS - 1))
        bound = gl.where(lowest + i < BUCKETS, bound, farthest + 1)
        bound = gl.minimum(bound, farthest + 1).to(gl.int32)
        beyond = gl.load(time_ptr + gl.minimum(lowest + i + 1, BUCKETS))
        entry = gl.where(rows - bound >= keys, beyond, entry)
    return entry


@gluon.jit
def _looked_up(rows, keys, time_ptr, bounds_ptr, BUCKETS: gl.constexpr):
    """Entries of any differences below 2^31: the nearest threshold, then one exact comparison."""
    LAST: gl.constexpr = BUCKETS if BUCKETS < _LAST_NARROW else _LAST_NARROW
    nearest = gl.inline_asm_elementwise(
        _NEAREST, "=r,r,r,r", [rows, keys, gl.to_tensor(LAST)], dtype=gl.int32, is_pure=True, pack=1
    )
    below = (bounds_ptr - 1).to(gl.int64, bitcast=True)
    bound = gl.inline_asm_elementwise(_LOW_BOUND, "=r,r,l", [nearest, below], dtype=gl.int32, is_pure=True, pack=1)
    bucket = gl.inline_asm_elementwise(
        _BENEATH, "=r,r,r,r,r", [rows, keys, bound, nearest], dtype=gl.int32, is_pure=True, pack=1
    )
    table = time_ptr.to(gl.int64, bitcast=True)
    return gl.inline_asm_elementwise(_ENTRY, "=f,r,l", [bucket, table], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _looked_up_wide(row, begin, start, length, tables, BUCKETS: gl.constexpr, LAYOUT: gl.constexpr):
    """Entries of any two times."""
    _, time_ptr, bounds_ptr, row_times_ptr, key_times_ptr = tables
    rows = gl.minimum(row + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT)), length - 1)
    cols = gl.minimum(begin + gl.arange(0, 64, layout=gl.SliceLayout(0, LAYOUT)), length - 1)
    return gl.inline_asm_elementwise(
        _WIDE,
        "=f,r,r,l,l,l,l,r",
        [
            gl.expand_dims(rows, 1),
            gl.expand_dims(cols, 0),
            (row_times_ptr + start).to(gl.int64, bitcast=True),
            (key_times_ptr + start).to(gl.int64, bitcast=True),
            bounds_ptr.to(gl.int64, bitcast=True),
            time_ptr.to(gl.int64, bitcast=True),
            gl.to_tensor(BUCKETS),
        ],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _positions(row, begin, length, pos_ptr, REACH: gl.constexpr, LAYOUT: gl.constexpr):
    """Position entries; beyond the table's ends stand its last ones."""
    rows = gl.expand_dims(row + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT)), 1)
    cols = gl.expand_dims(begin + gl.arange(0, 64, layout=gl.SliceLayout(0, LAYOUT)), 0)
    index = (cols + REACH) - rows
    base = pos_ptr.to(gl.int64, bitcast=True)
    # Of the block's corners, those farthest apart.
    if (begin + (REACH - 63) - row >= 0) & (begin + 63 - row <= REACH):
        value = gl.inline_asm_elementwise(_DIAGONALS, _LOOK_UP, [index, base], dtype=gl.float32, is_pure=True, pack=32)
    else:
        value = gl.inline_asm_elementwise(
            _BOUNDED_DIAGONALS, _BOUNDED_LOOK_UP, [index, base, gl.to_tensor(2 * REACH)], dtype=gl.float32,
            is_pure=True, pack=32,
        )  # fmt: skip
    return value


@gluon.jit
def block_class(rows, begin, key_span, time_ptr, BUCKETS: gl.constexpr):
    """What the times of a block's corners say: its lowest bucket and how many more it may span, the lowest bucket's
    entry, and the low half of the earliest key's time.

    More than _UNKNOWN: no look-up by low halves. Of a block that nobody sees: one bucket. ``rows``: as `block_bias`.
    """
    row, _start, length, row_low, row_high, _row_times = rows
    if BUCKETS > 0:
        key_low, key_high = key_span
        lowest, more = bucket_range(row_low, row_high, key_low, key_high, BUCKETS)
        is_wide = (more > _FEW) & (_is_narrow(row_low, row_high, key_low, key_high) == 0)
        more = gl.where(is_wide, 2 * _UNKNOWN, more)
        more = gl.where((begin > row + 63) | (row >= length), 0, more)
        entry = gl.load(time_ptr + lowest)
        base = key_low.to(gl.int32)
    else:
        lowest, more, base = row * 0, row * 0, row * 0
        entry = gl.load(time_ptr) if BUCKETS == 0 else (row * 0).to(gl.float32)
    return lowest, more, entry, base


@gluon.jit
def block_bias(rows, begin, known, tables, REACH: gl.constexpr, BUCKETS: gl.constexpr, LAYOUT: gl.constexpr):
    """The bias of ``rows`` and keys from ``begin`` on, ``[64, 64]``; something finite where all is hidden.

    ``rows``: the first one, the sequence's start and length, the rows' earliest and latest time and their `low_times`.
    ``known``: the `block_class`.
    """
    row, start, length, _row_low, row_high, row_times = rows
    pos_ptr, time_ptr, bounds_ptr, _, key_times_ptr = tables
    lowest, more, entry, base = known
    if REACH >= 0:
        # First, so that what comes from memory comes while times are compared.
        positions = _positions(row, begin, length, pos_ptr, REACH, LAYOUT)
    if BUCKETS > 0:
        if more == 0:
            rab = gl.full([64, 64], entry, gl.float32, LAYOUT)
        elif more <= _FEW:
            keys = low_times(key_times_ptr, start, begin, length, gl.SliceLayout(0, LAYOUT)) - base
            keys = gl.expand_dims(keys, 0)
            later = gl.expand_dims(row_times - base, 1)
            farthest = row_high.to(gl.int32) - base
            if more == 1:
                rab = _few_buckets(later, keys, farthest, lowest, entry, time_ptr, bounds_ptr, 1, BUCKETS)
            else:
                rab = _few_buckets(later, keys, farthest, lowest, entry, time_ptr, bounds_ptr, _FEW, BUCKETS)
        elif more <= _UNKNOWN:
            keys = low_times(key_times_ptr, start, begin, length, gl.SliceLayout(0, LAYOUT))
            rab = _looked_up(gl.expand_dims(row_times, 1), gl.expand_dims(keys, 0), time_ptr, bounds_ptr, BUCKETS)
        else:
            rab = _looked_up_wide(row, begin, start, length, tables, BUCKETS, LAYOUT)
    else:
        rab = gl.full([64, 64], entry, gl.float32, LAYOUT)
    if REACH >= 0:
        rab += positions
    else:
        # A register each: the assembler would have products wait for accumulators that begin as one.
        rab = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [rab], dtype=gl.float32, is_pure=False, pack=1)
    return rab
