"""What the kernels for Hopper alone share: rings of barriers, weights of a block, rows on their way out.

Warps that fetch stand beside two groups of four warps that multiply, each of which owns 64 rows of a tile.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

# Rows of one group of warps: those of a product.
GROUP_ROWS = gl.constexpr(64)


@gluon.jit
def ring(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each of which waits for ARRIVALS."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def allocate(
    q_desc, k_desc, v_desc, TILES: gl.constexpr, RESULTS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
):
    """Shared memory of a program, and of q, k and v the barriers that say a slot is full, and that it is free again.

    TILES: whose q lie there at a time, for two groups each. RESULTS: 64 rows each, on their way to the copy engine.
    """
    D: gl.constexpr = q_desc.block_type.shape[1]
    q_buffer = gl.allocate_shared_memory(q_desc.dtype, [2 * TILES, GROUP_ROWS, D], q_desc.layout)
    k_buffer = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_N, D], k_desc.layout)
    v_buffer = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK_N, D], v_desc.layout)
    o_buffer = gl.allocate_shared_memory(q_desc.dtype, [RESULTS, GROUP_ROWS, D], q_desc.layout)
    # Full is what the one warp fetched, free what both groups read.
    q_full, q_free = ring(TILES, 1), ring(TILES, 2)
    k_full, k_free = ring(STAGES, 1), ring(STAGES, 2)
    v_full, v_free = ring(STAGES, 1), ring(STAGES, 2)
    fence_async_shared()
    return (q_buffer, k_buffer, v_buffer, o_buffer), (q_full, q_free, k_full, k_free, v_full, v_free)


@gluon.jit
def slot_of(used, STAGES: gl.constexpr):
    """Where the block that is number ``used`` of all lies in a ring, and the phase of the slot's barriers."""
    return used % STAGES, (used // STAGES) & 1


@gluon.jit
def silu_of(logits, half_alpha):
    """SiLU of ``alpha * logits``."""
    half = logits * half_alpha
    tanh = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=gl.float32, is_pure=True, pack=1)
    return half * tanh + half


@gluon.jit
def weights_of(logits, begin, last, half_alpha, edge, P_LAYOUT: gl.constexpr, DTYPE: gl.constexpr):
    """SiLU of ``alpha * logits [64, N]`` as the operand of the next product; 0 behind column ``last [64, 1]``.

    ``begin``: the first column. ``edge``: whether some lie behind.
    """
    return gl.convert_layout(exact_weights_of(logits, begin, last, half_alpha, edge).to(DTYPE), P_LAYOUT)


@gluon.jit
def exact_weights_of(logits, begin, last, half_alpha, edge):
    """`weights_of` in float32, in the layout of ``logits``."""
    weights = silu_of(logits, half_alpha)
    if edge:
        cols = begin + gl.arange(0, logits.shape[1], layout=gl.SliceLayout(0, logits.type.layout))
        weights = gl.where(gl.expand_dims(cols, 0) <= last, weights, 0.0)
    return weights


@gluon.jit
def clear_behind(values, begin, length):
    """Zeros for rows of another sequence: a weight of 0 does not hide what is no number."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    x = values.load(LAYOUT)
    rows = begin + gl.arange(0, values.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    # Both groups write, and the same: neither waits for the other.
    values.store(gl.where(gl.expand_dims(rows < length, 1), x, gl.zeros_like(x)))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def last_seen_by(row, LAYOUT: gl.constexpr):
    """The last column, ``[64, 1]``, that each row from ``row`` on sees.

    Keys behind the end lie behind every row that is written, whatever another sequence holds there.
    """
    return gl.expand_dims(row + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, LAYOUT)), 1)


@gluon.jit
def store_rows(out, staged, acc, scale, head, start, row, length, HEADS: gl.constexpr, D: gl.constexpr):
    """The rows of a group from ``row`` on, by way of ``staged [64, D]``; by the copy engine where all of them exist.

    ``out``: where they go, as a pointer and as a descriptor.
    """
    out_ptr, out_desc = out
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    # What was staged before has been read.
    tma.store_wait(0)
    gl.thread_barrier()
    staged.store((acc * scale).to(staged.dtype))
    fence_async_shared()
    gl.thread_barrier()
    if row + GROUP_ROWS <= length:
        tma.async_copy_shared_to_global(out_desc, [start.to(gl.int32) + row, head * D], staged)
    else:
        rows = gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, ROWS))
        cols = gl.arange(0, D, layout=gl.SliceLayout(0, ROWS))
        # 64 bits up to the group's first row, 32 behind it.
        first = out_ptr + ((start + row) * HEADS + head) * D
        places = gl.expand_dims(rows, 1) * (HEADS * D) + gl.expand_dims(cols, 0)
        inside = gl.expand_dims(rows < length - row, 1) & gl.expand_dims(cols < D, 0)
        gl.store(first + places, staged.load(ROWS), mask=inside)


@gluon.jit
def pass_over(count, place, barriers, STAGES: gl.constexpr):
    """Say that the block at ``place`` of the rings has been read, which nobody will, if ``count`` is 1; ``count``."""
    _q_full, _q_free, k_full, k_free, v_full, v_free = barriers
    if count > 0:
        slot, phase = slot_of(place, STAGES)
        # Not before it is there: until then the slot still counts for the block before it.
        mbarrier.wait(k_full.index(slot), phase)
        mbarrier.wait(v_full.index(slot), phase)
        mbarrier.arrive(k_free.index(slot), count=1)
        mbarrier.arrive(v_free.index(slot), count=1)
    return count
