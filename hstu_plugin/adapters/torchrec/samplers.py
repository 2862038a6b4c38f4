"""Stochastic length, plain or load-balanced, as a sampler of the data."""

from __future__ import annotations

from typing import Any

import torch

from hstu_plugin.adapters.torchrec.data import HistorySampler
from hstu_plugin.adapters.torchrec.options import TrainOptions
from hstu_plugin.sequence import JaggedSequence
from hstu_plugin.ultra.load_balance import LoadBalancedLength, model_load
from hstu_plugin.ultra.stochastic_length import StochasticLengthConfig, stochastic_length


class PlainStochasticLength:
    """`stochastic_length` without a memory."""

    def __init__(self, config: StochasticLengthConfig) -> None:
        self.config = config

    def __call__(self, seq: JaggedSequence, *, generator: torch.Generator | None = None) -> JaggedSequence:
        return stochastic_length(seq, self.config, generator)

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to go on from."""


def make_sampler(options: TrainOptions) -> HistorySampler | None:
    """The sampler that the options ask for; ``None`` keeps histories whole."""
    if options.stochastic_length is None:
        return None
    if options.load_balance is None:
        return PlainStochasticLength(options.stochastic_length)
    load = model_load(options.model, contextual_seq_len=len(options.schema.contextual))
    return LoadBalancedLength(options.stochastic_length, options.load_balance, load)
