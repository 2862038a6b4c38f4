"""What the gather kernel is compiled for; a table of sizes instead of an autotuner."""

from __future__ import annotations

from dataclasses import dataclass

from hstu_kernels.int4.format import TAIL_BYTES, PackedRows

# Units that a program decodes at once, and the most that it takes from one row. Measured on no GPU yet.
_TILE_UNITS = {1: 1024, 2: 1024, 4: 512}
_MOST_COLUMNS = 128
# Product and sum are rounded apart, as the tensor operations do: the same bits on every path.
LAUNCH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@dataclass(frozen=True, slots=True)
class GatherShape:
    """One constexpr argument.

    Attributes:
        dim: ``D``.
        bits: of a code.
        unit_bytes: bytes of a unit, the integer that the table is read in: 4, 2 or 1.
        row_units: units of a row.
        code_units: those of them that hold codes.
        codes: codes in a unit.
        block_rows, block_units: rows and units of a tile, powers of two.
    """

    dim: int
    bits: int
    unit_bytes: int
    row_units: int
    code_units: int
    codes: int
    block_rows: int
    block_units: int


def gather_shape(table: PackedRows) -> GatherShape:
    """The shape for a table: the widest unit in which every row begins and ends on a boundary."""
    row_bytes = table.format.row_bytes(table.dim)
    unit = next(u for u in (4, 2, 1) if row_bytes % u == 0 and table.data.data_ptr() % u == 0)
    code_units = (row_bytes - TAIL_BYTES) // unit
    block_units = min(_MOST_COLUMNS, 1 << (code_units - 1).bit_length())
    return GatherShape(
        dim=table.dim,
        bits=table.format.bits,
        unit_bytes=unit,
        row_units=row_bytes // unit,
        code_units=code_units,
        codes=unit * 8 // table.format.bits,
        block_rows=max(1, _TILE_UNITS[unit] // block_units),
        block_units=block_units,
    )
