"""Stages of the forward without a bias by the kernel for all GPUs (`forward`), which heads of 64 take."""

from benchmarks.stages.forward_stages import MASK, SILU, STORES, distances, kept
from benchmarks.stages.patching import Edit, Stage

_LOADS = "        seq_start,\n        {begin},\n        seq_len,\n        BLOCK_N,\n        SHAPE.{width}_dim,\n"


def _one_block(width: str) -> Edit:
    """Blocks begin at multiples of their size: the first block is read again and again."""
    return Edit(
        module="forward",
        old=_LOADS.format(begin="begin", width=width),
        new=_LOADS.format(begin="begin & (BLOCK_N - 1)", width=width),
    )


STAGES = (
    Stage(name="stores", edits=(STORES,), visible=False),
    Stage(name="SiLU", edits=(SILU,)),
    Stage(name="mask of the diagonal", edits=(MASK,)),
    Stage(name="fetching (one block again and again)", edits=(_one_block("qk"), _one_block("v"))),
    Stage(
        name="first product",
        edits=(
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
                module="forward",
                old="return tl.dot(weights.to(v.dtype), v, acc, input_precision=SHAPE.precision)",
                new=kept("weights.to(v.dtype)", "v.dtype") + "\n    return acc",
            ),
        ),
    ),
)
