"""Tables to event logs: what is read, how it is numbered and split, and errors that name file, column and row."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hstu_plugin.adapters.ranking import dataset, tables
from hstu_plugin.adapters.ranking.dataset import PAST, TEST, TRAIN, VALID, load
from hstu_plugin.adapters.ranking.schema import SchemaError, parse_schema
from hstu_plugin.adapters.ranking.tables import DataError

from . import conftest
from .conftest import SCHEMA, write_data


def small() -> dict[str, pd.DataFrame]:
    events = pd.DataFrame(
        {
            "user_id": ["b", "a", "a", "b", "a", "b", "b"],
            "item_id": [7, 3, 7, 3, 9, 3, 7],
            "timestamp": [50.0, 10.0, 20.5, 60.25, 40.0, 60.25, 70.0],
            "click": [1, 0, 1, 0, 1, 0, 1],
            "rating": [5.0, np.nan, 4.0, 1.0, 3.0, 1.0, np.nan],
            "seconds": [30.0, 5.0, 60.0, 0.0, 6.0, 0.0, 1.0],
            "length": [60.0, 10.0, 0.0, 60.0, 60.0, 60.0, np.nan],
            "city": ["x", "x", None, "y", "z", "y", "x"],
            "device": ["d"] * 7,
            "page": ["p", "q", "p", "p", "new", "p", "p"],
        }
    )
    past = pd.DataFrame({"user_id": ["b", "stranger"], "items": [[9, 9], [3]], "last": [5, 5]})
    items = pd.DataFrame({"item_id": [3, 7, 9], "kind": ["k", None, "l"], "length": [1.0, 2.0, 3.0]})
    users = pd.DataFrame({"user_id": ["b", "c"], "age": [30.0, 40.0]})
    return {"events": events, "past": past, "items": items, "users": users}


SMALL_SCHEMA = {**SCHEMA, "split": {"valid_from": 40, "test_from": 60}}


def read(tmp_path: Path, schema: dict[str, Any] | None = None, **changed: pd.DataFrame) -> dataset.RankingData:
    folder = write_data(tmp_path / "data", **{**small(), **changed})
    return load(parse_schema(schema or SMALL_SCHEMA, "schema"), folder)


def test_every_column_of_the_log(tmp_path: Path) -> None:
    data = read(tmp_path)
    log, events = data.log, data.log.events
    # User a: 3, 7, 9. User b: past 9, 9, then 7, 3, 7; the repeat of 3 at 60.25 is left out.
    assert events.layout.seq_offsets.tolist() == [0, 3, 8]
    assert events.timestamps is not None and events.timestamps.tolist() == [10, 20, 40, 5, 5, 50, 60, 70]
    assert log.roles.tolist() == [TRAIN, TRAIN, VALID, PAST, PAST, VALID, TEST, TEST]
    assert data.facts["events"] == {"past": 2, "train": 2, "valid": 2, "test": 2}
    assert data.facts["repeats_left_out"] == 1
    # Items in training and past: 3, 7, 9. Kind: "k", missing, "l". Length buckets. Page: p, q; "new" is unknown.
    assert [f.name for f in data.features.items] == ["item", "kind", "length", "page"]
    assert events.items[:, 0].tolist() == [1, 2, 3, 3, 3, 2, 1, 2]
    assert events.items[:, 1].tolist() == [1, 0, 2, 2, 2, 0, 1, 0]
    assert events.items[:, 3].tolist() == [2, 1, 0, 0, 0, 1, 1, 1]
    # click, liked (rating >= 4).
    assert events.action_types.tolist() == [0b00, 0b11, 0b01, -1, -1, 0b11, 0b00, 0b01]
    watched = [0.5, np.nan, 0.1, np.nan, np.nan, 0.5, 0.0, np.nan]
    assert np.allclose(events.intensities[:, 0], watched, equal_nan=True)
    assert events.series[:, 0].tolist() == [1, 0, 0, 0, 0, 1, 0, 1]
    assert events.action_contexts[:, 0].tolist() == [1, 1, 1, 0, 0, 1, 1, 1]
    labels = [[0, np.nan], [1, 4], [1, 3], [np.nan] * 2, [np.nan] * 2, [1, 5], [0, 1], [1, np.nan]]
    assert np.allclose(log.labels, labels, equal_nan=True)
    # The user's id, and the age: a is not in the file of users.
    assert [f.name for f in data.features.users] == ["user", "age"]
    assert log.users.tolist() == [[1, 0], [2, 1]]
    assert data.facts["train_means"] == {"click": 0.5, "rating": 4.0}


def test_the_order_of_the_rows_does_not_matter(tmp_path: Path) -> None:
    log = read(tmp_path).log
    turned = read(tmp_path / "turned", events=small()["events"].iloc[::-1]).log
    for name in ("items", "timestamps", "action_types", "series"):
        assert torch.equal(getattr(turned.events, name), getattr(log.events, name))
    assert torch.equal(turned.labels.nan_to_num(-1), log.labels.nan_to_num(-1))


def test_shares_split_by_time_over_all_users(data_dir: Path) -> None:
    data = load(parse_schema(SCHEMA, "schema"), data_dir)
    times, roles = data.log.events.timestamps, data.log.roles
    assert times is not None
    total = conftest.USERS * conftest.EVENTS
    counts = [int((roles == role).sum()) for role in (TRAIN, VALID, TEST)]
    assert counts == [round(total * 0.6), round(total * 0.2), round(total * 0.2)]
    assert times[roles == TRAIN].max() < times[roles == VALID].min()
    assert times[roles == VALID].max() < times[roles == TEST].min()


def test_ids_fit_their_tables(data_dir: Path) -> None:
    data = load(parse_schema(SCHEMA, "schema"), data_dir)
    events, features = data.log.events, data.features
    for ids, columns in (
        (events.items, features.items),
        (data.log.users, features.users),
        (events.series, features.series),
        (events.action_contexts, features.action_contexts),
    ):
        assert ids.min() >= 0
        assert (ids.amax(0) < torch.tensor([c.num_ids for c in columns])).all()


def changed(table: str, column: str, row: int, value: Any) -> dict[str, pd.DataFrame]:
    frame = small()[table]
    frame[column] = frame[column].astype(object)
    frame.at[row, column] = value
    return {table: frame.convert_dtypes() if table != "past" else frame}


@pytest.mark.parametrize(
    ("table", "column", "row", "value", "message"),
    [
        ("events", "user_id", 2, None, r"events.parquet, column user_id, row 3: the id is missing"),
        ("events", "timestamp", 1, -5.0, r"column timestamp, row 2: the time lies before 1970"),
        ("events", "timestamp", 4, 1.6e12, r"column timestamp, row 5: the time lies after .* time_unit: ms"),
        ("events", "click", 3, 2, r"column click, row 4: expected 0 or 1, got 2; or give at_least"),
        ("items", "item_id", 2, 3, r"items.parquet, column item_id, row 3: the id stands here for the second time"),
        ("past", "items", 0, None, r"past.parquet, column items, row 1: expected a list"),
        ("past", "last", 0, 51, r"past.parquet, column last, row 1: the past ends after the user's first event"),
    ],
)
def test_a_bad_value_is_named_with_its_row(
    tmp_path: Path, table: str, column: str, row: int, value: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, **changed(table, column, row, value))


def test_text_where_a_number_belongs_is_named(tmp_path: Path) -> None:
    frame = small()["events"]
    frame["rating"] = ["5", "x", "4", "y", "3", "1", None]
    with pytest.raises(DataError, match=r"column rating, row 2: expected a number, got 'x' \(and 1 more rows\)"):
        read(tmp_path, events=frame)


def test_missing_files_columns_and_kinds_are_named(tmp_path: Path) -> None:
    schema = copy.deepcopy(SMALL_SCHEMA)
    schema["events"]["file"] = "absent.parquet"
    with pytest.raises(DataError, match=r"absent\.parquet: no such file"):
        read(tmp_path, schema)
    with pytest.raises(DataError, match=r"no column click; the file has: user_id"):
        read(tmp_path, events=small()["events"].drop(columns="click"))
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"broken\.parquet: not readable"):
        tables.Table(broken)
    with pytest.raises(DataError, match=r"expected a \.parquet"):
        tables.Table(write_other(tmp_path))
    with pytest.raises(DataError, match="there are no rows"):
        read(tmp_path, events=small()["events"].iloc[:0])


def write_other(tmp_path: Path) -> Path:
    path = tmp_path / "data.xlsx"
    path.write_text("x", encoding="utf-8")
    return path


def test_a_split_without_events_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the split leaves no test events"):
        read(tmp_path, {**SMALL_SCHEMA, "split": {"valid_from": 40, "test_from": 90}})


def test_text_tables_and_typed_column_names(tmp_path: Path) -> None:
    path = tmp_path / "items.item"
    path.write_text("item_id:token\tkind:token_seq\n3\tDrama Comedy\n7\t\n", encoding="utf-8")
    table = tables.Table(path)
    assert table.keys("item_id").tolist() == ["3", "7"]
    assert table.categories("kind").tolist() == ["Drama Comedy", ""]
    assert table.keys("item_id:token").tolist() == ["3", "7"]


def test_whole_floats_and_ints_are_the_same_id(tmp_path: Path) -> None:
    a, b = tmp_path / "a.parquet", tmp_path / "b.parquet"
    pd.DataFrame({"x": [1.0, 2.0, np.nan]}).to_parquet(a)
    pd.DataFrame({"x": [1, 2]}).to_parquet(b)
    assert tables.Table(a).categories("x").tolist() == ["1", "2", ""]
    assert tables.Table(b).categories("x").tolist() == ["1", "2"]


def test_buckets_hold_equally_many_of_training() -> None:
    values = np.append(np.arange(100.0), np.nan)
    ids, num_ids = tables.buckets(values, np.arange(101) < 80, 4)
    assert np.bincount(ids[:80]).tolist() == [0, 20, 20, 20, 20]
    assert ids[100] == 0 and ids[99] == 4 and num_ids == 5


def test_without_pandas_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[ranking\]'"):
        tables.require_pandas()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("evnts",), {}, "schema: unknown key 'evnts'; known: name, events"),
        (("events", "file"), None, "schema, events: .*missing|schema, events, file: expected str"),
        (("events", "file"), 3, "schema, events, file: expected str, got 3"),
        (("events", "time_unit"), "us", "schema, events, time_unit: expected s or ms"),
        (("events", "context"), "page", r"schema, events, context: expected a list"),
        (("items", "features"), [{"column": "x", "buckets": 1}], r"items, features\[0\], buckets: expected at least 2"),
        (
            ("actions", "intensities"),
            [{"column": "x", "boundaries": [2, 1]}],
            r"intensities\[0\], boundaries: expected",
        ),
        (("tasks",), [], "schema, tasks: expected at least one"),
        (("tasks",), [{"name": "a", "kind": "order"}], r"schema, tasks\[0\], kind: expected one of binary, regression"),
        (("split",), {"valid": 0.5, "test": 0.6}, "schema, split: expected shares"),
        (("split",), {"valid_from": 5}, "schema, split: expected valid_from <= test_from"),
        (("split",), {"valid_from": "may", "test_from": 5}, "schema, split, valid_from: expected a date"),
        (("name",), None, "schema, name: expected str|schema: the key 'name' is missing"),
    ],
)
def test_a_wrong_schema_is_named_with_its_place(path: tuple[str, ...], value: Any, message: str) -> None:
    content = copy.deepcopy(SCHEMA)
    inner = content
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    with pytest.raises(SchemaError, match=message):
        parse_schema(content, "schema")


def test_dates_are_utc_unless_they_say_otherwise() -> None:
    def first(text: Any) -> float | None:
        return parse_schema({**SCHEMA, "split": {"valid_from": text, "test_from": 4e9}}, "schema").split.valid_from

    assert first("1970-01-02") == 86_400
    assert first("1970-01-02T00:00:00+08:00") == 86_400 - 8 * 3_600
    assert first(__import__("datetime").date(1970, 1, 2)) == 86_400
