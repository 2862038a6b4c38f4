"""What quantisation cost: bytes, signal-to-noise ratios, the rows that lost most, and metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from hstu_kernels.int4 import PackedRows, RowFormat, RowRange, unpack_rows

_CHUNK_ELEMENTS = 1 << 22
WORST_ROWS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstRow:
    """A row that lost much.

    Attributes:
        row: its id.
        sqnr_db: signal-to-quantisation-noise ratio of the row in decibel.
        max_error: largest absolute error of an element.
    """

    row: int
    sqnr_db: float
    max_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TableReport:
    """One table before and after.

    Attributes:
        name: of the module.
        rows, dim: its shape.
        format, ranges: how it was quantised.
        bytes_before, bytes_after: of the table.
        sqnr_db: 10 log10(sum of squares / sum of squared errors); infinite without any error.
        weighted_sqnr_db: the same with each row weighted by how often it is looked up; ``None`` when that is not known.
        max_error: largest absolute error of an element.
        worst_rows: the rows of lowest ratio, the worst first; rows without error are not among them.
    """

    name: str
    rows: int
    dim: int
    format: RowFormat
    ranges: RowRange
    bytes_before: int
    bytes_after: int
    sqnr_db: float
    weighted_sqnr_db: float | None
    max_error: float
    worst_rows: tuple[WorstRow, ...]

    @property
    def ratio(self) -> float:
        """How many times smaller the table has become."""
        return self.bytes_before / self.bytes_after if self.bytes_after else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationReport:
    """What `hstu_plugin.quantize.quantize` did.

    Attributes:
        tables: one report for each table.
        kept: embedding modules left as they are, with the reason.
        metrics_before, metrics_after: of the evaluation given, empty without one.
    """

    tables: tuple[TableReport, ...]
    kept: Mapping[str, str] = field(default_factory=dict)
    metrics_before: Mapping[str, float] = field(default_factory=dict)
    metrics_after: Mapping[str, float] = field(default_factory=dict)

    @property
    def bytes_before(self) -> int:
        """Of all quantised tables."""
        return sum(table.bytes_before for table in self.tables)

    @property
    def bytes_after(self) -> int:
        """Of all quantised tables."""
        return sum(table.bytes_after for table in self.tables)

    def metric_changes(self) -> dict[str, float]:
        """Relative change of each metric; NaN where it was 0."""
        return {
            name: (self.metrics_after[name] - before) / before if before else math.nan
            for name, before in self.metrics_before.items()
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything in JSON types; an infinite ratio becomes ``None``."""
        plain = _finite(asdict(self) | {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after})
        return dict(plain)


def table_report(
    name: str, values: Tensor, packed: PackedRows, *, ranges: RowRange, frequency: Tensor | None = None
) -> TableReport:
    """Compare a table with its packed rows, part by part.

    Args:
        name: of the table.
        values: ``[rows, D]`` full precision.
        packed: its rows.
        ranges: how they were made.
        frequency: ``[rows]`` how often each row is looked up.
    """
    return report_from(
        name,
        row_errors(values, packed),
        packed,
        ranges=ranges,
        bytes_before=values.numel() * values.element_size(),
        frequency=frequency,
    )


@dataclass(frozen=True, slots=True)
class RowErrors:
    """Of each row, ``[rows]`` float64: sum of squares, sum of squared errors, largest absolute error."""

    signal: Tensor
    noise: Tensor
    largest: Tensor

    @classmethod
    def joined(cls, parts: Sequence[RowErrors]) -> RowErrors:
        """Those of consecutive parts of a table."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("signal", "noise", "largest")))


def row_errors(values: Tensor, packed: PackedRows) -> RowErrors:
    """Compare rows ``[rows, D]`` with their packed form, part by part."""
    rows, dim = values.shape
    step = max(1, _CHUNK_ELEMENTS // dim)
    signal = torch.zeros(rows, dtype=torch.float64, device=values.device)
    noise, largest = torch.zeros_like(signal), torch.zeros_like(signal)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        exact = values[part].detach().double()
        error = unpack_rows(PackedRows(packed.data[part], dim, packed.format)).double() - exact
        signal[part], noise[part] = exact.square().sum(1), error.square().sum(1)
        largest[part] = error.abs().amax(1)
    return RowErrors(signal, noise, largest)


def report_from(
    name: str,
    errors: RowErrors,
    packed: PackedRows,
    *,
    ranges: RowRange,
    bytes_before: int,
    frequency: Tensor | None = None,
) -> TableReport:
    """The report of a table whose rows were compared already; arguments as of `table_report`."""
    signal, noise, largest = errors.signal, errors.noise, errors.largest
    weighted = None
    if frequency is not None:
        weight = frequency.to(signal)
        weighted = _decibel(float((signal * weight).sum()), float((noise * weight).sum()))
    return TableReport(
        name=name,
        rows=packed.num_rows,
        dim=packed.dim,
        format=packed.format,
        ranges=ranges,
        bytes_before=bytes_before,
        bytes_after=packed.nbytes,
        sqnr_db=_decibel(float(signal.sum()), float(noise.sum())),
        weighted_sqnr_db=weighted,
        max_error=float(largest.max()) if packed.num_rows else 0.0,
        worst_rows=_worst(signal, noise, largest),
    )


def _worst(signal: Tensor, noise: Tensor, largest: Tensor) -> tuple[WorstRow, ...]:
    share = torch.where(noise > 0, noise / signal, -1.0)
    found = torch.topk(share, min(WORST_ROWS, share.numel())).indices.tolist()
    return tuple(
        WorstRow(row=row, sqnr_db=_decibel(float(signal[row]), float(noise[row])), max_error=float(largest[row]))
        for row in found
        if float(noise[row]) > 0
    )


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
