"""The schema file of a ranking data set: which files and columns hold what. ``docs/ranking.md`` documents it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml

from hstu_plugin.ranking_config import Intensity, TaskConfig

T = TypeVar("T")
_TIME_UNITS = ("s", "ms")


class SchemaError(ValueError):
    """A schema, or settings, that cannot be used; the message names the place inside the file."""


@dataclass(frozen=True, kw_only=True)
class FeatureColumn:
    """A categorical column, or a number cut into buckets of equal counts.

    Attributes:
        column: in the file. buckets: how many, for numbers; ``None`` takes the values as they are.
    """

    column: str
    buckets: int | None = None

    def __post_init__(self) -> None:
        if self.buckets is not None and self.buckets < 2:
            raise ValueError(f"buckets: expected at least 2, got {self.buckets}")


@dataclass(frozen=True, kw_only=True)
class EventTable:
    """One row for each event.

    Attributes:
        file: beside the others. user, item, time: columns. time_unit: s or ms.
        drop_repeats: leave out rows that repeat user, item and time: the first would tell the label of the second.
        context: features known when the item is shown (a page, an hour).
    """

    file: str
    user: str = "user_id"
    item: str = "item_id"
    time: str = "timestamp"
    time_unit: str = "s"
    drop_repeats: bool = True
    context: tuple[FeatureColumn, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SideTable:
    """One row for each item or user.

    Attributes:
        file: beside the others; ``None`` with ``include_id`` alone. key: column of the id.
        features: columns. include_id: of users: the id itself is a feature, too.
    """

    file: str | None = None
    key: str = ""
    features: tuple[FeatureColumn, ...] = ()
    include_id: bool = False


@dataclass(frozen=True, kw_only=True)
class PastTable:
    """One row for each user: items before the first event, without what was done and when.

    Attributes:
        file, user: as above. items: column of lists, oldest first. last_time: column; the time given to all of them.
    """

    file: str
    items: str
    last_time: str
    user: str = "user_id"
    time_unit: str = "s"


@dataclass(frozen=True, kw_only=True)
class TypeColumn:
    """A type of action: a column of 0 and 1, or, with ``at_least``, of numbers that reach it."""

    column: str
    name: str = ""
    at_least: float | None = None


@dataclass(frozen=True, kw_only=True)
class IntensityColumn:
    """A number that belongs to an action, divided by column ``per`` where given; missing where that is not > 0."""

    column: str
    boundaries: tuple[float, ...]
    name: str = ""
    per: str | None = None


@dataclass(frozen=True, kw_only=True)
class Actions:
    """What is known about an action once it was done."""

    types: tuple[TypeColumn, ...] = ()
    intensities: tuple[IntensityColumn, ...] = ()
    contexts: tuple[FeatureColumn, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TaskColumn:
    """A label: ``column``, made binary by ``at_least`` where given; a missing value is a missing label."""

    task: TaskConfig
    column: str
    at_least: float | None = None


@dataclass(frozen=True, kw_only=True)
class Split:
    """Chronological: events from ``valid_from`` on validate, from ``test_from`` on test, in epoch seconds; or shares.

    Attributes:
        valid_from, test_from: times. valid, test: shares of the latest events, in place of times.
    """

    valid_from: float | None = None
    test_from: float | None = None
    valid: float | None = None
    test: float | None = None


@dataclass(frozen=True, kw_only=True)
class Schema:
    """A data set for ranking."""

    name: str
    events: EventTable
    tasks: tuple[TaskColumn, ...]
    split: Split
    items: SideTable | None = None
    users: SideTable | None = None
    past: PastTable | None = None
    actions: Actions = field(default_factory=Actions)
    series: tuple[FeatureColumn, ...] = ()


def read_schema(path: Path) -> Schema:
    """The schema in a YAML file.

    Raises:
        SchemaError: the file cannot be read, a key is unknown or missing, or a value is none.
    """
    return parse_schema(read_yaml(path), str(path))


def read_yaml(path: Path) -> Mapping[str, Any]:
    """A YAML file that holds a mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SchemaError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeError) as error:
        raise SchemaError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    return _mapping(content, str(path))


def parse_schema(content: Mapping[str, Any], where: str) -> Schema:
    """A schema from plain values; ``where`` names them in messages."""

    def table(cls: type[T], **inner: Callable[[Any, str], Any]) -> Callable[[Any, str], T]:
        return lambda value, place: build(cls, _mapping(value, place), place, inner)

    columns = _each(_feature)
    schema = build(
        Schema,
        _mapping(content, where),
        where,
        {
            "events": table(EventTable, context=columns),
            "items": table(SideTable, features=columns),
            "users": table(SideTable, features=columns),
            "past": table(PastTable),
            "actions": table(
                Actions, types=_each(_action_type), intensities=_each(table(IntensityColumn)), contexts=columns
            ),
            "series": columns,
            "tasks": _each(_task),
            "split": _split,
        },
    )
    if not schema.tasks:
        raise SchemaError(f"{where}, tasks: expected at least one")
    for table_name, unit in (("events", schema.events.time_unit), ("past", schema.past and schema.past.time_unit)):
        if unit is not None and unit not in _TIME_UNITS:
            raise SchemaError(f"{where}, {table_name}, time_unit: expected s or ms, got {unit!r}")
    for index, column in enumerate(schema.actions.intensities):
        with_place(
            f"{where}, actions, intensities[{index}]", Intensity, name=column.column, boundaries=column.boundaries
        )
    return schema


def build(
    cls: type[T], content: Mapping[str, Any], where: str, inner: Mapping[str, Callable[[Any, str], Any]] | None = None
) -> T:
    """A dataclass from a mapping: unknown and missing keys are errors, ``inner`` reads the values of some keys."""
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    unknown = [key for key in content if key not in known]
    if unknown:
        raise SchemaError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(known)}")
    missing = [
        n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING and n not in content
    ]
    if missing:
        raise SchemaError(f"{where}: the key {missing[0]!r} is missing")
    values = {}
    for key, value in content.items():
        place, read = f"{where}, {key}", (inner or {}).get(key)
        if read is not None:
            value = read(value, place) if value is not None else None
        elif isinstance(value, list):
            value = tuple(value)
        else:
            _check_kind(value, str(known[key].type), place)
        if value is not None or "None" in str(known[key].type):
            values[key] = value
    return with_place(where, cls, **values)


def with_place(where: str, make: Callable[..., T], /, **values: Any) -> T:
    """``make(**values)``, with the place in front of what it complains about."""
    try:
        return make(**values)
    except (ValueError, TypeError) as error:
        if isinstance(error, SchemaError):
            raise
        raise SchemaError(f"{where}, {error}") from None


def _check_kind(value: Any, kind: str, place: str) -> None:
    kinds: dict[str, Any] = {"str": str, "bool": bool, "int": int, "float": (int, float)}
    wanted = kinds.get(kind.removesuffix(" | None"))
    if wanted is None or (value is None and kind.endswith("| None")):
        return
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise SchemaError(f"{place}: expected {kind.removesuffix(' | None')}, got {value!r}")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise SchemaError(f"{where}: expected `name: value` lines, got {value!r}")
    return value


def _each(read: Callable[[Any, str], T]) -> Callable[[Any, str], tuple[T, ...]]:
    def all_of(value: Any, where: str) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise SchemaError(f"{where}: expected a list, got {value!r}")
        return tuple(read(item, f"{where}[{index}]") for index, item in enumerate(value))

    return all_of


def _feature(value: Any, where: str) -> FeatureColumn:
    return build(FeatureColumn, {"column": value} if isinstance(value, str) else _mapping(value, where), where)


def _action_type(value: Any, where: str) -> TypeColumn:
    return build(TypeColumn, {"column": value} if isinstance(value, str) else _mapping(value, where), where)


def _task(value: Any, where: str) -> TaskColumn:
    content = dict(_mapping(value, where))
    own: dict[str, Any] = {key: content.pop(key) for key in ("column", "at_least") if key in content}
    task = build(TaskConfig, content, where)
    return build(TaskColumn, {"task": task, "column": task.name, **own}, where)


def _split(value: Any, where: str) -> Split:
    content = _mapping(value, where)
    times = {key: _seconds(content[key], f"{where}, {key}") for key in ("valid_from", "test_from") if key in content}
    split = build(Split, {**content, **times}, where)
    shares, moments = (split.valid, split.test), (split.valid_from, split.test_from)
    if moments != (None, None):
        valid_from, test_from = moments
        if shares != (None, None) or valid_from is None or test_from is None or valid_from > test_from:
            raise SchemaError(f"{where}: expected valid_from <= test_from, or the shares valid and test, got {value!r}")
    else:
        valid, test = shares
        if valid is None or test is None or min(valid, test) < 0 or valid + test >= 1:
            raise SchemaError(f"{where}: expected shares valid and test with a sum below 1, got {value!r}")
    return split


def _seconds(value: Any, where: str) -> float:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise SchemaError(f"{where}: expected a date such as 2022-05-05 or epoch seconds, got {value!r}") from None
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise SchemaError(f"{where}: expected a date such as 2022-05-05 or epoch seconds, got {value!r}")
