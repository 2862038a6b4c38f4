"""The baseline that every comparison needs: rank all items by how often they occur in training."""

from __future__ import annotations

from typing import Any

import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor


class PopularitySequential(SequentialRecommender):  # type: ignore[misc]
    """Popularity on the rows of the sequential protocol, so that it ranks exactly what sequential models rank.

    RecBole's ``Pop`` is a general model: it is split before rows are formed and masks the user's history.
    This one counts the training interactions: each row's target and, in a user's first row, the one item before it.
    ``MAX_ITEM_LIST_LENGTH`` must be at least 2, so that a first row can be told from a cut one.
    """

    input_type = InputType.POINTWISE

    def __init__(self, config: Any, dataset: Any) -> None:
        """Count; ``dataset`` holds RecBole's training rows, one for each target (prefix augmentation).

        Raises:
            ValueError: ``MAX_ITEM_LIST_LENGTH`` below 2.
        """
        super().__init__(config, dataset)
        if self.max_seq_length < 2:
            raise ValueError(f"MAX_ITEM_LIST_LENGTH: expected at least 2, got {self.max_seq_length}")
        rows = dataset.inter_feat
        first = rows[self.ITEM_SEQ_LEN] == 1
        counted = torch.cat([rows[self.ITEM_ID], rows[self.ITEM_SEQ][first][:, 0]])
        self.register_buffer("counts", torch.bincount(counted, minlength=self.n_items).float())
        # RecBole's trainer wants something to optimise.
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Zero: there is nothing to learn."""
        return self.unused.sum() * 0.0

    def predict(self, interaction: Any) -> Tensor:
        """Scores of the given items, ``[B]``."""
        scores: Tensor = self.counts[interaction[self.ITEM_ID]]
        return scores

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores of all items, ``[B, n_items]``."""
        scores: Tensor = self.counts.expand(len(interaction[self.ITEM_SEQ_LEN]), -1).clone()
        return scores
