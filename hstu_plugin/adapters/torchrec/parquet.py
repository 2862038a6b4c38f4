"""Row groups of parquet files as checked, jagged int64 and float columns."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu_plugin.adapters.torchrec.schema import FeatureSchema, of_candidates

Array = np.ndarray[Any, np.dtype[Any]]


class OnCorrupt(StrEnum):
    """A file that cannot be read: ``ERROR`` stops and names it, ``SKIP`` leaves its rows out and counts them."""

    ERROR = "error"
    SKIP = "skip"


class CorruptFile(RuntimeError):
    """A parquet file, or a row group of it, cannot be read."""


@dataclass(frozen=True, slots=True)
class Column:
    """Jagged column: row ``r`` holds ``values[offsets[r]:offsets[r + 1]]``."""

    values: Array
    offsets: Array

    @property
    def lengths(self) -> Array:
        return np.diff(self.offsets)

    def take(self, rows: Array) -> Column:
        """These rows, in this order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Column(self.values[places], offsets)

    def part(self, begin: int, end: int) -> Column:
        """Rows ``[begin, end)``, not copied."""
        low, high = self.offsets[begin], self.offsets[end]
        return Column(self.values[low:high], self.offsets[begin : end + 1] - low)

    def last(self, limit: int) -> Column:
        """The last ``limit`` values of each row."""
        whole = self.lengths
        if not len(whole) or whole.max() <= limit:
            return self
        lengths = np.minimum(whole, limit)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self.offsets[1:] - lengths - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Column(self.values[places], offsets)


def join(parts: list[dict[str, Column]]) -> dict[str, Column]:
    """The rows of all parts, one after another."""
    if len(parts) == 1:
        return dict(parts[0])
    joined = {}
    for key in parts[0]:
        columns = [part[key] for part in parts]
        lengths = np.concatenate([column.lengths for column in columns])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        joined[key] = Column(np.concatenate([column.values for column in columns]), offsets)
    return joined


@dataclass(frozen=True, slots=True, kw_only=True)
class FileColumns:
    """Which columns a data set reads.

    Attributes:
        schema: keys, by which columns are named; those of ``ids`` are checked against their tables.
        ids, numbers: lists of int64, or one int64 each row.
        measures: lists of numbers, one for each event. labels: lists of numbers, one for each candidate.
    """

    schema: FeatureSchema
    ids: tuple[str, ...]
    numbers: tuple[str, ...]
    measures: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [*self.ids, *self.numbers, *self.floats]

    @property
    def floats(self) -> tuple[str, ...]:
        """Columns of float32, where a missing value is NaN."""
        return self.measures + self.labels

    def groups(self) -> list[tuple[str, tuple[str, ...]]]:
        """Columns that must have the same lengths in every row, by their first."""
        schema, names = self.schema, self.names
        found: list[tuple[str, tuple[str, ...]]] = [
            (schema.item, tuple(key for key in schema.along_history[1:] if key in names))
        ]
        if schema.candidate in self.ids:
            assert schema.candidate is not None
            of = () if schema.actions is None else (*schema.actions.number_keys, *schema.actions.measure_keys)
            scored = (*schema.along_candidates[1:], *map(of_candidates, of), *self.labels)
            found.append((schema.candidate, tuple(key for key in scored if key in names)))
        return found


@dataclass(frozen=True, slots=True)
class RowGroup:
    """``rows`` rows of row group ``group`` of ``path``; ``first`` is the file's row that it begins with."""

    path: str
    group: int
    first: int
    rows: int


def find_files(pattern: str) -> list[str]:
    """Files of a glob pattern or a folder, sorted.

    Raises:
        FileNotFoundError: nothing matches.
    """
    path = Path(pattern)
    found = sorted(str(p) for p in path.glob("*.parquet")) if path.is_dir() else sorted(glob.glob(pattern))
    if not found:
        raise FileNotFoundError(f"data: expected parquet files under {pattern!r}, found none")
    return found


def list_row_groups(paths: list[str], columns: FileColumns, on_corrupt: OnCorrupt) -> tuple[list[RowGroup], list[str]]:
    """Row groups of all files from their footers, and messages about the files left out.

    Raises:
        CorruptFile: a footer cannot be read (``ERROR``). ValueError: a file's columns do not fit the schema.
    """
    groups, skipped = [], []
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                metadata, arrow = file.metadata, file.schema_arrow
        except (pa.ArrowException, OSError) as error:
            message = f"{path}: not a readable parquet file: {error}"
            if on_corrupt is OnCorrupt.ERROR:
                raise CorruptFile(f"{message}; remove it, or set data.on_corrupt: skip") from error
            skipped.append(message)
            continue
        _check_schema(path, arrow, columns)
        first = 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            groups.append(RowGroup(path, group, first, rows))
            first += rows
    return groups, skipped


def read_row_group(
    group: RowGroup, columns: FileColumns, footers: dict[str, pq.FileMetaData] | None = None
) -> dict[str, Column]:
    """The checked columns of one row group.

    Args:
        group: place. columns: what to read.
        footers: by path, read where missing and kept there; that of a file with many groups takes longer than a group.

    Raises:
        CorruptFile: it cannot be read. ValueError: a value is wrong; names file, row and key.
    """
    try:
        with pq.ParquetFile(group.path, metadata=None if footers is None else footers.get(group.path)) as file:
            if footers is not None:
                footers[group.path] = file.metadata
            table = file.read_row_group(group.group, columns=columns.names)
    except (pa.ArrowException, OSError) as error:
        raise CorruptFile(f"{group.path}: row group {group.group} cannot be read: {error}") from error
    return read_table(table, group, columns)


def read_table(table: pa.Table, group: RowGroup, columns: FileColumns) -> dict[str, Column]:
    """The checked columns of a table; ``group`` says where its rows come from.

    Raises:
        ValueError: a column or value is wrong; names file, row and key.
    """
    _check_schema(group.path, table.schema, columns)
    found = {name: _column(group, name, table[name], name in columns.floats) for name in columns.names}
    _check_values(group, found, columns)
    return found


def _check_schema(path: str, arrow: pa.Schema, columns: FileColumns) -> None:
    for name in columns.names:
        if name not in arrow.names:
            raise ValueError(f"{path}: expected a column {name!r}, found {arrow.names}")
        kind = arrow.field(name).type
        value = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
        whole = pa.types.is_integer(value)
        number = whole or pa.types.is_floating(value) or pa.types.is_boolean(value)
        if not (number if name in columns.floats else whole):
            wanted = "numbers" if name in columns.floats else "whole numbers"
            raise ValueError(f"{path}: column {name!r}: expected {wanted} or lists of them, found {kind}")


def _column(group: RowGroup, name: str, chunked: pa.ChunkedArray, label: bool) -> Column:
    array = chunked.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], type=chunked.type)
    _refuse_nulls(group, name, array)
    dtype = np.float32 if label else np.int64
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        values = array.to_numpy(zero_copy_only=False).astype(dtype)
        return Column(values, np.arange(len(values) + 1))
    offsets = array.offsets.to_numpy().astype(np.int64)
    flat = array.flatten()
    if flat.null_count:
        place = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0])
        row = int(np.searchsorted(offsets - offsets[0], place, side="right")) - 1
        if not label:
            raise ValueError(f"{_where(group, row, name)}: expected no missing values")
    values = flat.to_numpy(zero_copy_only=False).astype(dtype)
    return Column(values, offsets - offsets[0])


def _refuse_nulls(group: RowGroup, name: str, array: pa.Array) -> None:
    if array.null_count:
        row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"{_where(group, row, name)}: expected a value, found none")


def _check_values(group: RowGroup, found: dict[str, Column], columns: FileColumns) -> None:
    schema = columns.schema
    for first, others in columns.groups():
        for name in others:
            wrong = np.flatnonzero(found[first].lengths != found[name].lengths)
            if wrong.size:
                row = int(wrong[0])
                raise ValueError(
                    f"{_where(group, row, name)}: expected {found[first].lengths[row]} values as {first!r} has, "
                    f"found {found[name].lengths[row]}"
                )
    for single in (schema.request_time, schema.user):
        if single not in found:
            continue
        wrong = np.flatnonzero(found[single].lengths != 1)
        if wrong.size:
            raise ValueError(f"{_where(group, int(wrong[0]), single)}: expected one value")
    _check_actions(group, found, schema)
    for name in columns.ids:
        table, low = schema.table_of(name), schema.lowest_id(name)
        values = found[name].values
        outside = np.flatnonzero((values < low) | (values >= table.num_embeddings))
        if outside.size:
            row = int(np.searchsorted(found[name].offsets, outside[0], side="right")) - 1
            raise ValueError(
                f"{_where(group, row, name)}: expected ids in [{low}, {table.num_embeddings}) as table {table.name!r} "
                f"has them, found {values[outside[0]]}"
            )


def _check_actions(group: RowGroup, found: dict[str, Column], schema: FeatureSchema) -> None:
    bounds = {} if schema.actions is None else schema.actions.bounds()
    for name, (low, high) in (bounds | {of_candidates(key): bound for key, bound in bounds.items()}).items():
        if name not in found:
            continue
        outside = np.flatnonzero((found[name].values < low) | (found[name].values > high))
        if outside.size:
            row = int(np.searchsorted(found[name].offsets, outside[0], side="right")) - 1
            raise ValueError(
                f"{_where(group, row, name)}: expected numbers in [{low}, {high}], found "
                f"{found[name].values[outside[0]]}"
            )


def _where(group: RowGroup, row: int, name: str) -> str:
    return f"{group.path}: row {group.first + row}, column {name!r}"
