"""Which stages are taken out at which shapes: those of floors that are missed, or were."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.attention.cases import Case, choose
from benchmarks.stages import bias_stages, forward_stages, local_stages, plain_stages, target_stages
from benchmarks.stages.patching import Stage

FORWARD, BACKWARD, CACHED = "forward", "backward", "cached"


@dataclass(frozen=True, kw_only=True)
class Study:
    """``case``: a name of `benchmarks.attention`. ``direction``: what is timed of it. ``stages``: what is taken out."""

    case: str
    direction: str
    stages: tuple[Stage, ...]

    @property
    def name(self) -> str:
        return f"{self.case} {self.direction}"

    def chosen(self) -> Case:
        return next(case for case in choose((), self.case) if case.name == self.case)


# Those of missed floors first: whoever has little time has them.
STUDIES = (
    Study(case="4x16384-prefix", direction=BACKWARD, stages=local_stages.STAGES),
    Study(case="4x16384-tail", direction=BACKWARD, stages=local_stages.SHORT),
    Study(case="16x4096-bias-both", direction=BACKWARD, stages=bias_stages.BACKWARD),
    Study(case="16x4096-bias-both", direction=FORWARD, stages=bias_stages.FORWARD),
    Study(case="32x4096-1024-candidates", direction=CACHED, stages=target_stages.STAGES),
    Study(case="16x4096x8x64-full", direction=FORWARD, stages=plain_stages.STAGES),
    Study(case="128x512x4x64-jagged", direction=BACKWARD, stages=local_stages.SHORT),
    Study(case="16x4096x4x128-full", direction=FORWARD, stages=forward_stages.STAGES),
    Study(case="32x1024x4x128-full", direction=FORWARD, stages=forward_stages.STAGES),
)
# Host time of a backward, part by part.
HOST_CASES = ("128x200x1x50-jagged", "128x200x2x25-jagged", "8x256x2x64-jagged", "1x1024x4x128-full")


def all_stages() -> dict[str, Stage]:
    """Every stage with edits, by a name that is its own."""
    return {f"{study.name}: {stage.name}": stage for study in STUDIES for stage in study.stages if stage.edits}
