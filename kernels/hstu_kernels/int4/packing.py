"""Packing and unpacking of whole tables with tensor operations, on any device.

The integer formats follow FBGEMM's fused N-bit quantisation operation for operation, in float32, so that the bytes are
the same: bias = fp16(min), scale = fp16((max - bias) / levels) or 1 where that is 0, code = clip(rint((x - bias) *
(1 / scale))).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hstu_kernels.int4.format import FP8_MAX, PackedRows, RowFormat
from hstu_kernels.int4.ranges import RowRange, integer_codes

# Elements worked on at once: temporaries are some ten times this, in bytes.
CHUNK_ELEMENTS = 1 << 22
_CPU_UNPACK_ELEMENTS = 1 << 17
_SHOWN_ROWS = 5


def pack_rows(
    values: Tensor, dtype: RowFormat | str = RowFormat.INT4, *, ranges: RowRange | str = RowRange.MIN_MAX
) -> PackedRows:
    """Quantise a table row by row.

    Args:
        values: ``[rows, D]`` floating point; worked on in float32.
        dtype: format of the rows.
        ranges: how the range of a row is chosen (`RowRange`); FP8 rows know ``MIN_MAX`` only.

    Returns:
        rows on the device of ``values``.

    Raises:
        TypeError: ``values`` is no floating point tensor.
        ValueError: the shape is wrong, a row holds NaN or infinity, or its numbers do not fit float16 scale and bias.
    """
    row_format, choice = RowFormat.parse(dtype), RowRange.parse(ranges)
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"values: expected a floating point tensor, got {got}")
    if values.dim() != 2 or values.shape[1] < 1:
        raise ValueError(f"values: expected [rows, D] with D >= 1, got {tuple(values.shape)}")
    if row_format is RowFormat.FP8 and choice is not RowRange.MIN_MAX:
        raise ValueError(f"ranges: expected 'min_max' for fp8 rows, whose scale follows their maximum, got {choice!r}")
    rows, dim = values.shape
    values = values.detach()
    data = torch.empty(rows, row_format.row_bytes(dim), dtype=torch.uint8, device=values.device)
    step = max(1, CHUNK_ELEMENTS // dim)
    for begin in range(0, rows, step):
        chunk = values[begin : begin + step].to(torch.float32)
        _refuse(~torch.isfinite(chunk).all(1), begin, "finite numbers", "NaN or infinity", "repair or drop the rows")
        if row_format is RowFormat.FP8:
            data[begin : begin + step] = _fp8_bytes(chunk)
        else:
            data[begin : begin + step] = _integer_bytes(chunk, row_format, choice, begin)
    return PackedRows(data, dim, row_format)


def unpack_rows(packed: PackedRows, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values ``[rows, D]`` in ``dtype``: computed in float32, rounded once."""
    out = torch.empty(packed.num_rows, packed.dim, dtype=dtype, device=packed.device)
    step = rows_at_once(packed.num_rows, packed.dim, packed.device)
    for begin in range(0, packed.num_rows, step):
        out[begin : begin + step] = _values(packed.data[begin : begin + step], packed.dim, packed.format)
    return out


def rows_at_once(rows: int, dim: int, device: torch.device) -> int:
    """How many of ``rows`` to unpack at a time: on a CPU so many that temporaries stay in its cache, on a GPU all."""
    return max(1, _CPU_UNPACK_ELEMENTS // dim if device.type == "cpu" else rows)


def _values(data: Tensor, dim: int, row_format: RowFormat) -> Tensor:
    codes = data[:, : row_format.code_bytes(dim)]
    # A copy: the bytes of a view need not lie on a boundary of the wider type.
    tail = data[:, codes.shape[1] :].clone(memory_format=torch.contiguous_format)
    if row_format is RowFormat.FP8:
        return codes.contiguous().view(torch.float8_e4m3fn).to(torch.float32) * tail.view(torch.float32)
    if row_format is RowFormat.INT4:
        # Both nibbles of a byte into the two bytes of an integer, the low one first.
        pairs = codes.to(torch.int16)
        codes = ((pairs | (pairs << 4)) & 0x0F0F).view(torch.uint8)[:, :dim]
    scale_and_bias = tail.view(torch.float16).to(torch.float32)
    # The product is exact (11 bits times 8), so a fused multiply-add gives the same bits.
    return codes.to(torch.float32).mul_(scale_and_bias[:, :1]).add_(scale_and_bias[:, 1:])


def _integer_bytes(chunk: Tensor, row_format: RowFormat, choice: RowRange, begin: int) -> Tensor:
    levels = (1 << row_format.bits) - 1
    scale, bias = choice.scale_and_bias(chunk, levels)
    _refuse(
        ~torch.isfinite(torch.cat([scale, bias], 1)).all(1),
        begin,
        "numbers whose row minimum and range fit float16 (minimum within 65504, range within "
        f"{levels} * 65504) for {row_format} rows",
        "larger ones",
        "use dtype='fp8' or scale the table down",
    )
    codes = integer_codes(chunk, scale.float(), bias.float(), levels).to(torch.uint8)
    if row_format is RowFormat.INT4:
        if codes.shape[1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return torch.cat([codes, scale.view(torch.uint8), bias.view(torch.uint8)], dim=1)


def _fp8_bytes(chunk: Tensor) -> Tensor:
    # A tensor as divisor: by a plain number a GPU divides through its reciprocal, and the last bit may differ.
    scale = chunk.abs().amax(1, keepdim=True) / chunk.new_full((), FP8_MAX)
    scale = torch.where(scale == 0, 1.0, scale)
    # Beyond the largest number the cast gives NaN, and the division may round up to just there.
    codes = (chunk / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], dim=1)


def _refuse(wrong: Tensor, begin: int, expected: str, got: str, remedy: str) -> None:
    if not bool(wrong.any()):
        return
    found = (wrong.nonzero().view(-1) + begin).tolist()
    more = f" and {len(found) - _SHOWN_ROWS} more" if len(found) > _SHOWN_ROWS else ""
    rows = ", ".join(map(str, found[:_SHOWN_ROWS]))
    raise ValueError(f"values: expected {expected}, got {got} in rows {rows}{more}; {remedy}")
