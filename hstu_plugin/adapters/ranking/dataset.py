"""From tables to an event log: vocabularies of the training time, chronological roles, labels and actions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hstu_kernels import JaggedLayout
from hstu_plugin.adapters.ranking.schema import FeatureColumn, Schema, SideTable
from hstu_plugin.adapters.ranking.tables import Array, DataError, Table, Vocabulary, buckets, look_up, stack
from hstu_plugin.events import UNKNOWN_ACTION, Events
from hstu_plugin.ranking_config import Categorical, Intensity, RankingFeatures, TaskConfig
from hstu_plugin.ranking_windows import EventLog

PAST, TRAIN, VALID, TEST = 0, 1, 2, 3
ACTION_PARTS = ("types", "intensities", "contexts")
ROLES = {"train": TRAIN, "valid": VALID, "test": TEST}


@dataclass(frozen=True, kw_only=True)
class RankingData:
    """A data set, ready to be cut into windows.

    Attributes:
        name: of the schema.
        log: on the CPU; roles are ``PAST``, ``TRAIN``, ``VALID``, ``TEST``.
        features: in the summed form; item features begin with the item's id.
        tasks: in the labels' order.
        facts: counts, for the record.
    """

    name: str
    log: EventLog
    features: RankingFeatures
    tasks: tuple[TaskConfig, ...]
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Event rows in final order; ``source`` is the row of the event table, -1 for past items."""

    users: Array
    items: Array
    seconds: Array
    roles: Array
    source: Array


def load(schema: Schema, directory: Path) -> RankingData:
    """Read the schema's files in ``directory``.

    Raises:
        DataError: a file, column or value cannot be used; the message names it and the row.
    """
    table = Table(directory / schema.events.file)
    rows, dropped = _ordered(schema, table, directory)
    seen = (rows.roles == PAST) | (rows.roles == TRAIN)
    item_ids, item_features = _item_features(schema, directory, table, rows, seen)
    context = [_feature(table, column, rows, seen) for column in schema.events.context]
    series = [_feature(table, column, rows, seen) for column in schema.series]
    contexts = [_feature(table, column, rows, seen) for column in schema.actions.contexts]
    offsets, user_names = _user_offsets(rows.users)
    user_ids, user_features = _user_features(schema, directory, user_names, np.unique(rows.users[seen].astype(str)))
    types, type_names = _action_types(schema, table, rows)
    labels = _labels(schema, table, rows)
    intensities = [_intensity(table, column.column, column.per, rows) for column in schema.actions.intensities]
    total = len(rows.users)
    events = Events(
        JaggedLayout(torch.from_numpy(offsets), int(np.diff(offsets).max())),
        torch.from_numpy(stack([*item_ids, *(ids for ids, _ in context)], total, np.int64)),
        torch.from_numpy(rows.seconds),
        torch.from_numpy(types),
        torch.from_numpy(stack(intensities, total, np.float32)),
        torch.from_numpy(stack([ids for ids, _ in contexts], total, np.int64)),
        torch.from_numpy(stack([ids for ids, _ in series], total, np.int64)),
    )
    users = torch.from_numpy(stack(user_ids, len(user_names), np.int64))
    log = EventLog(events, users, torch.from_numpy(labels), torch.from_numpy(rows.roles))
    features = RankingFeatures(
        items=(*item_features, *(feature for _, feature in context)),
        action_types=type_names,
        intensities=tuple(
            Intensity(name=column.name or column.column, boundaries=column.boundaries)
            for column in schema.actions.intensities
        ),
        action_contexts=tuple(feature for _, feature in contexts),
        users=tuple(user_features),
        series=tuple(feature for _, feature in series),
    )
    tasks = tuple(column.task for column in schema.tasks)
    facts = _facts(rows, labels, tasks, dropped)
    for name, role in ROLES.items():
        if not facts["events"][name]:
            raise DataError(f"{table.path}: the split leaves no {name} events; move its times or shares")
        if role == TRAIN:
            for task, count in zip(tasks, np.isfinite(labels[rows.roles == TRAIN]).sum(0), strict=True):
                if not count:
                    raise DataError(f"{table.path}: no train event has a label of task {task.name}")
    return RankingData(name=schema.name, log=log, features=features, tasks=tasks, facts=facts)


def without_actions(data: RankingData, parts: Collection[str]) -> RankingData:
    """The data with parts of the actions left out of the history, to measure what they are worth; labels stay.

    Args:
        parts: of ``types``, ``intensities``, ``contexts``. Without types an event still tells that it was shown.
    """
    unknown = sorted(set(parts) - set(ACTION_PARTS))
    if unknown:
        raise ValueError(f"without_actions: expected names among {', '.join(ACTION_PARTS)}, got {unknown[0]!r}")
    events, features = data.log.events, data.features
    if "types" in parts:
        # -1, nobody knows, stays.
        events = replace(events, action_types=events.action_types.clamp(max=0))
        features = replace(features, action_types=())
    if "intensities" in parts:
        events, features = replace(events, intensities=events.intensities[:, :0]), replace(features, intensities=())
    if "contexts" in parts:
        none = events.action_contexts[:, :0]
        events, features = replace(events, action_contexts=none), replace(features, action_contexts=())
    return replace(data, log=replace(data.log, events=events), features=features)


def _ordered(schema: Schema, table: Table, directory: Path) -> tuple[_Rows, int]:
    columns = schema.events
    users, items = table.keys(columns.user), table.keys(columns.item)
    times = table.times(columns.time, columns.time_unit)
    source = np.arange(len(users))
    dropped = 0
    if columns.drop_repeats:
        import pandas as pd

        repeated = pd.DataFrame({"u": users, "i": items, "t": times}).duplicated().to_numpy()
        dropped = int(repeated.sum())
        source = source[~repeated]
    valid_from, test_from = _split_times(schema, times[source])
    roles = np.full(len(users), TRAIN)
    roles[times >= valid_from] = VALID
    roles[times >= test_from] = TEST
    parts = [(users[source], items[source], times[source], roles[source], source)]
    if schema.past is not None:
        past = Table(directory / schema.past.file)
        owners, lists = past.keys(schema.past.user), past.lists(schema.past.items)
        past.refuse_repeats(schema.past.user, owners)
        last = past.times(schema.past.last_time, schema.past.time_unit)
        late = last > _first_times(users, times, owners, otherwise=last)
        past.refuse(schema.past.last_time, late, "the past ends after the user's first event")
        counts = [len(own) for own in lists]
        kept = np.repeat(look_up(np.unique(users.astype(str)), owners) >= 0, counts)
        flat = np.array([item for own in lists for item in own], dtype=object)
        parts.insert(
            0,
            (
                np.repeat(owners, counts)[kept],
                flat[kept],
                np.repeat(last, counts)[kept],
                np.full(kept.sum(), PAST),
                np.full(kept.sum(), -1),
            ),
        )
    users, items, times, roles, source = (np.concatenate(column) for column in zip(*parts, strict=True))
    _, codes = np.unique(users.astype(str), return_inverse=True)
    # Stable: rows of one time keep the order of the file.
    order = np.lexsort((times, codes))
    rows = _Rows(users[order], items[order], times[order] // 1000, roles[order].astype(np.int64), source[order])
    return rows, dropped


def _first_times(users: Array, times: Array, wanted: Array, *, otherwise: Array) -> Array:
    """Time of the first event of each of the wanted users."""
    import pandas as pd

    first = pd.Series(times).groupby(users).min()
    places = look_up(first.index.to_numpy(), wanted)
    return np.where(places >= 0, first.to_numpy()[places], otherwise)


def _split_times(schema: Schema, times: Array) -> tuple[float, float]:
    """First thousandths of a second of validation and test."""
    split = schema.split
    if split.valid_from is not None and split.test_from is not None:
        return split.valid_from * 1000, split.test_from * 1000
    assert split.valid is not None and split.test is not None
    ordered = np.sort(times)
    places = [round(len(ordered) * share) for share in (1 - split.valid - split.test, 1 - split.test)]
    # Whole seconds: events of one second stay together.
    valid, test = (ordered[min(place, len(ordered) - 1)] // 1000 * 1000 for place in places)
    return float(valid), float(test)


def _item_features(
    schema: Schema, directory: Path, table: Table, rows: _Rows, seen: Array
) -> tuple[list[Array], list[Categorical]]:
    vocabulary = Vocabulary(rows.items[seen])
    ids, features = [vocabulary.ids(rows.items)], [Categorical(name="item", num_ids=vocabulary.num_ids)]
    if schema.items is not None:
        own, named = _side_features(schema.items, directory, rows.items, seen)
        ids, features = ids + own, features + named
    return ids, features


def _user_features(
    schema: Schema, directory: Path, users: Array, seen_users: Array
) -> tuple[list[Array], list[Categorical]]:
    if schema.users is None:
        return [], []
    ids: list[Array] = []
    features: list[Categorical] = []
    if schema.users.include_id:
        vocabulary = Vocabulary(seen_users)
        ids, features = [vocabulary.ids(users)], [Categorical(name="user", num_ids=vocabulary.num_ids)]
    own, named = _side_features(schema.users, directory, users, look_up(seen_users, users) >= 0)
    return ids + own, features + named


def _side_features(
    side: SideTable, directory: Path, wanted: Array, seen: Array
) -> tuple[list[Array], list[Categorical]]:
    if side.file is None or not side.features:
        return [], []
    table = Table(directory / side.file)
    keys = table.keys(side.key)
    table.refuse_repeats(side.key, keys)
    places = look_up(keys, wanted)
    ids, features = [], []
    for column in side.features:
        values, num_ids = _ids(table, column, places, seen)
        ids.append(values)
        features.append(Categorical(name=column.column, num_ids=num_ids))
    return ids, features


def _feature(table: Table, column: FeatureColumn, rows: _Rows, seen: Array) -> tuple[Array, Categorical]:
    values, num_ids = _ids(table, column, rows.source, seen)
    return values, Categorical(name=column.column, num_ids=num_ids)


def _ids(table: Table, column: FeatureColumn, places: Array, seen: Array) -> tuple[Array, int]:
    """Ids of the column at rows ``places`` (-1: nothing is known), numbered by what training sees."""
    if column.buckets is not None:
        numbers = np.where(places >= 0, table.numbers(column.column)[places], np.nan)
        return buckets(numbers, seen, column.buckets)
    values = np.where(places >= 0, table.categories(column.column)[places], "")
    vocabulary = Vocabulary(values[seen])
    return vocabulary.ids(values), vocabulary.num_ids


def _action_types(schema: Schema, table: Table, rows: _Rows) -> tuple[Array, tuple[str, ...]]:
    bits = np.zeros(len(rows.source), dtype=np.int64)
    for place, column in enumerate(schema.actions.types):
        done = table.shares(column.column, column.at_least)[rows.source]
        bits |= (done == 1).astype(np.int64) << place
    return np.where(rows.source >= 0, bits, UNKNOWN_ACTION), tuple(c.name or c.column for c in schema.actions.types)


def _intensity(table: Table, column: str, per: str | None, rows: _Rows) -> Array:
    values = table.numbers(column)
    if per is not None:
        divisor = table.numbers(per)
        values = np.divide(values, divisor, out=np.full_like(values, np.nan), where=divisor > 0)
    return np.where(rows.source >= 0, values[rows.source], np.nan)


def _labels(schema: Schema, table: Table, rows: _Rows) -> Array:
    columns = []
    for task in schema.tasks:
        binary = task.task.kind == "binary"
        values = table.shares(task.column, task.at_least) if binary else table.numbers(task.column)
        columns.append(np.where(rows.source >= 0, values[rows.source], np.nan))
    return stack(columns, len(rows.source), np.float32)


def _user_offsets(users: Array) -> tuple[Array, Array]:
    first = np.flatnonzero(np.concatenate([[True], users[1:] != users[:-1]]))
    return np.append(first, len(users)).astype(np.int64), users[first]


def _facts(rows: _Rows, labels: Array, tasks: tuple[TaskConfig, ...], dropped: int) -> dict[str, Any]:
    train = labels[rows.roles == TRAIN]
    return {
        "users": len(np.unique(rows.users.astype(str))),
        "items": len(np.unique(rows.items.astype(str))),
        "events": {name: int((rows.roles == role).sum()) for name, role in (("past", PAST), *ROLES.items())},
        "repeats_left_out": dropped,
        "train_means": {
            task.name: float(np.nanmean(train[:, k])) if np.isfinite(train[:, k]).any() else None
            for k, task in enumerate(tasks)
        },
    }
