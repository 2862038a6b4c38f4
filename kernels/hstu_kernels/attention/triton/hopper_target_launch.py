"""When cached scoring takes the kernel that is for Hopper alone, and its launch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hstu_kernels.attention.triton.arguments import same_bits
from hstu_kernels.attention.triton.hopper_launch import (
    BLOCK_M,
    GROUP_ROWS,
    MOST_COLUMNS,
    available,
    descriptors,
    multiprocessors,
)
from hstu_kernels.attention.triton.target_sums import FIELDS, hstu_target_list_kernel
from hstu_kernels.layout import JaggedLayout
from hstu_kernels.mask import AttentionMask
from hstu_kernels.triton.launcher import Argument, Panel, Ready, Variant, is_current

WIDTH = 128
# Keys of a block, as many as a tile has targets, whose own keys are one; and slots of the rings.
BLOCK_N, STAGES = 128, 2
# Of a history: more than any has.
_ALL_BLOCKS = 1 << 30
_MOST_KINDS = 64
_ALIGNMENT = 16


def fits(q: Tensor, v: Tensor, mask: AttentionMask) -> bool:
    """Whether calls like this one, which have no bias, are for this kernel. Nothing of the batch is asked."""
    if mask.window_targets and mask.max_attn_len > 0:
        return False
    width = q.shape[2]
    if width != WIDTH or v.shape[2] != width or q.dtype.itemsize != 2:
        return False
    return q.is_cuda and same_bits(q.get_device()) and available()


def tiles_of(layout: JaggedLayout, rows: int, heads: int) -> int:
    """A bound on the tiles of ``rows`` targets, a head each."""
    return (rows // BLOCK_M + layout.batch_size) * heads


def hopper_target_attention(
    inputs: Sequence[Tensor],
    cache_layout: JaggedLayout,
    layout: JaggedLayout,
    *,
    alpha: float,
    scale: float,
    out: Tensor,
    sums: Tensor | None,
    split_rows: int,
) -> bool:
    """Write ``sums [stretches, T, H, D]``, float32, without the factor ``scale``, or without them ``out [T, H, D]``.

    Args:
        inputs: q, k, v of the targets, and the cached keys and values, for which `fits` said yes.
        split_rows: of a stretch of a history.

    Returns:
        ``False`` where the copy engine cannot fetch the inputs.
    """
    q, cached = inputs[0], inputs[3]
    if not cached.shape[0] or any(x.shape[1] * x.stride(1) >= MOST_COLUMNS for x in inputs):
        return False
    rows, heads, _ = q.shape
    tiles = tiles_of(layout, rows, heads)
    lister, kernel = _variants(heads, split_rows)
    work = torch.empty(tiles // heads + 1, FIELDS, dtype=torch.int64, device=q.device)
    pieces = 1 if sums is None else sums.shape[0]
    numbers = (
        *(x.stride(1) for x in inputs),
        pieces,
        _ALL_BLOCKS if sums is None else split_rows // BLOCK_N,
        rows,
        float(alpha),
        float(scale) if sums is None else 1.0,
    )
    programs = min(tiles * pieces, multiprocessors(q.get_device()))
    call = _Call(kernel, programs, (out if sums is None else sums, work, *inputs), numbers)
    if not call.fetched():
        return False
    lister(layout.batch_size, (work, layout.seq_offsets, cache_layout.seq_offsets), (layout.batch_size,))
    call.launch()
    return True


class _Call:
    """One launch of the kernel: of a warm one only the addresses are new.

    Args:
        arrays: what is written, the list, and q, k, v and the cached keys and values.
    """

    def __init__(self, kernel: Variant, programs: int, arrays: Sequence[Tensor], numbers: tuple[float, ...]) -> None:
        self._kernel, self._programs, self._arrays, self._numbers = kernel, programs, arrays, numbers
        inputs = arrays[2:]
        bits = 0
        for x in (arrays[0], *inputs):
            bits |= x.data_ptr()
        self._direct = bits % _ALIGNMENT == 0 and is_current(inputs[0].get_device())
        # Sums of stretches do not go by the copy engine.
        self._panelled = (*inputs, arrays[0] if arrays[0].dtype == inputs[0].dtype else None)
        rows = [(x.shape[0], x.stride(0)) for x in inputs]
        # Sums are float32 whatever the inputs are.
        dtypes = (arrays[0].dtype, inputs[0].dtype)
        self._kind = (inputs[0].get_device(), programs, numbers, dtypes, *rows)
        self._known = _ready_launches(kernel)
        ready = self._known.get(self._kind) if self._direct else None
        self._ready = None if ready is None or ready.watched() else ready
        self._panels: Sequence[Panel | None] = ()

    def fetched(self) -> bool:
        """Whether the copy engine can fetch the inputs, and write the result."""
        if self._ready is not None:
            return True
        found = descriptors(self._panelled, (GROUP_ROWS, *(BLOCK_N,) * 4, GROUP_ROWS))
        self._panels = found or ()
        return found is not None

    def launch(self) -> None:
        if self._ready is not None:
            places = (*self._arrays[:2], *self._panelled)
            self._ready([None if x is None else x.data_ptr() for x in places])
            return
        arrays: tuple[Argument, ...] = (*self._arrays[:2], *self._panels)
        self._kernel(self._programs, arrays, self._numbers)
        made = self._kernel.ready(self._programs, arrays, self._numbers) if self._direct else None
        if made is not None:
            if len(self._known) >= _MOST_KINDS:
                self._known.clear()
            self._known[self._kind] = made


@functools.lru_cache(maxsize=64)
def _ready_launches(kernel: Variant) -> dict[Any, Ready]:
    """Launches of a kernel for which addresses are all that is missing, by the kind of the call."""
    return {}


@functools.lru_cache(maxsize=64)
def _variants(heads: int, split_rows: int) -> tuple[Variant, Variant]:
    """The kernel that lists tiles, and that of the attention."""
    from hstu_kernels.attention.triton.hopper_target import hopper_target_kernel

    lister = Variant(hstu_target_list_kernel, TILE=BLOCK_M, num_warps=1)
    blocks = {"BLOCK_N": BLOCK_N, "STAGES": STAGES, "SPLIT_BLOCKS": split_rows // BLOCK_N}
    return lister, Variant(hopper_target_kernel, HEADS=heads, D=WIDTH, **blocks, num_warps=4)
