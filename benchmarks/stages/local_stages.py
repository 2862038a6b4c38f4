"""Stages of a backward without a bias: both kernels at once, or each alone."""

from benchmarks.stages.forward_stages import NOWHERE, STORES, distances, kept
from benchmarks.stages.patching import Edit, Stage

_QUERIES, _KEYS = "backward_queries", "backward_keys"
_ROWS_FIRST, _KEYS_FIRST = distances("rows", "cols"), distances("cols", "rows")
_PIECES = Edit(
    module="primitives",
    old="tl.store(partial_ptr + place + inside, tile)",
    new=f"tl.store(partial_ptr + place + inside, tile, mask=inside < seq_len - {NOWHERE})",
)
# Those that stay in registers; numbers in their place that the compiler does not know.
_OWN = Edit(
    module="primitives",
    old="mov.b32 x, 0;\n            @p ld.global.nc.b32 x, [a];",
    new="mov.b32 x, 0x3f803f80;",
)


def _product(module: str, left: str, right: str, more: str, new: str) -> Edit:
    return Edit(module=module, old=f"tl.dot({left}, {right}{more}, input_precision=SHAPE.precision)", new=new)


STAGES = (
    Stage(name="dq", needed=(True, False, False, False, False), alone=True, visible=False),
    Stage(name="dk and dv", needed=(False, True, True, False, False), alone=True, visible=False),
    Stage(
        name="dq: mask of edge blocks",
        edits=(Edit(module=_QUERIES, old="    if edge:\n        slope", new="    if False:\n        slope"),),
    ),
    Stage(
        name="dk and dv: mask of edge blocks",
        edits=(Edit(module=_KEYS, old="    if edge:\n        seen", new="    if False:\n        seen"),),
    ),
    Stage(name="stores", edits=(STORES, _PIECES), visible=False),
    Stage(name="fetching of own operands", edits=(_OWN,)),
    Stage(
        name="SiLU and slope",
        edits=(Edit(module="primitives", old="return value, gate + value * (1.0 - gate)", new="return x, x"),),
    ),
    Stage(
        name="dq: product of logits",
        edits=(_product(_QUERIES, "q", "tl.trans(k)", ", rab", f"(rab + {_ROWS_FIRST})"),),
    ),
    Stage(
        name="dk and dv: product of logits",
        edits=(_product(_KEYS, "k", "tl.trans(q)", ", rab", f"(rab + {_KEYS_FIRST})"),),
    ),
    Stage(name="dq: product of slopes", edits=(_product(_QUERIES, "dout", "tl.trans(v)", "", _ROWS_FIRST),)),
    Stage(name="dk and dv: product of slopes", edits=(_product(_KEYS, "v", "tl.trans(dout)", "", _KEYS_FIRST),)),
    Stage(
        name="dq: product of the result",
        edits=(
            Edit(
                module=_QUERIES,
                old="acc = tl.dot(slope.to(k.dtype), k, acc, input_precision=SHAPE.precision)",
                new=kept("slope.to(k.dtype)", "k.dtype"),
            ),
        ),
    ),
    Stage(
        name="dk and dv: products of results",
        edits=(
            Edit(
                module=_KEYS,
                old="dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=SHAPE.precision)",
                new=kept("weights.to(dout.dtype)", "dout.dtype"),
            ),
            Edit(
                module=_KEYS,
                old="dk = tl.dot(slope.to(q.dtype), q, dk, input_precision=SHAPE.precision)",
                new=kept("slope.to(q.dtype)", "q.dtype"),
            ),
        ),
    ),
)
# Both kernels alone, and what does not depend on the products.
SHORT = tuple(stage for stage in STAGES if "product" not in stage.name)
