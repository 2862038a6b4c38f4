"""Time buckets of pairs of rows: bounds for a block's, exact ones of each pair, and look-ups in tables.

The buckets are those of `hstu_kernels.bias`, 0.301 nats wide.
"""

import triton
import triton.language as tl

_BUCKETS_PER_OCTAVE = tl.constexpr(2.302814)
# Thresholds up to this one fit into 31 bits.
_LAST_NARROW = tl.constexpr(71)
# Far above the error of log2 in float32 (1e-5 buckets): a bucket bound that is one off by it only looks one wider.
_GUARD = tl.constexpr(1e-3)
_OLDEST = tl.constexpr(1 << 30)
_UNKNOWN = tl.constexpr(1 << 20)


@triton.jit
def lookup(ptr, index, SHAPE: tl.constexpr):
    """Entries ``index`` of a table of float32 or int64.

    Like all arithmetic of a logit's own that is not a step or two, in assembly where there is any: the software
    pipeline would take these loads for operands and buffer them in shared memory, and where the compiler counts too
    much work it computes a block in a layout of its own and sends it through shared memory.
    """
    if SHAPE.assembly:
        base = ptr.to(tl.int64, bitcast=True)
        if ptr.dtype.element_ty == tl.float32:
            entry = tl.inline_asm_elementwise(
                "{ .reg .u64 a; mad.wide.u32 a, $1, 4, $2; ld.global.nc.f32 $0, [a]; }",
                "=f,r,l",
                [index, base],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
        else:
            entry = tl.inline_asm_elementwise(
                "{ .reg .u64 a; mad.wide.u32 a, $1, 8, $2; ld.global.nc.s64 $0, [a]; }",
                "=l,r,l",
                [index, base],
                dtype=tl.int64,
                is_pure=True,
                pack=1,
            )
    else:
        entry = tl.load(ptr + index)
    return entry


@triton.jit
def lookup_low(ptr, index, SHAPE: tl.constexpr):
    """The low halves, int32, of entries ``index`` of a table of int64."""
    if SHAPE.assembly:
        entry = tl.inline_asm_elementwise(
            "{ .reg .u64 a; mad.wide.u32 a, $1, 8, $2; ld.global.nc.s32 $0, [a]; }",
            "=r,r,l",
            [index, ptr.to(tl.int64, bitcast=True)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        entry = tl.load(ptr + index).to(tl.int32)
    return entry


@triton.jit
def _log2(x, SHAPE: tl.constexpr):
    """log2 of a float32 scalar >= 1."""
    if SHAPE.assembly:
        y = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = tl.log2(x)
    return y


@triton.jit
def bucket_range(row_low, row_high, key_low, key_high, SHAPE: tl.constexpr):
    """Of a block none of whose keys is younger than a row: its lowest bucket, and how many more it may span; int32.

    Both are bounds: the true buckets lie in ``[lowest, lowest + more]``. ``more`` is huge for any other block.
    """
    if SHAPE.buckets > 0:
        farthest = row_high - key_low
        # A difference that wraps around is negative.
        known = (row_low >= key_high) & (farthest >= 0) & (farthest < _OLDEST)
        near = tl.maximum((row_low - key_high).to(tl.int32), 1).to(tl.float32)
        far = tl.maximum(farthest.to(tl.int32), 1).to(tl.float32)
        lowest = (_log2(near, SHAPE) * _BUCKETS_PER_OCTAVE - _GUARD).to(tl.int32)
        highest = (_log2(far, SHAPE) * _BUCKETS_PER_OCTAVE + _GUARD).to(tl.int32)
        lowest = tl.minimum(lowest, SHAPE.buckets)
        more = tl.where(known, tl.minimum(highest, SHAPE.buckets) - lowest, _UNKNOWN)
    else:
        lowest, more = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    return lowest, more


@triton.jit
def threshold(bounds_ptr, bucket, farthest, SHAPE: tl.constexpr):
    """The least difference of the bucket after scalar ``bucket``, or one that the block does not reach; int32."""
    bound = tl.load(bounds_ptr + tl.minimum(bucket, SHAPE.buckets - 1))
    bound = tl.where(bucket < SHAPE.buckets, bound, farthest + 1)
    return tl.minimum(bound, farthest + 1).to(tl.int32)


@triton.jit
def narrow_bucket(row_times, key_times, key_low, bounds_ptr, SHAPE: tl.constexpr):
    """Buckets of differences below 2^31: the nearest threshold from a float's bits, then one exact comparison.

    Exponent and mantissa read as one fixed-point number are log2 to 0.09, a fifth of a bucket: near enough.
    """
    LAST: tl.constexpr = SHAPE.buckets if SHAPE.buckets < _LAST_NARROW else _LAST_NARROW
    row = (row_times - key_low).to(tl.int32)
    key = (key_times - key_low).to(tl.int32)
    # 2^11 a unit: 2.302814 buckets for each, less the exponent's offset of 127, plus 0.6 to round.
    if SHAPE.assembly:
        nearest = tl.inline_asm_elementwise(
            """{ .reg .s32 d; .reg .f32 f; sub.s32 d, $1, $2; abs.s32 d, d; cvt.rn.f32.s32 f, d; mov.b32 d, f;
            shr.s32 d, d, 12; mad.lo.s32 d, d, 4716, -1224096154; shr.s32 d, d, 22;
            max.s32 d, d, 1; min.s32 $0, d, $3; }""",
            "=r,r,r,r",
            [row, key, LAST],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        bound = lookup_low(bounds_ptr - 1, nearest, SHAPE)
        bucket = tl.inline_asm_elementwise(
            """{ .reg .s32 d; .reg .pred p; sub.s32 d, $1, $2; abs.s32 d, d; setp.lt.s32 p, d, $3;
            selp.s32 d, -1, 0, p; add.s32 $0, $4, d; }""",
            "=r,r,r,r,r",
            [row, key, bound, nearest],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        seconds = tl.abs(row - key)
        bits = seconds.to(tl.float32).to(tl.int32, bitcast=True)
        nearest = ((bits >> 12) * 4716 - 1224096154) >> 22
        nearest = tl.minimum(tl.maximum(nearest, 1), LAST)
        bucket = nearest - (seconds < lookup_low(bounds_ptr - 1, nearest, SHAPE)).to(tl.int32)
    return bucket


@triton.jit
def wide_bucket(row_times, key_times, bounds_ptr, SHAPE: tl.constexpr):
    """Buckets of any two times, as `narrow_bucket`; 2^9 a unit, for exponents up to 63."""
    LAST: tl.constexpr = SHAPE.buckets
    if SHAPE.assembly:
        nearest = tl.inline_asm_elementwise(
            """{ .reg .s64 d; .reg .s32 n; .reg .f32 f; sub.s64 d, $1, $2; abs.s64 d, d; max.s64 d, d, 1;
            cvt.rn.f32.s64 f, d; mov.b32 n, f; shr.s32 n, n, 14; mad.lo.s32 n, n, 2358, -153012019; shr.s32 n, n, 19;
            max.s32 n, n, 1; min.s32 $0, n, $3; }""",
            "=r,l,l,r",
            [row_times, key_times, LAST],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        bound = lookup(bounds_ptr - 1, nearest, SHAPE)
        bucket = tl.inline_asm_elementwise(
            """{ .reg .s64 d; .reg .s32 n; .reg .pred p; sub.s64 d, $1, $2; abs.s64 d, d; setp.lt.s64 p, d, $3;
            selp.s32 n, -1, 0, p; add.s32 $0, $4, n; }""",
            "=r,l,l,l,r",
            [row_times, key_times, bound, nearest],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        seconds = tl.abs(row_times - key_times)
        bits = tl.maximum(seconds, 1).to(tl.float32).to(tl.int32, bitcast=True)
        nearest = ((bits >> 14) * 2358 - 153012019) >> 19
        nearest = tl.minimum(tl.maximum(nearest, 1), LAST)
        bucket = nearest - (seconds < lookup(bounds_ptr - 1, nearest, SHAPE)).to(tl.int32)
    return bucket


@triton.jit
def is_narrow(row_low, row_high, key_low, key_high):
    """Whether every difference of times in the block is below 2^31, and none of them wraps around."""
    widest: tl.constexpr = 1 << 31
    later, earlier = row_high - key_low, key_high - row_low
    spread, key_spread = row_high - row_low, key_high - key_low
    small = (later < widest) & (later > -widest) & (earlier < widest) & (earlier > -widest)
    return small & (spread >= 0) & (spread < widest) & (key_spread >= 0) & (key_spread < widest)


@triton.jit
def general_bucket(row_times, key_times, row_low, row_high, key_low, key_high, bounds_ptr, SHAPE: tl.constexpr):
    """Time bucket of each pair of a block."""
    if is_narrow(row_low, row_high, key_low, key_high):
        bucket = narrow_bucket(row_times, key_times, key_low, bounds_ptr, SHAPE)
    else:
        bucket = wide_bucket(row_times, key_times, bounds_ptr, SHAPE)
    return bucket
