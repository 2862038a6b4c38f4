"""What the launches of the attention kernels share: addressable rows, descriptors, the constants of a kernel."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from hstu_kernels.attention.triton import interpreting
from hstu_kernels.attention.triton.tiles import KernelShape, Tile, float32_precision, padded_width
from hstu_kernels.triton.launcher import Panel

# Position and time table.
Tables = tuple[Tensor | None, Tensor | None]

# Offsets inside a tile are int32: 256 rows of a stride below this never overflow.
_LARGEST_STRIDE = 1 << 22
# Rows and columns are 32-bit in a descriptor.
_MOST_ROWS = 1 << 31


def addressable(x: Tensor) -> tuple[Tensor, int, int]:
    """``x [L, H, D]``, or a copy that a kernel can address, and its strides of rows and heads.

    Columns have to lie next to each other, rows not absurdly far apart.
    """
    row, head, column = x.stride()
    if column != 1 or not 0 < row < _LARGEST_STRIDE:
        x = x.contiguous()
        row, head, column = x.stride()
    return x, row, head


def in_pairs(tensors: Iterable[Tensor | None]) -> bool:
    """Whether columns 2 i and 2 i + 1 of all rows and heads of ``[L, H, D]``, of two bytes each, lie in one word."""
    return all(
        x.data_ptr() % 4 == 0 and x.stride(0) % 2 == 0 and x.stride(1) % 2 == 0 for x in tensors if x is not None
    )


def panels(tensors: tuple[Tensor, ...], rows: int) -> tuple[Panel, ...] | None:
    """Descriptors of these ``[L, H, D]`` tensors, over their rows and the columns of all heads, for blocks of ``rows``.

    ``None`` where the tensor copy engine cannot fetch them, a matter of chip and alignment.
    """
    found = []
    for x in tensors:
        count, heads, width = x.shape
        row, head, _ = x.stride()
        if row % 8 or head % 8 or x.data_ptr() % 16 or not 0 < count < _MOST_ROWS:
            return None
        if x.element_size() != 2 or width != padded_width(width):
            return None
        found.append(Panel(x, [count, (heads - 1) * head + width], [row, 1], [rows, width]))
    return tuple(found) if _has_copy_engine(tensors[0].get_device()) else None


@functools.lru_cache(maxsize=64)
def _has_copy_engine(device: int) -> bool:
    """Of a device by its index; the interpreter, on the CPU, plays one."""
    return interpreting() or torch.cuda.get_device_capability(device) >= (9, 0)


@functools.lru_cache(maxsize=64)
def same_bits(device: int) -> bool:
    """Whether query tiles of 64 and of 128 rows are known to give the same bits: on Hopper, whose products have 64."""
    return not interpreting() and torch.cuda.get_device_capability(device)[0] == 9


# Heads, Dqk, Dv, dtype, contextual rows, `KernelShape.reach` and `buckets`, precision of the products, whether Hopper.
Facts = tuple[int, int, int, torch.dtype, int, int, int, str, bool]


def facts_of(q: Tensor, v: Tensor, contextual: int, pos_table: Tensor | None, time_table: Tensor | None) -> Facts:
    """What kernels over ``q [L, H, Dqk]`` and ``v [L, H, Dv]`` are compiled for, whatever their tiles."""
    return (
        q.shape[1],
        q.shape[2],
        v.shape[2],
        q.dtype,
        contextual,
        -1 if pos_table is None else (pos_table.numel() - 1) // 2,
        -1 if time_table is None else time_table.numel() - 1,
        float32_precision(q.shape[2], v.shape[2]) if q.dtype == torch.float32 else "ieee",
        q.is_cuda and same_bits(q.get_device()),
    )


def shape_of(facts: Facts, tile: Tile, descriptors: bool, grad_stride: int = 0) -> KernelShape:
    """The constants of a kernel."""
    heads, qk_dim, v_dim, dtype, contextual, reach, buckets, precision, hopper = facts
    hopper = hopper and dtype.itemsize == 2
    return KernelShape(
        heads=heads,
        qk_dim=qk_dim,
        v_dim=v_dim,
        block_qk=padded_width(qk_dim),
        block_v=padded_width(v_dim),
        block_m=tile.block_m,
        block_n=tile.block_n,
        contextual=contextual,
        reach=reach,
        buckets=buckets,
        # The interpreter has no inline assembly, and float32 is worth the exact form.
        exact=dtype == torch.float32 or interpreting(),
        descriptors=descriptors,
        precision=precision,
        assembly=not interpreting(),
        # Products of other chips take no operand out of shared memory, or none out of registers.
        own_in_registers=tile.own_in_registers if hopper else 0,
        grad_stride=grad_stride,
        warps=tile.num_warps if hopper else 0,
    )
