"""Bytes of a quantised row, and the table that holds such rows.

INT4 and INT8 rows are FBGEMM's fused N-bit rows: the packed codes, then scale and bias as little-endian float16. A
value is ``code * scale + bias``. With 4 bits the even element lies in the low nibble, and a row of odd width ends in a
zero nibble. FP8 rows are e4m3 codes, then their scale as float32; a value is ``code * scale``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

# Largest finite number of e4m3 (four bits of exponent, three of mantissa, no infinity).
FP8_MAX = 448.0
# Behind the codes: scale and bias as float16, or one float32 scale.
TAIL_BYTES = 4


class RowFormat(StrEnum):
    """How a row of a table is stored; ``INT4`` and ``INT8`` in FBGEMM's bytes, ``FP8`` e4m3 with a float32 scale."""

    INT4 = "int4"
    INT8 = "int8"
    FP8 = "fp8"

    @classmethod
    def parse(cls, value: RowFormat | str) -> RowFormat:
        """The format of that name.

        Raises:
            ValueError: there is none.
        """
        try:
            return cls(value)
        except ValueError:
            raise ValueError(f"dtype: expected one of {', '.join(cls)}, got {value!r}") from None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4 if self is RowFormat.INT4 else 8

    def code_bytes(self, dim: int) -> int:
        """Bytes of the codes of a row of ``dim`` elements."""
        return (dim * self.bits + 7) // 8

    def row_bytes(self, dim: int) -> int:
        """Bytes of a whole row of ``dim`` elements."""
        return self.code_bytes(dim) + TAIL_BYTES


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A table ``[rows, dim]`` in quantised rows.

    Attributes:
        data: ``[rows, format.row_bytes(dim)]`` uint8, contiguous.
        dim: elements of a row, ``D``.
        format: of the rows.
    """

    data: Tensor
    dim: int
    format: RowFormat = RowFormat.INT4

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", RowFormat.parse(self.format))
        if not isinstance(self.dim, int) or isinstance(self.dim, bool) or self.dim < 1:
            raise ValueError(f"dim: expected an int >= 1, got {self.dim!r}")
        if not isinstance(self.data, Tensor) or self.data.dtype != torch.uint8:
            got = self.data.dtype if isinstance(self.data, Tensor) else type(self.data).__name__
            raise TypeError(f"data: expected a uint8 tensor of packed rows, got {got}; pack_rows makes one")
        width = self.format.row_bytes(self.dim)
        if self.data.dim() != 2 or self.data.shape[1] != width:
            raise ValueError(
                f"data: expected [rows, {width}] for {self.format} rows of {self.dim} elements, "
                f"got {tuple(self.data.shape)}"
            )
        if not self.data.is_contiguous():
            raise ValueError("data: expected contiguous rows, got a strided view; call .contiguous() on it")

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return self.data.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the bytes lie."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self.data.numel()

    def to(self, device: torch.device | str) -> PackedRows:
        """The same rows on ``device``."""
        return PackedRows(self.data.to(device), self.dim, self.format)

    def select(self, ids: Tensor) -> PackedRows:
        """Rows ``ids [L]``, which must lie in ``[0, num_rows)``, still packed."""
        return PackedRows(self.data.index_select(0, ids), self.dim, self.format)
