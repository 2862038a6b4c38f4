"""Stages of forward and backward with a relative bias: look-ups of both tables, and the gradients of both."""

from benchmarks.stages.forward_stages import MASK, SILU, STORES
from benchmarks.stages.patching import Edit, Stage

_POSITIONS = Edit(
    module="rab",
    old="    if SHAPE.reach >= 0:\n        rab += _positions_of_block(",
    new="    if False:\n        rab += _positions_of_block(",
)
# Every block as one that spans one bucket: its span is still read, and its bucket still worked out.
_TIMES = Edit(
    module="rab",
    old="        if more == 0:\n            rab = tl.broadcast_to(",
    new="        if True:\n            rab = tl.broadcast_to(",
)
_POSITION_GRADIENT = Edit(
    module="backward_queries",
    old="    if pos_sums_ptr is not None:\n        add_positions(",
    new="    if False:\n        add_positions(",
)
_TIME_GRADIENT = Edit(
    module="backward_queries",
    old="    if ENTRIES > 0:\n        time_sums = add_times(",
    new="    if False:\n        time_sums = add_times(",
)
_LOOK_UPS = (
    Stage(name="position look-ups", edits=(_POSITIONS,)),
    Stage(name="time look-ups of a logit", edits=(_TIMES,)),
    Stage(name="both look-ups", edits=(_POSITIONS, _TIMES)),
)
FORWARD = (
    *_LOOK_UPS,
    Stage(name="SiLU", edits=(SILU,)),
    Stage(name="mask of the diagonal", edits=(MASK,)),
    Stage(name="stores", edits=(STORES,), visible=False),
)
BACKWARD = (
    *_LOOK_UPS,
    Stage(name="position gradient", edits=(_POSITION_GRADIENT,)),
    Stage(name="time gradient", edits=(_TIME_GRADIENT,)),
    Stage(name="both gradients of tables", edits=(_POSITION_GRADIENT, _TIME_GRADIENT)),
    Stage(name="gradients of tables with their sums", needed=(True, True, True, False, False), visible=False),
    Stage(name="dq and tables", needed=(True, False, False, True, True), alone=True, visible=False),
    Stage(name="dq", needed=(True, False, False, False, False), alone=True, visible=False),
    Stage(name="dk and dv", needed=(False, True, True, False, False), alone=True, visible=False),
)
