"""Dropping of ids in training: a feature's id becomes unknown, so that a model does not lean on rows it saw once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hstu_plugin.ranking_config import Categorical, RankingFeatures
from hstu_plugin.ranking_model import RankingBatch


class IdDropout:
    """Replaces ids by 0, unknown, independently for each window (user features) or event (item features).

    It also trains the rows of what is unknown, which new users and items have in use.
    """

    def __init__(self, features: RankingFeatures, rates: Mapping[str, float]) -> None:
        """``rates``: probability in ``[0, 1]`` by name of an item or user feature.

        Raises:
            ValueError: a name is none of these features', or a rate is no probability.
        """
        known = [feature.name for feature in (*features.items, *features.users)]
        for name, rate in rates.items():
            if name not in known:
                raise ValueError(f"id_dropout: expected item or user features ({', '.join(known)}), got {name!r}")
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
                raise ValueError(f"id_dropout.{name}: expected a probability, got {rate!r}")
        self._items = _columns(features.items, rates)
        self._users = _columns(features.users, rates)

    def __call__(self, batch: RankingBatch) -> RankingBatch:
        """The batch with ids dropped; its tensors stay as they are."""
        users = _dropped(batch.users, self._users)
        history = replace(batch.history, items=_dropped(batch.history.items, self._items))
        candidates = replace(batch.candidates, items=_dropped(batch.candidates.items, self._items))
        return replace(batch, history=history, candidates=candidates, users=users)


def _columns(features: Sequence[Categorical], rates: Mapping[str, float]) -> list[tuple[int, float]]:
    return [(place, rates[own.name]) for place, own in enumerate(features) if rates.get(own.name, 0) > 0]


def _dropped(ids: Tensor, columns: Sequence[tuple[int, float]]) -> Tensor:
    if not columns:
        return ids
    ids = ids.clone()
    for place, rate in columns:
        ids[:, place].masked_fill_(torch.rand(ids.shape[0], device=ids.device) < rate, 0)
    return ids
