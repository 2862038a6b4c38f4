"""Launches of the product with its epilogue, where the copy engine can fetch the operands."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_kernels.attention.triton import interpreting
from hstu_kernels.projection.triton.product import product_kernel
from hstu_kernels.triton.launcher import Panel, Variant

_MOST_ROWS = 1 << 31


@dataclass(frozen=True, slots=True)
class ProductTile:
    """Rows, columns and depth of a tile, warps, and depth of the pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Of the projection with SiLU, and of the output with the sum: of ten the fastest on an H200.
SILU_TILE = ProductTile(128, 128, 64, 8, 3)
SUM_TILE = ProductTile(64, 128, 64, 4, 4)


def serves(a: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can multiply these: half precision, contiguous, 16-byte rows, a device with a copy engine."""
    return (
        a.dtype == weight.dtype
        and a.element_size() == 2
        and a.is_contiguous()
        and weight.is_contiguous()
        and a.shape[1] % 8 == 0
        and 0 < a.shape[0] < _MOST_ROWS
        and (a.data_ptr() | weight.data_ptr()) % 16 == 0
        and _has_copy_engine(a.get_device())
    )


def linear_silu(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activated: int,
    *,
    keep_mixed: bool,
    tile: ProductTile = SILU_TILE,
) -> tuple[Tensor | None, Tensor]:
    """``a @ weight.T + bias``, if it is to be kept, and SiLU of its first ``activated`` columns."""
    shape = (a.shape[0], weight.shape[0])
    out = torch.empty(shape, dtype=a.dtype, device=a.device)
    mixed = torch.empty_like(out) if keep_mixed else None
    _launch(out, mixed, bias, None, a, weight, activated, tile)
    return mixed, out


def linear_sum(
    residual: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, *, tile: ProductTile = SUM_TILE
) -> Tensor:
    """``residual + a @ weight.T + bias`` in the wider dtype of ``residual`` and ``a``."""
    dtype = torch.promote_types(residual.dtype, a.dtype)
    out = torch.empty(residual.shape, dtype=dtype, device=a.device)
    _launch(out, None, bias, residual.contiguous(), a, weight, 0, tile)
    return out


def _launch(
    out: Tensor,
    before: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    a: Tensor,
    weight: Tensor,
    activated: int,
    tile: ProductTile,
) -> None:
    (rows, depth), columns = a.shape, weight.shape[0]
    operands = [
        Panel(x, list(x.shape), [depth, 1], [block, tile.depth])
        for x, block in ((a, tile.rows), (weight, tile.columns))
    ]
    programs = -(-rows // tile.rows) * -(-columns // tile.columns)
    _variant(columns, depth, activated, tile)(programs, (out, before, bias, residual, *operands), (rows,))


@functools.lru_cache(maxsize=64)
def _has_copy_engine(device: int) -> bool:
    """Of a device by its index; the interpreter, on the CPU, plays one."""
    return interpreting() or torch.cuda.get_device_capability(device) >= (9, 0)


@functools.lru_cache(maxsize=256)
def _variant(columns: int, depth: int, activated: int, tile: ProductTile) -> Variant:
    return Variant(
        product_kernel,
        COLUMNS=columns,
        DEPTH=depth,
        ACTIVATED=activated,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
