"""Losses that do not depend on how a global batch is cut into ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def global_mean(loss: Tensor, rows: Tensor) -> Tensor:
    """Means over a rank's rows, weighted so that their mean over the ranks is the mean over the rows of all ranks.

    Args:
        loss: scalar or ``[K]`` means. rows: int64 of the same shape, how many rows each is the mean of.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return loss
    total = rows.clone()
    dist.all_reduce(total)
    return loss * (rows * dist.get_world_size() / total.clamp(min=1))
