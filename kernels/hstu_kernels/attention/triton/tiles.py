"""Tile sizes by head width and dtype: a small table instead of an autotuner, and what a kernel is compiled for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of a query tile, rows of a key tile, warps, and depth of the software pipeline.

    ``own_in_registers``: so many operands of the own side stay in registers, where they have two bytes an element and
    pairs of them lie in one word: ``q`` in the forward, ``dout`` and then ``q`` in dq, ``v`` and then ``k`` in dkdv.
    ``registers``: of a thread at most, so that more programs fit on a multiprocessor; 0: as many as the compiler takes.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    own_in_registers: int = 0
    registers: int = 0


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
        precision: of float32 products, ``ieee``, ``tf32x3`` or ``tf32``; see `float32_precision`.
        assembly: there is inline assembly: a GPU, not the interpreter.
        own_in_registers: as in `Tile`; 0 elsewhere than on Hopper.
        warps: of a program on Hopper, whose products of two bytes leave 16 rows to each; 0 elsewhere.
        few_buckets: a block whose times span at most that many thresholds compares with each of them.
        grad_stride: of the rows of dq, dk and dv, which may be columns of one wider matrix; 0: contiguous.
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
    warps: int = 0
    few_buckets: int = 3
    grad_stride: int = 0

    @property
    def waits(self) -> bool:
        """Whether a kernel that was launched early waits for the one ahead before it writes, and lets the next begin.

        Only such a kernel may be launched so (programmatic dependent launch).
        """
        return self.warps > 0

    @property
    def sums_by_warp(self) -> bool:
        """Whether each warp adds its own sums to the tables' gradients: a block gives a thread 16 or 32 logits."""
        return self.block_n in (32, 64) and self.block_m == 16 * self.warps


def tile_set(
    qk_dim: int, v_dim: int, dtype: torch.dtype, *, biased: bool, windowed: bool = False, longest: int = 0
) -> TileSet:
    """The tiles for head widths ``qk_dim`` and ``v_dim``, with and without a relative bias.

    Measured on an H100 at widths 64 and 128 (docs/performance-notes.md), the rest by shared memory and registers.

    Args:
        qk_dim, v_dim, dtype: of q, k and v.
        biased: with a relative bias.
        windowed: ``max_attn_len`` is not 0: programs are short, and long tiles may be cut.
        longest: rows of the longest sequence, or a bound; 0 where two tiles are not known to give the same bits.

    A longer neighbour or another ``max_seq_len`` may not change a number. So only the forward without bias and window
    goes by the length, between tiles that add up in the same order: the same bits (tested on CUDA).
    """
    width = min(max(padded_width(qk_dim), padded_width(v_dim), 64), 256)
    if dtype == torch.float32:
        tiles = _FLOAT32[width]
        # Without tensor cores the look-ups cannot be kept in the layout of the products, so nothing is pipelined.
        return TileSet(*map(unpipelined, (tiles.forward, tiles.dq, tiles.dkdv, tiles.bias))) if biased else tiles
    if (qk_dim, v_dim) != (padded_width(qk_dim), padded_width(v_dim)):
        return _PADDED[width]
    if biased:
        return _BIASED[width]
    if windowed:
        return _WINDOWED[width]
    tiles = _PLAIN[width]
    least, forward = _LONG.get(width, (longest + 1, tiles.forward))
    return replace(tiles, forward=forward) if longest >= least else tiles


def length_class(longest: int) -> int:
    """The least length with the tiles of ``longest``: few values, for caches."""
    return max((least for least, _ in _LONG.values() if least <= longest), default=0)


def unpipelined(tile: Tile) -> Tile:
    """For kernels that look tables up in their main loop: the pipeline would buffer the entries in shared memory."""
    return replace(tile, num_stages=1)


def float32_precision(qk_dim: int, v_dim: int) -> str:
    """How float32 is multiplied: as precisely as PyTorch's own products, `torch.set_float32_matmul_precision`.

    For "highest" and widths up to 64 each factor is the sum of two tf32 numbers, and three products on tensor cores
    take the place of one without them: 22 bits of a factor, and on real batches errors of float32's own size. Below
    1e-34 a factor keeps fewer bits, down to none for denormals; the last 0.05 % below the largest float32 overflow.
    Wider tiles would spill: their products run without tensor cores.
    """
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "tf32x3" if max(qk_dim, v_dim) <= _NARROW else "ieee"


_NARROW = 64
# Eight warps: the parts of both factors lie in registers. A kernel's own side has 64 rows, as Hopper's products want.
_NARROW_FP32, _KEYS_FP32 = Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)
_FP32 = Tile(32, 32, 4, 2)
_FLOAT32 = {
    64: TileSet(_NARROW_FP32, _NARROW_FP32, _KEYS_FP32, _NARROW_FP32),
    128: TileSet(_FP32, _FP32, _FP32, _FP32),
    256: TileSet(_FP32, _FP32, _FP32, _FP32),
}
_SQUARE = Tile(64, 64, 4, 3)
_WIDEST = TileSet(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2), Tile(64, 64, 8, 1))
_PLAIN = {
    64: TileSet(_SQUARE, _SQUARE, _SQUARE, Tile(64, 64, 4, 1)),
    128: TileSet(_SQUARE, Tile(64, 64, 4, 3, 2), Tile(32, 64, 4, 4, 2), Tile(64, 64, 4, 1)),
    256: _WIDEST,
}
# Blocks come through pointers, which take registers: fewer keys in a tile of dkdv, more warps in dq.
_FEW_KEYS = Tile(32, 64, 4, 3)
_PADDED = {
    64: TileSet(_SQUARE, _SQUARE, _FEW_KEYS, Tile(64, 64, 4, 1)),
    128: TileSet(_SQUARE, Tile(128, 64, 8, 3), _FEW_KEYS, Tile(128, 64, 8, 1)),
    256: _WIDEST,
}
# The forward of batches from that length on.
_LONG = {64: (2048, Tile(128, 64, 4, 3, 1)), 128: (8192, Tile(128, 64, 8, 3))}
# Below it no tile goes by the length.
LONG_BATCH = min(least for least, _ in _LONG.values())
# Three short programs of a multiprocessor hide each other's ends.
_WINDOWED = _PLAIN | {
    128: TileSet(Tile(64, 32, 4, 4, 1, registers=168), Tile(64, 64, 4, 3, 2), Tile(32, 64, 4, 3, 2), Tile(64, 64, 4, 1))
}
_TABLES = TileSet(Tile(64, 64, 4, 3, 1), Tile(64, 64, 4, 2), _FEW_KEYS, Tile(64, 64, 4, 1))
_BIASED = {64: _TABLES, 128: _TABLES, 256: _WIDEST}


def padded_width(width: int) -> int:
    """The power of two, at least 16, that holds ``width`` columns."""
    return max(16, 1 << (width - 1).bit_length())
