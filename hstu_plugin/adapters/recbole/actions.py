"""What users did at an event (a rating, say) as part of its token: levels of a numerical column, each with a vector.

Nothing of it can leak: a row predicts the event behind it, and holds the actions up to its own event; the action of the
event that is predicted is never looked at.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

AUTO = "auto"
_INIT_STD = 0.02
# Stands for a missing value: RecBole would put the column's mean in the place of NaN.
UNKNOWN = float("-inf")


def find_action_field(config: Any, path: str) -> str | None:
    """The action column of an interaction file: none, the one of ``RATING_FIELD`` if the file has it, or the one named.

    Raises:
        ValueError: ``action_field`` names a column that the file lacks, or one that holds no numbers.
    """
    wanted = config["action_field"]
    if wanted is None or not os.path.isfile(path):
        return None
    with open(path, encoding=config["encoding"]) as file:
        header = file.readline().rstrip("\r\n")
    types = dict(column.split(":", 1) for column in header.split(config["field_separator"]) if ":" in column)
    name = config["RATING_FIELD"] if wanted == AUTO else wanted
    if wanted == AUTO and types.get(name) != "float":
        return None
    if types.get(name) != "float":
        raise ValueError(
            f"action_field: expected a numerical column of {path}, such as `{name}:float`, or `auto` for RATING_FIELD "
            f"where there is one, or nothing; got {name!r}, and the file has {header!r}"
        )
    return str(name)


def level_boundaries(values: Tensor, max_levels: int) -> Tensor:
    """Rising numbers that cut ``values`` into levels: one for each different value, or ``max_levels`` by quantiles.

    Args:
        values: finite numbers of the training rows, any shape.
    """
    different: Tensor = torch.unique(values.double())
    if different.numel() > max_levels:
        shares = torch.arange(1, max_levels, dtype=torch.float64) / max_levels
        places = (shares * values.numel()).long()
        cuts: Tensor = torch.unique(values.double().flatten().sort().values[places])
        return cuts
    # Between neighbours, so that rounding to another precision moves no value across.
    return (different[1:] + different[:-1]) / 2


class ActionEmbedding(nn.Module):
    """``[...]`` numbers to ``[..., D]``: the vector of the number's level, zeros where it is unknown."""

    boundaries: Tensor

    def __init__(self, values: Tensor, max_levels: int, width: int) -> None:
        super().__init__()
        # A buffer: with the weights, so that a loaded model cuts as it was trained.
        self.register_buffer("boundaries", level_boundaries(values[torch.isfinite(values)], max_levels))
        self.table = nn.Embedding(self.boundaries.numel() + 2, width, padding_idx=0)
        nn.init.trunc_normal_(self.table.weight, std=_INIT_STD)
        with torch.no_grad():
            self.table.weight[0].zero_()

    def levels(self, numbers: Tensor) -> Tensor:
        """Int64 levels from 1; 0 for unknown."""
        found = torch.bucketize(numbers.double(), self.boundaries, right=True) + 1
        return found.masked_fill(~torch.isfinite(numbers), 0)

    def forward(self, levels: Tensor) -> Tensor:
        """Vectors of `levels`."""
        vectors: Tensor = self.table(levels)
        return vectors


def training_values(dataset: Any, field: str) -> Tensor:
    """All actions in the histories of the training rows; each event of a user once or more."""
    rows = dataset.inter_feat
    lists, lengths = rows[f"{field}{dataset.config['LIST_SUFFIX']}"], rows[dataset.item_list_length_field]
    real = torch.arange(lists.shape[1]) < torch.as_tensor(lengths)[:, None]
    return torch.as_tensor(lists)[real]
