"""Learning rates over a training: linear warm-up, then constant or a cosine down to zero."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any

from torch.optim import Optimizer


class LearningRateSchedule(StrEnum):
    """Course of the learning rate after the warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"


def rate_factor(schedule: LearningRateSchedule, step: int, warmup_steps: int, total_steps: int) -> float:
    """What the learning rate of optimiser step ``step`` (from 0) of ``total_steps`` is multiplied by, in (0, 1]."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule is LearningRateSchedule.CONSTANT:
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def follow_schedule(
    optimizer: Optimizer,
    schedule: LearningRateSchedule,
    *,
    learning_rate: float,
    warmup_steps: int,
    first_step: int,
    total_steps: int,
) -> None:
    """Set the learning rate before each step of ``optimizer`` from now on, beginning with step ``first_step``.

    The rate follows from the number of the step alone, so a resumed training needs nothing but that number.
    """
    step = first_step

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate_factor(schedule, step, warmup_steps, total_steps)
        step += 1

    optimizer.register_step_pre_hook(before)
