"""Columns of Parquet files, checked; errors name the file, the column and the row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray[Any, Any]
# 2100-01-01: a later time is one in another unit.
_LATEST_MS = 4_102_444_800_000


class DataError(ValueError):
    """The data cannot be used; the message names file, column and row, counted from 1."""


def require_pandas() -> Any:
    """pandas, with Parquet.

    Raises:
        ImportError: names the extra that brings it.
    """
    try:
        import pandas
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"ranking data needs {error.name}, which is not installed; install it "
            "in a clone of hstu-plugin with: pip install '.[ranking]'"
        ) from None
    return pandas


class Table:
    """A Parquet file, or text with one header line (.csv, .tsv, .inter, .item, .user)."""

    def __init__(self, path: Path) -> None:
        """Read it.

        Raises:
            DataError: the file is absent, empty, corrupt or of an unknown kind.
        """
        pandas = require_pandas()
        self.path = path
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        suffix = path.suffix.lower()
        if suffix not in (".parquet", ".pq", ".csv", ".tsv", ".inter", ".item", ".user"):
            raise DataError(f"{path}: expected a .parquet, .csv, .tsv, .inter, .item or .user file")
        try:
            if suffix in (".parquet", ".pq"):
                frame = pandas.read_parquet(path)
            else:
                frame = pandas.read_csv(path, sep="," if suffix == ".csv" else "\t", dtype=str, keep_default_na=False)
                frame = frame.mask(frame == "")
        except Exception as error:  # pyarrow's and pandas' own classes differ by the place that noticed
            raise DataError(f"{path}: not readable ({str(error).splitlines()[0]})") from None
        if frame.empty:
            raise DataError(f"{path}: there are no rows")
        self.frame: pd.DataFrame = frame
        self.names = {str(c).partition(":")[0]: str(c) for c in reversed(list(frame.columns))}
        self.names |= {str(c): str(c) for c in frame.columns}

    def __len__(self) -> int:
        return len(self.frame)

    def column(self, name: str) -> pd.Series[Any]:
        """A column by its name, with or without a type such as ``:token`` behind it."""
        if name not in self.names:
            there = ", ".join(map(str, self.frame.columns))
            raise DataError(f"{self.path}: no column {name}; the file has: {there}")
        return self.frame[self.names[name]]

    def keys(self, name: str) -> Array:
        """Ids as text; none may be missing."""
        values = self.categories(name)
        self.refuse(name, values == "", "the id is missing")
        return values

    def categories(self, name: str) -> Array:
        """Values as text, ``""`` where missing."""
        series = self.column(name)
        missing = series.isna().to_numpy()
        if series.dtype.kind == "f":
            whole = (series.fillna(0) % 1 == 0).all()
            series = series.fillna(0).astype(np.int64) if whole else series
        text = series.astype(str).to_numpy(dtype=object)
        return np.where(missing, "", text)

    def numbers(self, name: str) -> Array:
        """float64; NaN where missing."""
        import pandas as pd

        series = self.column(name)
        values = pd.to_numeric(series, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        bad = (np.isnan(values) & ~series.isna().to_numpy()) | np.isinf(values)
        if bad.any():
            self.refuse(name, bad, f"expected a number, got {series.to_numpy()[bad][0]!r}")
        return values

    def shares(self, name: str, at_least: float | None = None) -> Array:
        """0 and 1, by comparison where ``at_least`` is given; NaN where missing."""
        values = self.numbers(name)
        if at_least is not None:
            return np.where(np.isnan(values), np.nan, (values >= at_least).astype(np.float64))
        bad = ~(np.isnan(values) | (values == 0) | (values == 1))
        if bad.any():
            self.refuse(name, bad, f"expected 0 or 1, got {values[bad][0]:g}; or give at_least in the schema")
        return values

    def times(self, name: str, unit: str) -> Array:
        """int64 thousandths of a second."""
        series = self.column(name)
        if series.dtype.kind == "M":
            self.refuse(name, series.isna().to_numpy(), "the time is missing")
            thousandths = series.to_numpy().astype("datetime64[ms]").astype(np.int64)
        else:
            numbers = self.numbers(name)
            self.refuse(name, np.isnan(numbers), "the time is missing")
            # A float64 holds thousandths of today's epoch seconds exactly enough to round back.
            thousandths = np.rint(numbers * (1000 if unit == "s" else 1)).astype(np.int64)
        self.refuse(name, thousandths < 0, "the time lies before 1970")
        hint = "; milliseconds? Say time_unit: ms in the schema" if unit == "s" else ""
        self.refuse(name, thousandths > _LATEST_MS, f"the time lies after the year 2100{hint}")
        return thousandths

    def lists(self, name: str) -> list[list[str]]:
        """Lists of ids as text."""
        values = self.column(name).to_numpy()
        bad = np.array([not isinstance(value, list | np.ndarray) for value in values])
        self.refuse(name, bad, "expected a list")
        return [[str(item) for item in value] for value in values]

    def refuse_repeats(self, name: str, values: Array) -> None:
        """Raise unless the values differ."""
        import pandas as pd

        self.refuse(name, pd.Series(values).duplicated().to_numpy(), "the id stands here for the second time")

    def refuse(self, column: str, bad: Array, problem: str) -> None:
        """Raise about the first row where ``bad [rows]`` is True."""
        rows = np.flatnonzero(bad)
        if not rows.size:
            return
        more = f" (and {len(rows) - 1:,} more rows)" if len(rows) > 1 else ""
        raise DataError(f"{self.path}, column {column}, row {rows[0] + 1}: {problem}{more}")


class Vocabulary:
    """Numbers for values: those of training from 1 in order of their text, everything else 0."""

    def __init__(self, values: Array) -> None:
        import pandas as pd

        present = values[values != ""]
        self.index = pd.Index(np.unique(present.astype(str))) if present.size else pd.Index([], dtype=object)

    @property
    def num_ids(self) -> int:
        return len(self.index) + 1

    def ids(self, values: Array) -> Array:
        """``[n]`` int64."""
        return look_up(self.index.to_numpy(), values).astype(np.int64) + 1


def buckets(values: Array, training: Array, count: int) -> tuple[Array, int]:
    """Ids of numbers in ``count`` buckets that hold equally many of ``values[training]``, 0 missing; how many ids."""
    known = values[training & ~np.isnan(values)]
    edges = np.unique(np.quantile(known, np.linspace(0, 1, count + 1)[1:-1])) if known.size else np.zeros(0)
    ids = np.searchsorted(edges, values, side="right") + 1
    return np.where(np.isnan(values), 0, ids).astype(np.int64), len(edges) + 2


def look_up(keys: Array, wanted: Array) -> Array:
    """``[wanted]`` rows of ``keys``; -1 where it has none."""
    import pandas as pd

    return np.asarray(pd.Index(keys).get_indexer(pd.Index(wanted)))


def stack(columns: Sequence[Array], rows: int, dtype: Any) -> Array:
    """``[rows, columns]``, also without any column."""
    return np.stack(columns, 1).astype(dtype) if columns else np.zeros((rows, 0), dtype=dtype)
