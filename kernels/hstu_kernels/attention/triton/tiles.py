"""Tile sizes by head width and dtype: a small table instead of an autotuner, and what a kernel is compiled for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of a query tile, rows of a key tile, warps, and depth of the software pipeline.

    ``own_in_registers``: so many operands of the tile's own side stay in registers, where elements have two bytes:
    ``q`` in the forward, ``dout`` and then ``q`` in dq, ``v`` and then ``k`` in dkdv.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    own_in_registers: int = 0


@dataclass(frozen=True, slots=True)
class TileSet:
    """One tile for each kernel. ``bias`` takes the blocks that ``dq`` leaves: their rows must be the same."""

    forward: Tile
    dq: Tile
    dkdv: Tile
    bias: Tile

    def __post_init__(self) -> None:
        if (self.bias.block_m, self.bias.block_n) != (self.dq.block_m, self.dq.block_n):
            raise ValueError(f"bias: expected the block sizes of dq, {self.dq}, got {self.bias}")


@dataclass(frozen=True, slots=True)
class KernelShape:
    """Everything a kernel is compiled for besides the mask: one constexpr argument.

    Attributes:
        heads, qk_dim, v_dim: ``H``, ``Dqk``, ``Dv``.
        block_qk, block_v: the widths padded to powers of two, at least 16.
        block_m, block_n: rows of a query tile and of a key tile.
        contextual: leading contextual rows of every sequence.
        reach: ``N - 1`` of the position table, -1 without one.
        buckets: last bucket of the time table, -1 without one.
        exact: SiLU through exp; otherwise through the hardware's approximate tanh.
        descriptors: full blocks of the streamed operands come through tensor descriptors.
        precision: of float32 products, ``ieee`` or ``tf32``.
        assembly: there is inline assembly: a GPU, not the interpreter.
        own_in_registers: as in `Tile`; wants ``assembly``.
        few_buckets: a block whose times span at most that many thresholds compares with each of them.
    """

    heads: int
    qk_dim: int
    v_dim: int
    block_qk: int
    block_v: int
    block_m: int
    block_n: int
    contextual: int
    reach: int
    buckets: int
    exact: bool
    descriptors: bool
    precision: str
    assembly: bool = False
    own_in_registers: int = 0
    few_buckets: int = 3


def tile_set(qk_dim: int, v_dim: int, dtype: torch.dtype, *, biased: bool) -> TileSet:
    """The tiles for head widths ``qk_dim`` and ``v_dim``, with and without a relative bias.

    Measured on an H100 at widths 64 and 128 without bias (docs/performance-notes.md), the rest by shared memory and
    registers. Never by length: a longer neighbour or another ``max_seq_len`` may not change a number.
    """
    width = max(padded_width(qk_dim), padded_width(v_dim))
    tiles = _TILES[torch.float32 if dtype == torch.float32 else torch.bfloat16][min(max(width, 64), 256)]
    if biased and dtype == torch.float32:
        # Without tensor cores the look-ups cannot be kept in the layout of the products, so nothing is pipelined.
        return TileSet(*(unpipelined(tile) for tile in (tiles.forward, tiles.dq, tiles.dkdv, tiles.bias)))
    return tiles


def unpipelined(tile: Tile) -> Tile:
    """For kernels that look tables up in their main loop: the pipeline would buffer the entries in shared memory."""
    return replace(tile, num_stages=1)


def float32_precision() -> str:
    """What PyTorch's own products of float32 do on a GPU: `torch.set_float32_matmul_precision`."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


_NARROW_FP32, _FP32 = Tile(64, 32, 4, 2), Tile(32, 32, 4, 2)
_TILES = {
    # No tensor core in full float32: accumulators and operands both sit in registers.
    torch.float32: {
        64: TileSet(_NARROW_FP32, _NARROW_FP32, _NARROW_FP32, _NARROW_FP32),
        128: TileSet(_FP32, _FP32, _FP32, _FP32),
        256: TileSet(_FP32, _FP32, _FP32, _FP32),
    },
    torch.bfloat16: {
        64: TileSet(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3), Tile(64, 64, 4, 1)),
        128: TileSet(Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(32, 64, 4, 3), Tile(128, 64, 8, 1)),
        256: TileSet(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2), Tile(64, 64, 8, 1)),
    },
}


def padded_width(width: int) -> int:
    """The power of two, at least 16, that holds ``width`` columns."""
    return max(16, 1 << (width - 1).bit_length())
