"""Stages of cached scoring by the kernel for Hopper (`hopper_target`, and `hopper_fetch`, whose copies it shares)."""

from benchmarks.stages.forward_stages import HOPPER_COPIES, HOPPER_MASK, HOPPER_SILU, NO_COPIES_OUT, NOWHERE, kept
from benchmarks.stages.patching import Edit, Stage

_KERNEL = "hopper_target"
_INDENT = " " * 24
_OWN = "_start_logits(q, used, OWN, k_buffer, k_full, nothing_own, STAGES)"
_NO_OWN = "_no_logits(used, k_full, nothing_own, STAGES)"
# As `_start_logits`, with its wait and without its product; another number each time, so that nothing is foreseen.
_NO_LOGITS = """@gluon.jit
def _no_logits(used, k_full, nothing, STAGES: gl.constexpr):
    slot, phase = slot_of(used, STAGES)
    mbarrier.wait(k_full.index(slot), phase)
    return nothing + used.to(gl.float32)


"""
_HELPER = Edit(module=_KERNEL, old="@gluon.jit\ndef _own_terms(", new=_NO_LOGITS + "@gluon.jit\ndef _own_terms(")
STAGES = (
    Stage(
        name="stores",
        # By the copy engine as in the forward, or by the threads.
        edits=(
            NO_COPIES_OUT,
            Edit(
                module=_KERNEL,
                old="rows < length - row, 1)",
                new=f"rows < length - row - {NOWHERE}, 1)",
                optional=True,
            ),
        ),
        visible=False,
    ),
    Stage(name="SiLU", edits=(HOPPER_SILU,)),
    Stage(name="own product", edits=(_HELPER, Edit(module=_KERNEL, old=_OWN, new=_NO_OWN, count=2))),
    Stage(name="mask of the history's end", edits=(HOPPER_MASK,)),
    Stage(name="fetching", edits=HOPPER_COPIES),
    Stage(
        name="first product",
        edits=(
            _HELPER,
            Edit(
                module=_KERNEL,
                old="coming = _start_logits(q, ahead, 0, k_buffer, k_full, nothing, STAGES)",
                new="coming = _no_logits(ahead, k_full, nothing, STAGES)",
            ),
        ),
    ),
    Stage(
        name="second product",
        edits=(
            # Only that of the loop: what follows it tells it from the last one.
            Edit(
                module=_KERNEL,
                old=f"growing = warpgroup_mma(p, v_buffer.index(slot), acc, is_async=True)\n{_INDENT}logits",
                new=f"{kept('p', 'p.dtype', 'gl')}\n{_INDENT}growing = acc\n{_INDENT}logits",
            ),
        ),
    ),
)
