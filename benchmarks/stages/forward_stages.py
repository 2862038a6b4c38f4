"""Stages of the forward without a bias: of the kernel for Hopper (`hopper_forward`) and of that for all GPUs.

Which of them a call takes is the shipped code's choice; an edit of the other one does no harm.
"""

from benchmarks.stages.patching import Edit, Stage

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


def without_copies(module: str, before: str, *, copies: int, expected: int) -> tuple[Edit, ...]:
    """The warp that fetches arrives at its barriers and copies nothing; ``before``: the function to stand in front."""
    helpers = """@gluon.jit
def _no_copy(desc, place, bar, buffer):
    pass


@gluon.jit
def _arrive(bar, size):
    mbarrier.arrive(bar, count=1)


"""
    return (
        Edit(module=module, old="tma.async_copy_global_to_shared(", new="_no_copy(", count=copies),
        Edit(module=module, old="mbarrier.expect(", new="_arrive(", count=expected),
        Edit(module=module, old=before, new=helpers + before),
    )


HOPPER_SILU = Edit(
    module="hopper_forward",
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
HOPPER_MASK = Edit(
    module="hopper_forward", old="    if edge:\n        cols = begin", new="    if False:\n        cols = begin"
)
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
HOPPER_STORES = Edit(module="hopper_forward", old="rows < length - row, 1)", new=f"rows < length - row - {NOWHERE}, 1)")
_LOADS = "        seq_start,\n        {begin},\n        seq_len,\n        BLOCK_N,\n        SHAPE.{width}_dim,\n"


def _one_block(width: str) -> Edit:
    """Blocks begin at multiples of their size: the first block is read again and again."""
    return Edit(
        module="forward",
        old=_LOADS.format(begin="begin", width=width),
        new=_LOADS.format(begin="begin & (BLOCK_N - 1)", width=width),
    )


STAGES = (
    Stage(name="stores", edits=(HOPPER_STORES, STORES), visible=False),
    Stage(name="SiLU", edits=(HOPPER_SILU, SILU)),
    Stage(name="mask of the diagonal", edits=(HOPPER_MASK, MASK)),
    Stage(
        name="fetching (Hopper: no copies; else one block again and again)",
        edits=(
            *without_copies("hopper_forward", "@gluon.jit\ndef _fetch(", copies=4, expected=3),
            _one_block("qk"),
            _one_block("v"),
        ),
    ),
    Stage(
        name="first product",
        edits=(
            Edit(
                module="hopper_forward",
                old="coming = warpgroup_mma(q, keys, nothing, use_acc=False, is_async=True)",
                new="coming = nothing + ahead.to(gl.float32)",
            ),
            Edit(
                module="forward",
                old="tl.dot(q, tl.trans(k), rab, input_precision=SHAPE.precision), alpha",
                new=f"rab + {distances('rows', 'cols')}, alpha",
            ),
        ),
    ),
    Stage(
        name="second product",
        edits=(
            Edit(
                module="hopper_forward",
                old="growing = warpgroup_mma(p, v_buffer.index(slot), acc, is_async=True)",
                new=kept("p", "p.dtype", "gl") + "\n                    growing = acc",
            ),
            Edit(
                module="forward",
                old="return tl.dot(weights.to(v.dtype), v, acc, input_precision=SHAPE.precision)",
                new=kept("weights.to(v.dtype)", "v.dtype") + "\n    return acc",
            ),
        ),
    ),
    Stage(
        name="all but the launch",
        edits=(
            Edit(
                module="hopper_launch",
                old="numbers = (self._items, *(x.stride(1)",
                new="numbers = (0, *(x.stride(1)",
            ),
            Edit(module="forward", old="for i in range(inside):", new=f"for i in range(inside - {NOWHERE}):"),
            Edit(module="forward", old="    if reaches_over:", new=f"    if reaches_over & (seq_len > {NOWHERE}):"),
            STORES,
        ),
        visible=False,
    ),
)
