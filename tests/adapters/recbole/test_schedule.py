"""The learning rate over a training."""

from __future__ import annotations

import pytest
import torch

from hstu_plugin.adapters.recbole.options import run_options
from hstu_plugin.schedule import LearningRateSchedule, follow_schedule, rate_factor

CONSTANT, COSINE = LearningRateSchedule.CONSTANT, LearningRateSchedule.COSINE


def rates(first_step: int, steps: int, schedule: LearningRateSchedule = COSINE) -> list[float]:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    follow_schedule(optimizer, schedule, learning_rate=0.5, warmup_steps=2, first_step=first_step, total_steps=10)
    seen = []
    for _ in range(steps):
        before = float(weight.detach())
        weight.grad = torch.ones(1)
        optimizer.step()
        seen.append(before - float(weight.detach()))
    return seen


def test_warmup_then_constant() -> None:
    assert rates(0, 5, CONSTANT) == pytest.approx([0.25, 0.5, 0.5, 0.5, 0.5])


def test_cosine_halves_in_the_middle_and_ends_at_zero() -> None:
    assert rate_factor(COSINE, 0, 0, 10) == 1.0
    assert rate_factor(COSINE, 5, 0, 10) == pytest.approx(0.5)
    assert rate_factor(COSINE, 10, 0, 10) == pytest.approx(0.0)
    assert rate_factor(COSINE, 99, 0, 10) == pytest.approx(0.0)


def test_a_resumed_training_goes_on_with_the_same_rates() -> None:
    assert rates(4, 6) == pytest.approx(rates(0, 10)[4:])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr_schedule": "linear"}, "^lr_schedule: expected one of constant, cosine"),
        ({"warmup_steps": -1}, "^warmup_steps"),
    ],
)
def test_bad_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_options(values)
