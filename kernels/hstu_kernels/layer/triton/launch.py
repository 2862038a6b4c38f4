"""From tensors to launches."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hstu_kernels.gated_norm.triton.launch import tile
from hstu_kernels.layer.triton.kernels import narrow_kernel
from hstu_kernels.triton.launcher import Variant

# Lines of partial sums: a few programs for each multiprocessor of a large chip.
_MOST_PROGRAMS = 512


def narrow(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x [L, W]`` in ``dtype``, contiguous, and its column sums ``[W]`` in float32."""
    x = x.contiguous()
    rows, width = x.shape
    block_r, block_w, warps = tile(width)
    programs = max(1, min(_MOST_PROGRAMS, -(-rows // block_r)))
    out = torch.empty(rows, width, dtype=dtype, device=x.device)
    sums = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _variant(width, block_r, block_w, warps)(programs, (x, out, sums), (rows,))
    return out, sums.sum(0)


@functools.lru_cache(maxsize=256)
def _variant(width: int, block_r: int, block_w: int, warps: int) -> Variant:
    return Variant(narrow_kernel, WIDTH=width, BLOCK_R=block_r, BLOCK_W=block_w, num_warps=warps)
