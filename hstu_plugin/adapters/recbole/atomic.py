"""Interaction tables to RecBole's atomic files, checked; the work behind ``hstu-data``.

RecBole sorts by time after rounding it to float32, in steps of 64 to 128 s for today's epoch seconds, and its sort is
stable. Rows written here stand in true chronological order per user, so that the rounded sort leaves them as they are.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

TimeUnit = Literal["s", "ms"]
# 2100-01-01: a later time is one in another unit.
_LATEST_SECONDS = 4_102_444_800
FIELD_TYPES = ("token", "token_seq", "float", "float_seq")
ALIASES: Mapping[str, tuple[str, ...]] = {
    "user": ("user_id", "userId", "user", "uid", "reviewerID"),
    "item": ("item_id", "itemId", "movieId", "item", "iid", "asin"),
    "time": ("timestamp", "time", "ts", "unixReviewTime"),
    "rating": ("rating", "overall"),
}
# What pandas reads as a missing value, and RecBole reads with pandas.
_MISSING = frozenset(
    "#N/A,#N/A N/A,#NA,-1.#IND,-1.#QNAN,-NaN,-nan,1.#IND,1.#QNAN,<NA>,N/A,NA,NULL,NaN,None,n/a,nan,null".split(",")  # noqa: SIM905
)


class DataError(ValueError):
    """The data cannot be used; the message names file, column and row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interactions:
    """Checked interactions, in file order or in the order to write.

    Attributes:
        users, items: tokens, ``[n]`` str.
        times: ``[n]`` int64 in thousandths of a second.
        ratings: ``[n]`` float64, or None.
    """

    users: np.ndarray[Any, Any]
    items: np.ndarray[Any, Any]
    times: np.ndarray[Any, Any]
    ratings: np.ndarray[Any, Any] | None = None

    def __len__(self) -> int:
        return len(self.users)

    def take(self, rows: np.ndarray[Any, Any]) -> Interactions:
        """These rows, in this order."""
        ratings = None if self.ratings is None else self.ratings[rows]
        return Interactions(users=self.users[rows], items=self.items[rows], times=self.times[rows], ratings=ratings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Facts about interactions; ``lengths`` by quantile, ``tied_pairs`` is a share of adjacent pairs of a user."""

    users: int
    items: int
    interactions: int
    density: float
    lengths: Mapping[str, float]
    tied_pairs: float
    first_second: float
    last_second: float
    repeated_pairs: int
    repeated_rows: int
    chronological: bool


def read_table(path: Path, *, separator: str | None = None) -> pd.DataFrame:
    """A Parquet file, or delimited text with one header line; text columns stay text.

    Raises:
        DataError: the file is absent, empty, corrupt or of an unknown kind.
    """
    import pandas as pd

    if not path.is_file():
        raise DataError(f"{path}: no such file")
    suffix = next((s for s in reversed(path.suffixes) if s not in (".gz", ".zip", ".bz2", ".xz")), "").lower()
    if suffix in (".parquet", ".pq"):
        try:
            frame = pd.read_parquet(path)
        except Exception as error:  # pyarrow's own classes differ by the place that noticed
            raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
    elif suffix in (".csv", ".tsv", ".txt", ".inter"):
        chosen = separator or ("," if suffix == ".csv" else "\t")
        try:
            # No value counts as missing yet, so that an item called "NA" is noticed and not lost.
            frame = pd.read_csv(
                path, sep=chosen, dtype=str, keep_default_na=False, na_values=[""], skip_blank_lines=False
            )
        except pd.errors.EmptyDataError:
            raise DataError(f"{path}: the file is empty") from None
        except (pd.errors.ParserError, UnicodeError, OSError) as error:
            raise DataError(f"{path}: not readable as text delimited by {chosen!r} ({error})") from None
    else:
        raise DataError(f"{path}: expected a .parquet, .csv, .tsv, .txt or .inter file, got {suffix or 'no suffix'!r}")
    if frame.empty:
        raise DataError(f"{path}: there are no rows")
    return frame


def find_column(columns: Sequence[str], role: str, wanted: str | None, source: Path) -> str | None:
    """The column of a role: the wanted one, else the first known name; with or without a type such as ``:token``.

    Returns:
        The column's name in the file. None only for a rating that nobody asked for.

    Raises:
        DataError: the column is not there; the message lists those that are.
    """
    bare = {str(c).partition(":")[0]: str(c) for c in reversed(list(columns))}
    for name in (wanted,) if wanted else ALIASES[role]:
        if name in columns:
            return name
        if name in bare:
            return bare[name]
    if role == "rating" and not wanted:
        return None
    looked = repr(wanted) if wanted else f"one of {', '.join(ALIASES[role])}"
    there = ", ".join(str(c) for c in columns)
    raise DataError(f"{source}: no {role} column: looked for {looked}; the file has: {there}. Name it with --{role}.")


def load(
    path: Path,
    *,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    rating: str | None = None,
    with_rating: bool = True,
    unit: TimeUnit = "s",
    separator: str | None = None,
) -> Interactions:
    """Read and check a table.

    Args:
        path: the file.
        user, item, time, rating: columns; by default those with a usual name.
        with_rating: False leaves a rating column out.
        unit: of the times.
        separator: of delimited text; by default from the suffix.

    Raises:
        DataError: as read_table, find_column; a missing or impossible value, with its row.
    """
    frame = read_table(path, separator=separator)
    columns = [str(c) for c in frame.columns]
    frame = frame.set_axis(columns, axis=1)
    wanted = {"user": user, "item": item, "time": time}
    names = {role: find_column(columns, role, name, path) for role, name in wanted.items()}
    rating_name = find_column(columns, "rating", rating, path) if with_rating else None
    # Text files have a header line; rows of others are counted from 1.
    where = _Where(path, "line", 2) if path.suffix not in (".parquet", ".pq") else _Where(path, "row", 1)
    ratings = None
    if rating_name is not None:
        ratings = _numbers(frame[rating_name], where, rating_name)
    return Interactions(
        users=_tokens(frame[names["user"]], where, str(names["user"])),
        items=_tokens(frame[names["item"]], where, str(names["item"])),
        times=_times(frame[names["time"]], where, str(names["time"]), unit),
        ratings=ratings,
    )


def chronological(data: Interactions) -> Interactions:
    """Users in order of first appearance, each one's rows by time; rows of one time keep their order."""
    return data.take(np.lexsort((data.times, _codes(data.users))))


def without_repeats(data: Interactions) -> Interactions:
    """Without rows that repeat user, item and time of an earlier one."""
    return data.take(np.flatnonzero(~_repeats(data)))


def summarize(data: Interactions) -> Summary:
    """Count; ``chronological`` says whether rows of a user stand in order of time as they are."""
    users, items = _codes(data.users), _codes(data.items)
    lengths = np.bincount(users)
    by_user = np.argsort(users, kind="stable")
    same_user = np.diff(users[by_user]) == 0
    in_place = bool((np.diff(data.times[by_user])[same_user] >= 0).all())
    ordered = np.lexsort((data.times, users))
    tied = (np.diff(data.times[ordered]) == 0) & same_user
    pairs = int(same_user.sum())
    quantiles = {"min": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "90 %": 0.9, "99 %": 0.99, "max": 1.0}
    n_users, n_items = len(lengths), int(items.max()) + 1
    return Summary(
        users=n_users,
        items=n_items,
        interactions=len(data),
        density=len(data) / (n_users * n_items),
        lengths={name: float(np.quantile(lengths, q)) for name, q in quantiles.items()},
        tied_pairs=int(tied.sum()) / pairs if pairs else 0.0,
        first_second=float(data.times.min()) / 1000,
        last_second=float(data.times.max()) / 1000,
        repeated_pairs=len(data) - len(np.unique(users.astype(np.int64) * n_items + items)),
        repeated_rows=int(_repeats(data).sum()),
        chronological=in_place,
    )


def write_inter(data: Interactions, path: Path) -> TimeUnit:
    """Write a ``.inter`` file, all of it or nothing.

    Returns:
        Unit of the times in the file: seconds, or milliseconds where seconds would not be whole numbers.
    """
    import pandas as pd

    unit: TimeUnit = "ms" if (data.times % 1000).any() else "s"
    columns: dict[str, Any] = {"user_id:token": data.users, "item_id:token": data.items}
    if data.ratings is not None:
        whole_ratings = bool((data.ratings % 1 == 0).all())
        columns["rating:float"] = data.ratings.astype(np.int64) if whole_ratings else data.ratings
    columns["timestamp:float"] = data.times // 1000 if unit == "s" else data.times
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            pd.DataFrame(columns).to_csv(file, sep="\t", index=False, lineterminator="\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return unit


def check_directory(directory: Path, unit: TimeUnit = "s") -> tuple[Interactions, list[str]]:
    """Check an atomic data set, ``DIR/NAME.inter`` with DIR named NAME, and the ``.item`` file beside it.

    Returns:
        The interactions in file order, and remarks about what is unusual but works.

    Raises:
        DataError: RecBole could not read it, or would read it wrongly.
    """
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory")
    inter = directory / f"{directory.resolve().name}.inter"
    if not inter.is_file():
        there = ", ".join(sorted(p.name for p in directory.iterdir())) or "nothing"
        raise DataError(f"{directory}: expected {inter.name}, named as its directory; the directory has: {there}")
    header = _header(inter)
    for field in ("user_id", "item_id", "timestamp"):
        if field not in header:
            raise DataError(f"{inter}: the header lacks {field}; it has: {', '.join(header)}")
    data = load(inter, user="user_id", item="item_id", time="timestamp", with_rating="rating" in header, unit=unit)
    if unit == "s" and (data.times % 1000).any():
        raise DataError(f"{inter}: times are no whole seconds; write milliseconds and train with timestamp_unit: ms")
    remarks = []
    item_file = inter.with_suffix(".item")
    if item_file.is_file():
        remarks += _check_items(item_file, data)
    return data, remarks


@dataclass(frozen=True, slots=True)
class _Where:
    """Turns a row's index into words."""

    path: Path
    unit: str
    first: int

    def error(self, column: str, bad: np.ndarray[Any, Any], problem: str) -> DataError:
        rows = np.flatnonzero(bad)
        more = f" (and {len(rows) - 1:,} more)" if len(rows) > 1 else ""
        return DataError(f"{self.path}, column {column}, {self.unit} {rows[0] + self.first}: {problem}{more}")


def _tokens(series: pd.Series[Any], where: _Where, column: str) -> np.ndarray[Any, Any]:
    missing = series.isna().to_numpy()
    if missing.any():
        raise where.error(column, missing, "the value is missing")
    if series.dtype.kind == "f":
        values = series.to_numpy()
        broken = ~np.isfinite(values) | (values % 1 != 0)
        if broken.any():
            raise where.error(column, broken, f"expected an id, got {values[broken][0]}")
        series = series.astype(np.int64)
    tokens = series.astype(str)
    text = tokens.to_numpy(dtype=object)
    for bad, problem in (
        (tokens.str.strip().eq(""), "the token is empty"),
        (tokens.str.contains(r"[\t\r\n]", regex=True), "the token {!r} holds a tab or a line break"),
        (tokens.str.contains('"', regex=False), "the token {!r} holds a quotation mark, which RecBole would misread"),
        (tokens.isin(_MISSING), "the token {!r} would be read as a missing value"),
    ):
        flags = bad.to_numpy()
        if flags.any():
            raise where.error(column, flags, problem.format(text[flags][0]))
    return text


def _numbers(series: pd.Series[Any], where: _Where, column: str) -> np.ndarray[Any, Any]:
    import pandas as pd

    missing = series.isna().to_numpy()
    if missing.any():
        raise where.error(column, missing, "the value is missing")
    values = pd.to_numeric(series, errors="coerce").to_numpy(dtype=np.float64)
    bad = ~np.isfinite(values)
    if bad.any():
        raise where.error(column, bad, f"expected a number, got {series.to_numpy()[bad][0]!r}")
    return values


def _times(series: pd.Series[Any], where: _Where, column: str, unit: TimeUnit) -> np.ndarray[Any, Any]:
    import pandas as pd

    if isinstance(series.dtype, pd.DatetimeTZDtype) or series.dtype.kind == "M":
        missing = series.isna().to_numpy()
        if missing.any():
            raise where.error(column, missing, "the value is missing")
        utc = (
            series.dt.tz_convert("UTC").dt.tz_localize(None) if isinstance(series.dtype, pd.DatetimeTZDtype) else series
        )
        thousandths = utc.to_numpy().astype("datetime64[ms]").astype(np.int64)
    else:
        # A float64 holds thousandths of today's epoch seconds exactly enough to round back.
        thousandths = np.rint(_numbers(series, where, column) * (1000 if unit == "s" else 1)).astype(np.int64)
    shown = series.to_numpy()
    negative = thousandths < 0
    if negative.any():
        raise where.error(column, negative, f"the time {shown[negative][0]} lies before 1970")
    late = thousandths > _LATEST_SECONDS * 1000
    if late.any():
        hint = ". Milliseconds? Say --time-unit ms" if unit == "s" else ". Finer than milliseconds? Divide it first"
        raise where.error(column, late, f"the time {shown[late][0]} lies after the year 2100{hint}")
    return thousandths


def _codes(tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Numbers by first appearance."""
    import pandas as pd

    codes, _ = pd.factorize(tokens)
    return codes.astype(np.int64)


def _repeats(data: Interactions) -> np.ndarray[Any, Any]:
    import pandas as pd

    frame = pd.DataFrame({"u": _codes(data.users), "i": _codes(data.items), "t": data.times})
    return frame.duplicated().to_numpy()


def _header(path: Path) -> dict[str, str]:
    """Type by field name of an atomic file."""
    with path.open(encoding="utf-8") as file:
        line = file.readline().rstrip("\r\n")
    if not line:
        raise DataError(f"{path}: the file is empty")
    fields = {}
    for entry in line.split("\t"):
        name, _, kind = entry.partition(":")
        if kind not in FIELD_TYPES:
            raise DataError(
                f"{path}, line 1: expected fields such as user_id:token, separated by tabs, with a type of "
                f"{', '.join(FIELD_TYPES)}; got {entry!r}"
            )
        fields[name] = kind
    return fields


def _check_items(path: Path, data: Interactions) -> list[str]:
    header = _header(path)
    if next(iter(header)) != "item_id":
        raise DataError(f"{path}: expected item_id as the first field, got {next(iter(header))!r}")
    with path.open(encoding="utf-8", errors="replace") as file:
        next(file)
        listed = [line.split("\t", 1)[0].strip() for line in file]
    remarks = []
    if len(set(listed)) < len(listed):
        remarks.append(f"{path.name}: {len(listed) - len(set(listed))} repeated item_id; RecBole keeps one of each")
    lacking = set(data.items.tolist()) - set(listed)
    if lacking:
        remarks.append(f"{path.name}: {len(lacking)} items of the interactions are not in it, such as {min(lacking)!r}")
    return remarks
