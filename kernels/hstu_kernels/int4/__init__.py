"""Quantised embedding rows: FBGEMM's fused 4-bit and 8-bit bytes, fp8, and a gather that dequantises on the way."""

from hstu_kernels.int4.api import AddedRows, gather_rows
from hstu_kernels.int4.format import PackedRows, RowFormat
from hstu_kernels.int4.packing import pack_rows, unpack_rows
from hstu_kernels.int4.ranges import RowRange

__all__ = ["AddedRows", "PackedRows", "RowFormat", "RowRange", "gather_rows", "pack_rows", "unpack_rows"]
