"""One kernel for the calls of a kind, from its first launch to those by addresses alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hstu_kernels.attention.triton.arguments import Facts, Tables, in_pairs, panels, shape_of
from hstu_kernels.attention.triton.backward_keys import hstu_bwd_dkdv_kernel
from hstu_kernels.attention.triton.backward_queries import hstu_bwd_dq_kernel
from hstu_kernels.attention.triton.bias_grad import hstu_bwd_bias_kernel
from hstu_kernels.attention.triton.forward import hstu_fwd_kernel
from hstu_kernels.attention.triton.join import hstu_join_kernel
from hstu_kernels.attention.triton.schedule import TritonPlan
from hstu_kernels.attention.triton.tiles import Tile, padded_width
from hstu_kernels.mask import AttentionMask
from hstu_kernels.triton.launcher import Argument, Ready, Variant

if TYPE_CHECKING:
    from hstu_kernels.attention.triton.calls import Kit

# Partial sums of the position table that programs share; more of them: fewer programs wait for one address.
POSITION_COPIES = 32
# Rows of a long tile that one program adds up.
_JOINED_ROWS = 16

_KERNELS = {
    "forward": hstu_fwd_kernel,
    "dq": hstu_bwd_dq_kernel,
    "dkdv": hstu_bwd_dkdv_kernel,
    "bias": hstu_bwd_bias_kernel,
}


class Job:
    """One kernel for the calls of a kind: its work list, the pieces of long tiles in it, and once compiled its launch.

    Attributes:
        tile, work: of the kernel.
        described: full blocks of what streams come through descriptors.
        fixed: addresses of what the plan owns. list_address: of ``work``.
    """

    def __init__(self, plan: TritonPlan, kit: Kit, role: str, tile: Tile, entries: int, early: bool) -> None:
        self._heads, self._facts, self._grad_stride, self._mask = kit.heads, kit.facts, kit.grad_stride, plan.mask
        self._role, self._entries, self._early, self.tile = role, entries, early, tile
        of_keys = role == "dkdv"
        side, block = ("key", tile.block_n) if of_keys else ("query", tile.block_m)
        self.work = (plan.key_work if of_keys else plan.query_work)(tile.block_m, tile.block_n)
        self._long, self._pieces = plan.pieces(side, block)
        self._waits = shape_of(kit.facts, tile, False).waits
        # The kernel of the bias leaves the factor ``scale`` to those who add up.
        self._numbers = kit.numbers[:-1] if role == "bias" else (*kit.numbers, self._pieces)
        self._programs = self.work.shape[0] * (1 if role == "bias" else kit.heads)
        self._own_rows, self._streamed_rows = (block, tile.block_m) if of_keys else (block, tile.block_n)
        spans = plan.block_spans("query" if of_keys else "key", self._streamed_rows)
        self._owned = (plan.boundaries, plan.row_times, plan.key_times, spans)
        self.fixed = [None if x is None else x.data_ptr() for x in self._owned]
        self.list_address = self.work.data_ptr()
        self.described = False
        self.ready: Ready | None = None

    def first(
        self,
        inputs: tuple[Tensor, ...],
        own: tuple[Tensor | None, ...],
        streamed: tuple[Tensor, ...],
        tables: Tables,
        sums: tuple[Tensor | None, ...],
        *,
        keep: bool,
    ) -> None:
        """Launch what has not been launched before; ``keep``: the next one may differ in its addresses alone."""
        described: Sequence[Argument] | None = panels(streamed, self._streamed_rows) if streamed else ()
        # The own side's operands: inputs, and the first of ``own`` where it is a gradient that comes in.
        tile = self.tile if in_pairs((*inputs, own[0])) else replace(self.tile, own_in_registers=0)
        options = (self._facts, self._mask, tile, bool(described), self._entries, self._grad_stride, self._early)
        kernel = _variant(self._role, *options)
        fetched = (None,) * len(streamed) if described is None else described
        arrays = (*inputs, *own, *fetched, *tables, *self._owned, *sums, self.work)
        kernel(self._programs, arrays, self._numbers)
        if keep:
            self.described = bool(described)
            self.ready = kernel.ready(self._programs, arrays, self._numbers)

    def sums(self, like: Tensor) -> Tensor | None:
        """``[pieces, H, rows, padded width of like]`` float32 for pieces of long tiles; ``None`` where none is cut."""
        if not self._pieces:
            return None
        shape = (self._pieces, self._heads, self._own_rows, padded_width(like.shape[2]))
        return torch.empty(shape, dtype=torch.float32, device=like.device)

    def join(self, out: Tensor, partial: Tensor, factor: float) -> None:
        """Add ``partial`` up and write ``out``, times ``factor``."""
        _, heads, rows, width = partial.shape
        part = min(rows, _JOINED_ROWS)
        kernel = _joiner(heads, self._long, rows, part, out.shape[2], width, out.stride(0), self._waits)
        kernel(self._pieces * heads * (rows // part), (out, partial, self.work), (self._pieces, float(factor)))


@functools.lru_cache(maxsize=512)
def _variant(
    role: str,
    facts: Facts,
    mask: AttentionMask,
    tile: Tile,
    descriptors: bool,
    entries: int,
    grad_stride: int,
    early: bool,
) -> Variant:
    shape = shape_of(facts, tile, descriptors, grad_stride)
    constants: dict[str, Any] = {"SHAPE": shape, "MASK": mask}
    if role in ("dq", "bias"):
        constants["ENTRIES"] = entries
    if role == "dq":
        constants["COPIES"] = POSITION_COPIES
    if tile.registers and facts[-1]:
        constants["maxnreg"] = tile.registers
    if early and shape.waits:
        constants["launch_pdl"] = True
    return Variant(_KERNELS[role], **constants, num_warps=tile.num_warps, num_stages=tile.num_stages)


@functools.lru_cache(maxsize=64)
def _joiner(heads: int, long: int, tile: int, rows: int, width: int, block: int, stride: int, early: bool) -> Variant:
    shape = {"HEADS": heads, "LONG": long, "TILE": tile, "ROWS": rows, "EARLY": early}
    options = {"launch_pdl": True} if early else {}
    return Variant(hstu_join_kernel, **shape, WIDTH=width, BLOCK=block, STRIDE=stride, num_warps=4, **options)
