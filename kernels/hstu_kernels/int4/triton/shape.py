"""What the gather kernel is compiled for; a table of sizes instead of an autotuner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hstu_kernels.int4.format import TAIL_BYTES, PackedRows


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherTile:
    """How the work is cut.

    Attributes:
        units: that a program decodes at a time, a power of two; four bytes of int4 codes are a unit, so 256 are 16
            rows of width 128, or 4 of width 512.
        warps: of a program.
        words: units of one row that a thread takes, where the row divides into so many: they share the row's ids,
            scale, bias and addresses.
        registers: of a thread, at most, where terms and result have 16 bits and rows are whole units; ``None`` leaves
            them to the compiler. With 32, as many threads as a multiprocessor can hold have rows under way.
    """

    units: int = 256
    warps: int = 4
    words: int = 2
    registers: int | None = 32

    def launch_options(self, *, narrow: bool) -> dict[str, Any]:
        """Product and sum are rounded apart, as the tensor operations do: the same bits on every path.

        ``narrow``: of `is_narrow`; others do not fit into ``registers``.
        """
        bound = {} if self.registers is None or not narrow else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "enable_fp_fusion": False, **bound}


TILE = GatherTile()


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
        ragged: whether the last unit of a row has codes beyond ``dim``.
        block_units: units of a program. words: units of a thread, a divisor of ``code_units``.
    """

    dim: int
    bits: int
    unit_bytes: int
    row_units: int
    code_units: int
    codes: int
    ragged: bool
    block_units: int
    words: int


def gather_shape(table: PackedRows, tile: GatherTile = TILE) -> GatherShape:
    """The shape for a table: the widest unit in which every row begins and ends on a boundary."""
    row_bytes = table.format.row_bytes(table.dim)
    unit = next(u for u in (4, 2, 1) if row_bytes % u == 0 and table.data.data_ptr() % u == 0)
    code_units, codes = (row_bytes - TAIL_BYTES) // unit, unit * 8 // table.format.bits
    return GatherShape(
        dim=table.dim,
        bits=table.format.bits,
        unit_bytes=unit,
        row_units=row_bytes // unit,
        code_units=code_units,
        codes=codes,
        ragged=code_units * codes != table.dim,
        block_units=tile.units,
        words=math.gcd(tile.words, code_units),
    )


def is_narrow(shape: GatherShape, rows: Sequence[Tensor]) -> bool:
    """Whether terms and result (``rows``) have 16 bits and no row ends inside a unit: few registers do for a thread."""
    return not shape.ragged and all(tensor.element_size() == 2 for tensor in rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTile:
    """How reads out of host memory are cut.

    Attributes:
        units: of a program at a time, a power of two. warps: of a program.
        programs: at most; together they keep ``programs * units`` reads under way.
    """

    units: int = 1024
    warps: int = 4
    programs: int = 64


READ = ReadTile()


@dataclass(frozen=True, slots=True)
class ReadShape:
    """One constexpr argument.

    Attributes:
        unit_bytes: bytes of the integer that rows are read in: 8, 4, 2 or 1.
        row_units: units of a row.
        block_units: units of a program at a time.
    """

    unit_bytes: int
    row_units: int
    block_units: int


def read_shape(data: Tensor, tile: ReadTile = READ) -> ReadShape:
    """The shape for rows ``[rows, bytes]``: the widest unit in which every row begins and ends on a boundary."""
    row_bytes = data.shape[1]
    unit = next(u for u in (8, 4, 2, 1) if row_bytes % u == 0 and data.data_ptr() % u == 0)
    return ReadShape(unit_bytes=unit, row_units=row_bytes // unit, block_units=tile.units)
