"""Stages of the forward without a bias on Hopper (`hopper_forward`, `hopper_fetch`), and edits that others share."""

from benchmarks.stages.patching import Edit, Stage

# The kernel, the list with the warp that fetches, and what the kernels for Hopper share.
_KERNEL, _FETCH, _SHARED = "hopper_forward", "hopper_fetch", "hopper_shared"
# Beyond every row of a sequence, which the compiler cannot know.
NOWHERE = "(1 << 30)"
# Assembly with a side effect: what it is given is computed although nobody reads it.
_KEPT = '{lib}.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [{x}], dtype={dtype}, is_pure=False, pack=2)'


def kept(x: str, dtype: str, lib: str = "tl") -> str:
    """A statement that keeps ``x``, of two bytes an element, alive."""
    return _KEPT.format(lib=lib, x=x, dtype=dtype)


def distances(down: str, across: str) -> str:
    """Numbers that differ from logit to logit, in place of a product: of less the compiler would make one number."""
    return f"({down}.to(tl.float32)[:, None] - {across}.to(tl.float32)[None, :])"


_FETCH_HELPERS = """@gluon.jit
def _no_copy(desc, place, bar, buffer):
    pass


@gluon.jit
def _arrive(bar, size):
    mbarrier.arrive(bar, count=1)


"""
_FETCH_BEGIN = "@gluon.jit\ndef snake("
# The warp that fetches arrives at its barriers and copies nothing.
HOPPER_COPIES = (
    Edit(module=_FETCH, old="tma.async_copy_global_to_shared(", new="_no_copy(", count=4),
    Edit(module=_FETCH, old="mbarrier.expect(", new="_arrive(", count=3),
    Edit(module=_FETCH, old=_FETCH_BEGIN, new=_FETCH_HELPERS + _FETCH_BEGIN),
)
HOPPER_SILU = Edit(
    module=_SHARED,
    old="""    half = logits * half_alpha
    tanh = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=gl.float32, is_pure=True, pack=1)
    return half * tanh + half""",
    new="    return logits * half_alpha",
)
SILU = Edit(
    module="primitives",
    old="""        half = x * (0.5 * factor)
        value = half * _tanh(half) + half""",
    new="        value = x * (0.5 * factor)",
)
HOPPER_MASK = Edit(module=_SHARED, old="    if edge:\n        cols = begin", new="    if False:\n        cols = begin")
MASK = Edit(
    module="forward",
    old="    if edge:\n        weights = tl.where(",
    new="    if False:\n        weights = tl.where(",
)
STORES = Edit(
    module="primitives",
    old="inside = (row[:, None] < seq_len - begin) & (column[None, :] < WIDTH)",
    new=f"inside = (row[:, None] < seq_len - begin - {NOWHERE}) & (column[None, :] < WIDTH)",
)
_INDENT = " " * 16
_COPIED = "tma.async_copy_shared_to_global(out_desc, [start.to(gl.int32) + row, head * D], staged)"
_STAGED = """    # What was staged before has been read.
    tma.store_wait(0)
    gl.thread_barrier()
    staged.store((acc * scale).to(staged.dtype))
    fence_async_shared()
    gl.thread_barrier()
"""
NO_COPIES_OUT = Edit(module=_SHARED, old=_COPIED, new="pass")
# Of a program one tile with the blocks of all of its pairs; of the narrow blocks the first group skips one a tile. For
# sequences of one length, whole pairs each: the list has one line more for each, and these stand empty at its end.
_ALL_BLOCKS = """    pair = (last + 2) * (_TILE_ROWS // BLOCK_N)
    if BLOCK_N == GROUP_ROWS:
        pair -= 1
    programs, program = gl.num_programs(0), gl.program_id(0)
    of_one = (last + 2) // 2
    there = items // (of_one + 1) * of_one
    full = there // programs
    pairs = full + gl.where(snake(full, programs, program) < there, 1, 0)
    blocks = gl.where(turn == 0, pairs * pair, 0)
    # Before all of its keys: no block lies on the diagonal, and no row is written.
    row = row * 0 + (1 << 20)
"""
_BLOCKS = "    blocks = (gl.minimum(row + _TILE_ROWS, length) + BLOCK_N - 1) // BLOCK_N\n"
_ONE_TILE = (
    Edit(module=_FETCH, old=_BLOCKS, new=_ALL_BLOCKS),
    *(
        Edit(module=module, old="turns = (items + programs - 1) // programs * 2", new="turns = items * 0 + 1")
        for module in (_KERNEL, _FETCH)
    ),
    Edit(module=_FETCH, old="start, row, head, q_head_stride", new="start, 0, head, q_head_stride"),
    Edit(module=_FETCH, old="begin = first + i * BLOCK_N", new="begin = first + (i * BLOCK_N) % _length"),
)
_NEXT_FIRST = """coming = warpgroup_mma(
                    q_buffer.index(2 * next_place + group), keys, nothing, use_acc=False, is_async=True
                )"""

STAGES = (
    Stage(name="stores by the copy engine", edits=(NO_COPIES_OUT,), visible=False),
    Stage(
        name="stores and staged rows",
        edits=(
            Edit(
                module=_SHARED, old=_STAGED, new=f"    {kept('(acc * scale).to(staged.dtype)', 'staged.dtype', 'gl')}\n"
            ),
            NO_COPIES_OUT,
        ),
        visible=False,
    ),
    Stage(name="tiles' ends (all blocks of a program in one tile)", edits=_ONE_TILE, visible=False),
    Stage(name="SiLU", edits=(HOPPER_SILU,)),
    Stage(name="mask of the diagonal", edits=(HOPPER_MASK,)),
    Stage(name="fetching", edits=HOPPER_COPIES),
    Stage(
        name="first product",
        edits=(
            Edit(
                module=_KERNEL,
                old="coming = warpgroup_mma(q, keys, nothing, use_acc=False, is_async=True)",
                new="coming = nothing + ahead.to(gl.float32)",
            ),
            Edit(module=_KERNEL, old=_NEXT_FIRST, new="coming = nothing + ahead.to(gl.float32)"),
        ),
    ),
    Stage(
        name="second product",
        edits=(
            Edit(
                module=_KERNEL,
                old="growing = warpgroup_mma(p, v_buffer.index(slot), acc, is_async=True)",
                new=f"{kept('p', 'p.dtype', 'gl')}\n{_INDENT}growing = acc",
                count=3,
            ),
        ),
    ),
    Stage(
        name="all but the launch",
        edits=(
            Edit(
                module="hopper_launch", old="numbers = (self._items, *(x.stride(1)", new="numbers = (0, *(x.stride(1)"
            ),
        ),
        visible=False,
    ),
)
