"""Stochastic length: how often, how long, and which events stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hstu_kernels import JaggedLayout
from hstu_plugin.sequence import JaggedSequence
from hstu_plugin.ultra.stochastic_length import (
    Sampling,
    StochasticLengthConfig,
    draw_lengths,
    shorten,
    stochastic_length,
)

# Rows, targets and two contextual rows of each: histories of 30, 0, 3, 0 (context alone) and 10 events.
LENGTHS, TARGETS, CONTEXT, EVENTS = (34, 0, 5, 3, 12), (2, 0, 0, 1, 0), 2, (30, 0, 3, 0, 10)
any_sampling = pytest.mark.parametrize("sampling", list(Sampling), ids=str)


def make_batch() -> JaggedSequence:
    layout = JaggedLayout.from_lengths(
        torch.tensor(LENGTHS), num_targets=torch.tensor(TARGETS), contextual_seq_len=CONTEXT
    )
    rows = torch.arange(sum(LENGTHS))
    return JaggedSequence(rows, layout, 1_600_000_000 + rows)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_threshold_is_the_power_of_n() -> None:
    assert StochasticLengthConfig(alpha=1.6, max_seq_len=200).threshold == int(200**0.8) == 69
    assert StochasticLengthConfig(alpha=2, max_seq_len=200).threshold == 200
    assert StochasticLengthConfig(alpha=1.5, max_seq_len=16).threshold == 8


def test_short_histories_stay_and_long_ones_stay_as_often_as_said() -> None:
    config = StochasticLengthConfig(alpha=1.6, max_seq_len=100)
    threshold = config.threshold
    assert threshold == 39
    events = torch.tensor([0, 1, 39]).repeat(100)
    assert torch.equal(draw_lengths(events, config, generator()), events)
    for length in (40, 60, 100):
        kept = draw_lengths(torch.full((40_000,), length), config, generator(length))
        assert set(kept.unique().tolist()) == {threshold, length}
        expected = min(1.0, 100**1.6 / length**2)
        # Four standard deviations of 40,000 draws.
        assert float((kept == length).double().mean()) == pytest.approx(expected, abs=0.01)


def test_alpha_two_shortens_nothing() -> None:
    config = StochasticLengthConfig(alpha=2, max_seq_len=30)
    seq = make_batch()
    assert torch.equal(stochastic_length(seq, config, generator()).values, seq.values)


@any_sampling
def test_the_kept_number_stays_in_order_with_context_and_targets(sampling: Sampling) -> None:
    config = StochasticLengthConfig(sampling=sampling)
    seq = make_batch()
    kept = torch.tensor([7, 5, 9, 0, 4])
    got = shorten(seq, kept, config, generator())
    events = [7, 0, 3, 0, 4]
    expected = [e + min(CONTEXT, n) + t for e, n, t in zip(events, LENGTHS, TARGETS, strict=True)]
    assert got.layout.seq_lengths.tolist() == expected
    assert got.layout.num_targets is not None and got.layout.num_targets.tolist() == list(TARGETS)
    assert got.layout.contextual_seq_len == CONTEXT
    assert bool((got.values.diff() > 0).all())
    assert got.timestamps is not None
    assert torch.equal(got.timestamps, 1_600_000_000 + got.values)
    ids = seq.layout.sequence_ids(sum(LENGTHS))
    assert torch.equal(ids[got.values], got.layout.sequence_ids(got.values.numel()))
    assert {0, 1, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43} <= set(got.values.tolist())


def test_recent_keeps_the_latest() -> None:
    got = shorten(make_batch(), torch.tensor([3, 0, 1, 0, 10]), StochasticLengthConfig())
    assert got.values.tolist() == [0, 1, 29, 30, 31, 32, 33, 34, 35, 38, 39, 40, 41, *range(42, 54)]


def frequencies(sampling: Sampling, **options: Any) -> torch.Tensor:
    """How often each of 10 events is among the 4 kept ones."""
    users = 20_000
    layout = JaggedLayout.from_lengths(torch.full((users,), 10))
    seq = JaggedSequence(torch.arange(10).repeat(users), layout)
    config = StochasticLengthConfig(sampling=sampling, **options)
    got = shorten(seq, torch.full((users,), 4), config, generator())
    return torch.bincount(got.values, minlength=10) / users


def test_random_keeps_all_alike() -> None:
    # Five standard deviations of 20,000 draws.
    assert torch.allclose(frequencies(Sampling.RANDOM), torch.full((10,), 0.4), atol=0.018)


def test_recency_weighted_prefers_later_events() -> None:
    shares = frequencies(Sampling.RECENCY_WEIGHTED)
    assert bool((shares.diff() > 0).all())
    assert float(shares[0]) > 0.02
    steeper = frequencies(Sampling.RECENCY_WEIGHTED, recency_power=3.0)
    assert float(steeper[0]) < float(shares[0]) and float(steeper[9]) > float(shares[9])


def test_recency_weights_are_those_of_one_draw() -> None:
    users = 40_000
    seq = JaggedSequence(torch.arange(4).repeat(users), JaggedLayout.from_lengths(torch.full((users,), 4)))
    config = StochasticLengthConfig(sampling=Sampling.RECENCY_WEIGHTED, recency_power=2.0)
    got = shorten(seq, torch.ones(users, dtype=torch.int64), config, generator())
    expected = torch.tensor([1.0, 4.0, 9.0, 16.0]) / 30
    assert torch.allclose(torch.bincount(got.values, minlength=4) / users, expected, atol=0.0125)


@any_sampling
def test_one_seed_one_result(sampling: Sampling) -> None:
    config = StochasticLengthConfig(sampling=sampling, max_seq_len=12, alpha=1.2)
    seq = make_batch()
    first, second = (stochastic_length(seq, config, generator(5)).values for _ in range(2))
    assert torch.equal(first, second)
    assert any(not torch.equal(stochastic_length(seq, config, generator(s)).values, first) for s in range(20))


@any_sampling
def test_empty_batches(sampling: Sampling) -> None:
    config = StochasticLengthConfig(sampling=sampling)
    for lengths in ([], [0, 0]):
        layout = JaggedLayout.from_lengths(torch.tensor(lengths, dtype=torch.int64))
        got = stochastic_length(JaggedSequence(torch.zeros(0, 3), layout), config)
        assert got.values.shape == (0, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1}, r"^alpha: expected a number in \(1, 2\], got 1"),
        ({"alpha": 2.1}, "^alpha: "),
        ({"sampling": "oldest"}, "^sampling: expected one of recent, random, recency_weighted"),
        ({"max_seq_len": 0}, "^max_seq_len: "),
        ({"recency_power": 0}, "^recency_power: "),
    ],
)
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StochasticLengthConfig(**options)


def test_kept_of_another_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^kept: expected \[5\], got \(2,\)"):
        shorten(make_batch(), torch.tensor([1, 2]), StochasticLengthConfig())
