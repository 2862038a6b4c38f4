"""The embedding tables of several categorical features as one parameter: one gather and one scatter for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hstu_plugin.ranking_config import Categorical

_INIT_STD = 0.02


class FeatureTables(nn.Module):
    """``ids [R, features]`` to ``[R, features, D]``; the features' rows stand one table behind the other.

    Row 0 of each table stands for what is unknown and starts at zero, as training often never sees it.
    """

    def __init__(self, features: Sequence[Categorical], width: int) -> None:
        super().__init__()
        self.names = tuple(feature.name for feature in features)
        self.sizes = tuple(feature.num_ids for feature in features)
        # A module of its own, so that `hstu_plugin.quantize` can put packed rows in its place.
        self.rows = nn.Embedding(sum(self.sizes), width) if features else None
        self.width = width
        sizes = torch.tensor(self.sizes, dtype=torch.int64)
        # Follow from the sizes, so a checkpoint does not need them.
        self.register_buffer("limits", sizes, persistent=False)
        self.register_buffer("starts", sizes.cumsum(0) - sizes, persistent=False)
        self.limits: Tensor
        self.starts: Tensor
        if self.rows is not None:
            nn.init.trunc_normal_(self.rows.weight, std=_INIT_STD)
            with torch.no_grad():
                self.rows.weight[self.starts] = 0.0

    def __len__(self) -> int:
        return len(self.sizes)

    def table(self, feature: int) -> Tensor:
        """``[num_ids, D]``, the rows of one feature; a view."""
        assert self.rows is not None
        start = sum(self.sizes[:feature])
        return self.rows.weight[start : start + self.sizes[feature]]

    def forward(self, ids: Tensor) -> Tensor:
        """``[R, features, D]``.

        Args:
            ids: ``[R, features]`` int64, each in ``[0, num_ids)`` of its feature.

        Raises:
            IndexError: an id is outside its table. On a GPU the program ends with a device assertion, as
                ``nn.Embedding`` does, so that no device is asked.
        """
        rows = self.places(ids)
        if self.rows is None:
            return torch.zeros(ids.shape[0], 0, self.width, device=ids.device)
        found: Tensor = self.rows(rows)
        return found

    def places(self, ids: Tensor) -> Tensor:
        """``[R, features]`` rows of the joint table; arguments and errors of `forward`, on any device."""
        if ids.dim() != 2 or ids.shape[1] != len(self):
            raise ValueError(f"ids: expected [R, {len(self)}] for {', '.join(self.names)}, got {tuple(ids.shape)}")
        limits, starts = self.limits, self.starts
        if ids.device != limits.device:
            # Ids that wait on the CPU for a model on a GPU: made anew, as reading the GPU would wait for it.
            limits = torch.tensor(self.sizes, dtype=torch.int64, device=ids.device)
            starts = limits.cumsum(0) - limits
        self._check(ids, limits)
        return ids + starts

    def one(self, feature: int, ids: Tensor) -> Tensor:
        """``[R, D]`` of one feature alone; ``ids [R]`` int64."""
        assert self.rows is not None
        found: Tensor = self.rows(ids + sum(self.sizes[:feature]))
        return found

    def _check(self, ids: Tensor, limits: Tensor) -> None:
        # An id beyond its own table would silently read the next feature's.
        if torch.compiler.is_compiling():
            return
        inside = (ids >= 0) & (ids < limits)
        if ids.is_cuda:
            torch._assert_async(inside.all())
        elif not bool(inside.all()):
            place = int((~inside).any(0).nonzero()[0])
            own = ids[:, place]
            raise IndexError(
                f"{self.names[place]}: expected ids in [0, {self.sizes[place]}), "
                f"got {int(own.min())} to {int(own.max())}"
            )
