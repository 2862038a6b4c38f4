"""Which scale and bias a row gets: from its minimum and maximum, or those that lose least."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

# Shares of the range cut off at both ends where a search starts, and steps from each start.
_STARTS = (0.0, 0.04, 0.08, 0.14, 0.22)
_STEPS = 6


class RowRange(StrEnum):
    """``MIN_MAX``: the row's own range, FBGEMM's rule. ``SEARCH``: the range of least squared error that is found.

    The search alternates: codes for a given scale and bias, then the least-squares scale and bias for these codes, from
    several starting ranges. What it returns is judged with scale and bias as float16, and is never worse than
    ``MIN_MAX``.
    """

    MIN_MAX = "min_max"
    SEARCH = "search"

    @classmethod
    def parse(cls, value: RowRange | str) -> RowRange:
        """The rule of that name.

        Raises:
            ValueError: there is none.
        """
        try:
            return cls(value)
        except ValueError:
            raise ValueError(f"ranges: expected one of {', '.join(cls)}, got {value!r}") from None

    def scale_and_bias(self, rows: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        """float16 scale and bias ``[rows, 1]`` of float32 rows ``[rows, D]``; infinite where float16 is too small."""
        scale, bias = _min_max(rows, levels)
        return (scale, bias) if self is RowRange.MIN_MAX else _search(rows, scale, bias, levels)


def _min_max(rows: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(rows, dim=1, keepdim=True)
    bias = low.to(torch.float16)
    # FBGEMM measures from the rounded minimum, so that the range of a constant row may even be negative.
    reach = high - bias.float()
    scale = torch.where(reach == 0, 1.0, reach / levels).to(torch.float16)
    return torch.where(scale == 0, 1.0, scale).to(torch.float16), bias


def _search(rows: Tensor, scale: Tensor, bias: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    best_error = _error(rows, scale, bias, levels)
    best_scale, best_bias = scale, bias
    low, high = torch.aminmax(rows, dim=1, keepdim=True)
    mean = rows.mean(1, keepdim=True)
    for cut in _STARTS:
        some_bias = low + cut * (high - low)
        some_scale = (high - low) * (1 - 2 * cut) / levels
        for _ in range(_STEPS):
            half_scale, half_bias = some_scale.to(torch.float16), some_bias.to(torch.float16)
            error = _error(rows, half_scale, half_bias, levels)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, half_scale, best_scale)
            best_bias = torch.where(better, half_bias, best_bias)
            codes = integer_codes(rows, some_scale, some_bias, levels)
            centred = codes - codes.mean(1, keepdim=True)
            spread = centred.square().sum(1, keepdim=True)
            slope = (centred * (rows - mean)).sum(1, keepdim=True) / spread
            # Codes that are all alike determine no slope.
            some_scale = torch.where(spread > 0, slope, some_scale)
            some_bias = mean - some_scale * codes.mean(1, keepdim=True)
    return best_scale, best_bias


def integer_codes(rows: Tensor, scale: Tensor, bias: Tensor, levels: int) -> Tensor:
    """Codes ``[rows, D]``, as float32, of float32 rows under scale and bias ``[rows, 1]``; halves become even."""
    return ((rows - bias) * (1.0 / scale)).round_().clamp_(0, levels)


def _error(rows: Tensor, scale: Tensor, bias: Tensor, levels: int) -> Tensor:
    """Squared error ``[rows, 1]``; infinite where scale and bias cannot be used."""
    scale, bias = scale.float(), bias.float()
    error = (integer_codes(rows, scale, bias, levels) * scale + bias - rows).square().sum(1, keepdim=True)
    usable = torch.isfinite(error) & torch.isfinite(scale) & torch.isfinite(bias) & (scale != 0)
    return torch.where(usable, error, torch.inf)
