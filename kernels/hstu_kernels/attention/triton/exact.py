"""Sums whose bits repeat: in fixed point, where the order of the terms does not matter."""

from __future__ import annotations

import torch
from torch import Tensor

# Integers beneath 2^62 leave a bit for the rounding of the terms.
_BITS = 62
# Above the largest slope of SiLU, 1.0998, in any precision.
_STEEPEST = 1.125
# Exponents of float32 that are not subnormal.
_LARGEST_EXPONENT = 126


def fixed_point(grad: Tensor, v: Tensor, seq_offsets: Tensor) -> Tensor:
    """``[1]`` float32, a power of two: so many times the sums of a position table's gradient fit into int64.

    ``|G_ij| <= 1.125 Dv max|dout| max|v|``, and an entry adds up at most all pairs of rows of each sequence, of all
    heads. NaN where a bound is not finite. No number of the launch geometry goes in; nothing waits for the device.

    Args:
        grad: ``dout [L, H, Dv]``. v: ``[L, H, Dv]``. seq_offsets: ``[B + 1]``.
    """
    if not grad.numel():
        return torch.ones(1, dtype=torch.float32, device=grad.device)
    # Not the rows' norms: squares of small numbers would vanish.
    largest = [torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32).double() for x in (grad, v)]
    pairs = seq_offsets.diff().double().square().sum() * grad.shape[1]
    bound = largest[0] * largest[1] * pairs * (v.shape[2] * _STEEPEST)
    _, exponent = torch.frexp(bound)
    # bound < 2^exponent
    shift = (_BITS - exponent).clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    factor = torch.ldexp(torch.ones_like(bound), shift)
    return torch.where(bound.isfinite(), factor, torch.nan).to(torch.float32).reshape(1)
