"""From tensors to the launches of the kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hstu_kernels.int4.format import PackedRows
from hstu_kernels.int4.triton.distinct import distinct_rows_kernel
from hstu_kernels.int4.triton.gather import int4_gather_kernel
from hstu_kernels.int4.triton.shape import (
    READ,
    TILE,
    GatherShape,
    GatherTile,
    ReadShape,
    ReadTile,
    gather_shape,
    is_narrow,
    read_shape,
)
from hstu_kernels.triton.launcher import Variant

_UNITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


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
    kernel = _variant(shape, tile, item_scale != 1, is_narrow(shape, [out, *(dense for dense, _ in added)]))
    kernel(
        -(-ids.shape[0] * shape.code_units // shape.block_units),
        (table.data.view(_UNITS[shape.unit_bytes]), ids.contiguous(), *terms, out),
        (ids.shape[0], table.num_rows, *counts, float(item_scale)),
    )
    return out


def triton_read_rows(data: Tensor, ids: Tensor, chosen: Tensor, count: Tensor, *, tile: ReadTile = READ) -> Tensor:
    """Arguments and result as `hstu_kernels.int4.distinct.read_host_rows`."""
    out = torch.empty(ids.shape[0], data.shape[1], dtype=torch.uint8, device=ids.device)
    if not out.numel():
        return out
    shape = read_shape(data, tile)
    tiles = -(-ids.shape[0] * shape.row_units // shape.block_units)
    unit = _UNITS[shape.unit_bytes]
    # The output first: it says on which device to run, which the pinned rows do not.
    arrays = (out.view(unit), data.view(unit), ids.contiguous(), chosen.contiguous(), count)
    _read_variant(shape, tile)(min(tile.programs, tiles), arrays, (ids.shape[0], tiles))
    return out


@functools.lru_cache(maxsize=64)
def _read_variant(shape: ReadShape, tile: ReadTile) -> Variant:
    return Variant(distinct_rows_kernel, SHAPE=shape, num_warps=tile.warps)


@functools.lru_cache(maxsize=256)
def _variant(shape: GatherShape, tile: GatherTile, scaled: bool, narrow: bool) -> Variant:
    return Variant(int4_gather_kernel, SHAPE=shape, SCALED=scaled, **tile.launch_options(narrow=narrow))
