"""From tensors to the launch of the gather kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hstu_kernels.int4.format import PackedRows
from hstu_kernels.int4.triton.gather import int4_gather_kernel
from hstu_kernels.int4.triton.shape import TILE, GatherShape, GatherTile, gather_shape
from hstu_kernels.triton.launcher import Variant

_UNITS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}


def triton_gather(
    table: PackedRows,
    ids: Tensor,
    *,
    item_scale: float,
    added: Sequence[tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    tile: GatherTile = TILE,
) -> Tensor:
    """Arguments and result as `hstu_kernels.int4.gather_rows`; at most two tables are added, in their order."""
    out = torch.empty(ids.shape[0], table.dim, dtype=dtype, device=table.device)
    if not out.numel():
        return out
    shape = gather_shape(table, tile)
    terms: list[Tensor | None] = []
    for dense, dense_ids in added:
        terms += [dense.contiguous(), dense_ids.contiguous()]
    terms += [None] * (4 - len(terms))
    counts = [dense.shape[0] for dense, _ in added] + [0] * (2 - len(added))
    # A product with 1 changes nothing.
    kernel = _variant(shape, tile, item_scale != 1)
    kernel(
        -(-ids.shape[0] * shape.code_units // shape.block_units),
        (table.data.view(_UNITS[shape.unit_bytes]), ids.contiguous(), *terms, out),
        (ids.shape[0], table.num_rows, *counts, float(item_scale)),
    )
    return out


@functools.lru_cache(maxsize=256)
def _variant(shape: GatherShape, tile: GatherTile, scaled: bool) -> Variant:
    return Variant(int4_gather_kernel, SHAPE=shape, SCALED=scaled, **tile.launch_options)
