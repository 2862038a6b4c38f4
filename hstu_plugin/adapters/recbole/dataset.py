"""RecBole data sets with exact time: integers from the file to the batch, and rows for generative training.

RecBole rounds times to float32 (64 to 128 s at today's epoch seconds) before it sorts, which changes the order of
events and thereby the test items. Here the order is by the file's own numbers, and ties keep the order of the file.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from torch import Tensor

from hstu_plugin.adapters.recbole.actions import UNKNOWN, find_action_field
from hstu_plugin.adapters.recbole.options import DataOptions, TimestampUnit, TrainExamples, TrainWindows, data_options

Indices = NDArray[np.int64]
# Up to here every integer is a float64, which is how pandas reads the column for RecBole.
_EXACT_BELOW = 2**53
# Parts that RecBole leaves out of the training rows of a user who has enough events.
_HELD_OUT = {"valid_and_test": 2, "valid_only": 1, "test_only": 1}


class ExactTimeDataset(SequentialDataset):  # type: ignore[misc]
    """RecBole's ``SequentialDataset``, row for row, with events in their exact order and int64 times.

    The columns ``timestamp`` and ``timestamp_list`` hold whole seconds. ``TIME_FIELD: ~`` declares that there is no
    time and that the lines of the file are in order.
    """

    # A DataFrame while RecBole reads and filters, its Interaction from then on.
    inter_feat: Any
    # Column of the events' actions, once the file's header is known.
    action_field: str | None = None

    def __init__(self, config: Any) -> None:
        self.options = self._options(config)
        self._check_config(config)
        super().__init__(config)

    def _options(self, config: Any) -> DataOptions:
        unit = data_options(config.final_config_dict).timestamp_unit
        return DataOptions(train_examples=TrainExamples.PREFIX, timestamp_unit=unit)

    def _check_config(self, config: Any) -> None:
        if config["TIME_FIELD"] is not None and config["TIME_FIELD"] in (config["numerical_features"] or []):
            raise ValueError(f"numerical_features: the time column {config['TIME_FIELD']!r} cannot be one of them")

    # Loading

    def _load_data(self, token: str, dataset_path: str) -> None:
        if not os.path.exists(dataset_path):
            if self._get_download_url("url", allow_none=True) is None:
                raise FileNotFoundError(
                    f"data set {token!r}: expected the folder {dataset_path!r} with the file {token}.inter; set "
                    "data_path to the folder that holds it, or make it from CSV or Parquet with `hstu-data`"
                )
            try:
                self._download()
            except (ValueError, RuntimeError):
                # Behind a complete download RecBole waits for other processes, which a single one does not have.
                if not os.path.isfile(os.path.join(dataset_path, f"{token}.inter")):
                    raise
        super()._load_data(token, dataset_path)

    def _get_load_and_unload_col(self, source: Any) -> tuple[set[str] | None, set[str] | None]:
        load, unload = super()._get_load_and_unload_col(source)
        # RecBole's default loads no rating.
        if load and self.action_field is not None and getattr(source, "value", source) == "inter":
            load = {*load, self.action_field}
        return load, unload

    def _load_inter_feat(self, token: str, dataset_path: str) -> None:
        path = os.path.join(dataset_path, f"{token}.inter")
        parts = self.benchmark_filename_list
        first = path if parts is None else os.path.join(dataset_path, f"{token}.{parts[0]}.inter")
        self.action_field = find_action_field(self.config, first)
        if self.benchmark_filename_list is None:
            if not os.path.isfile(path):
                raise FileNotFoundError(f"data set {token!r}: expected the file {path!r}; `hstu-data` makes such files")
            self._check_header(path)
        super()._load_inter_feat(token, dataset_path)
        if self.action_field is not None and self.inter_feat is not None:
            self.inter_feat[self.action_field] = self.inter_feat[self.action_field].fillna(UNKNOWN)
        self._loaded_rows = 0 if self.inter_feat is None else len(self.inter_feat)
        self._check_times(path)

    def _check_header(self, path: str) -> None:
        """Raise unless the file has the columns that we need, with types, and the config loads them."""
        with open(path, encoding=self.config["encoding"]) as file:
            header = file.readline().rstrip("\r\n")
        columns = header.split(self.config["field_separator"])
        untyped = [column for column in columns if column.count(":") != 1]
        if untyped:
            raise ValueError(
                f"{path}: expected a first line of tab-separated `name:type` columns, such as "
                f"`user_id:token\\titem_id:token\\ttimestamp:float`, but found {untyped[0]!r}"
            )
        types = dict(column.split(":") for column in columns)
        load, unload = self._get_load_and_unload_col("inter")
        loaded = [name for name in types if (load is None or name in load) and name not in (unload or ())]
        wanted = {"USER_ID_FIELD": self.uid_field, "ITEM_ID_FIELD": self.iid_field, "TIME_FIELD": self.time_field}
        for key, name in wanted.items():
            if name is None or name in loaded:
                continue
            where = f"it is in the file but load_col takes only {loaded}" if name in types else f"found {list(types)}"
            help_ = ""
            if key == "TIME_FIELD":
                help_ = (
                    "; name the right column in TIME_FIELD and load_col, or, if there is no time and the lines of the "
                    "file are in order, set `TIME_FIELD: ~` and, for HSTU, `time_bias: False` (position bias only; "
                    "on the command line --TIME_FIELD=None --time_bias=False)"
                )
            raise ValueError(f"{path}: expected the column {name!r} ({key}), {where}{help_}")
        if self.time_field is not None and types[self.time_field] != "float":
            raise ValueError(
                f"{path}: expected the time column as `{self.time_field}:float`, got type {types[self.time_field]!r}"
            )

    def _check_times(self, path: str) -> None:
        if self.time_field is None or self.inter_feat is None or self.time_field not in self.inter_feat:
            return
        times = self.inter_feat[self.time_field].to_numpy(np.float64)
        with np.errstate(invalid="ignore"):
            faults = {
                "is missing": np.isnan(times),
                "is negative": times < 0,
                "is not a whole number": np.isfinite(times) & (times != np.floor(times)),
                "is too large to be read exactly": np.abs(times) >= _EXACT_BELOW,
            }
        for fault, where in faults.items():
            if where.any():
                row = int(np.argmax(where))
                raise ValueError(
                    f"{path}: line {row + 2}, column {self.time_field!r}: the time {fault} ({times[row]!r}; "
                    f"{int(where.sum())} such rows); expected whole seconds since 1970, or milliseconds with "
                    "`timestamp_unit: ms`"
                )

    # Filtering

    def _remove_duplication(self) -> None:
        keep = self.config["rm_dup_inter"]
        if keep is None or self.time_field is None:
            super()._remove_duplication()
            return
        # RecBole's sort is not stable: among equal times it would keep an arbitrary row.
        ordered = self.inter_feat.sort_values(self.time_field, kind="stable")
        kept = ordered.drop_duplicates(subset=[self.uid_field, self.iid_field], keep=keep)
        self.inter_feat = kept.sort_index()

    def _reset_index(self) -> None:
        if self.inter_feat.empty:
            filters = ("user_inter_num_interval", "item_inter_num_interval", "val_interval", "rm_dup_inter")
            active = {key: self.config[key] for key in filters if self.config[key] is not None}
            raise ValueError(
                f"data set {self.dataset_name!r}: no interaction is left of {self._loaded_rows} in the file; "
                f"filters in force: {active or 'none'}"
            )
        super()._reset_index()

    def _normalize(self) -> None:
        exact = [name for name in (self.time_field, self.action_field) if name is not None and name in self.inter_feat]
        raw = {name: self.inter_feat[name].copy() for name in exact}
        if self.action_field in raw:
            # RecBole would compute with the stand-in for missing values.
            self.inter_feat[self.action_field] = 0.0
        super()._normalize()
        for name, values in raw.items():
            self.inter_feat[name] = values

    def _dataframe_to_interaction(self, data: pd.DataFrame) -> Any:
        interaction = super()._dataframe_to_interaction(data)
        if self.time_field is not None and self.time_field in data:
            exact = data[self.time_field].to_numpy(np.float64).astype(np.int64)
            interaction[self.time_field] = torch.from_numpy(exact)
        return interaction

    # Rows

    def sort(self, by: str | list[str], ascending: bool | list[bool] = True) -> None:
        """As RecBole's; without time, the order by time is the order in which the rows already are."""
        if by is not None:
            super().sort(by, ascending)

    def data_augmentation(self) -> None:
        """Replace the events by rows of (history, target)."""
        self._aug_presets()
        self._check_field("uid_field", "iid_field")
        events = self._ordered_events()
        users = events[self.uid_field].numpy()
        starts, targets = self._rows(_user_begins(users))
        if not len(targets):
            raise ValueError(
                f"data set {self.dataset_name!r}: no user has two interactions, so there is nothing to predict; "
                f"{len(users)} interactions are left after the filters"
            )
        self.inter_feat = self._gather(events, starts, targets)

    def _ordered_events(self) -> Any:
        """All events by user and exact time, ties in the order of the file; times in seconds from here on."""
        events = self.inter_feat
        keys = [events[self.uid_field].numpy()]
        if self.time_field is not None:
            keys.insert(0, events[self.time_field].numpy())
        events = events[np.lexsort(keys)]
        if self.time_field is not None and self.options.timestamp_unit is TimestampUnit.MILLISECONDS:
            events[self.time_field] = events[self.time_field] // 1000
        return events

    def _rows(self, begins: Indices) -> tuple[Indices, Indices]:
        """RecBole's augmentation: every event but a user's first is a target.

        Args:
            begins: ``[events]`` index of the first event of each event's user.

        Returns:
            first history event and target event of each row, users in order, rows of a user by time.
        """
        index = np.arange(len(begins))
        targets = index[index > begins]
        return np.maximum(begins[targets], targets - self.max_item_list_len), targets

    def _gather(self, events: Any, starts: Indices, targets: Indices) -> Any:
        """Rows with the columns of SequentialDataset: each field of the target, and its list over the history."""
        lengths = torch.from_numpy(targets - starts)
        width = self._list_width(int(lengths.max()))
        real = torch.arange(width) < lengths[:, None]
        taken = (torch.from_numpy(starts)[:, None] + torch.arange(width))[real]
        columns: dict[str, Tensor] = {self.item_list_length_field: lengths}
        for field in events:
            if field != self.uid_field:
                value = events[field]
                lists = value.new_zeros((len(targets), width, *value.shape[1:]))
                lists[real] = value[taken]
                columns[getattr(self, f"{field}_list_field")] = lists
        rows = events[targets]
        rows.update(Interaction(columns))
        return rows

    def _list_width(self, longest: int) -> int:
        """Entries of a list column; several of RecBole's models demand the full width."""
        return int(self.max_item_list_len)


class HSTUDataset(ExactTimeDataset):
    """Rows for generative training: one for each user or window, besides the validation and the test row.

    With ``train_examples: prefix`` these are the rows of `ExactTimeDataset`. Validation and test rows are the same in
    both. A training row of length ``n`` trains ``n`` positions: the list shifted by one, and its target.
    """

    def _options(self, config: Any) -> DataOptions:
        return data_options(config.final_config_dict)

    @property
    def generative(self) -> bool:
        """Whether a row stands for all positions of a window."""
        return self.options.train_examples is TrainExamples.GENERATIVE

    def _check_config(self, config: Any) -> None:
        super()._check_config(config)
        if not self.generative:
            return
        split = config["eval_args"]["split"]
        mode = split.get("LS") if isinstance(split, dict) else None
        if mode not in _HELD_OUT:
            raise ValueError(
                f"eval_args.split: train_examples: generative makes one row for each user and needs leave-one-out, "
                f"{{LS: {' | '.join(_HELD_OUT)}}}, got {split!r}; other splits work with `train_examples: prefix`"
            )
        if config["benchmark_filename"] is not None:
            raise ValueError(
                "benchmark_filename: files that were split beforehand hold finished rows; use `train_examples: prefix`"
            )
        popular = [m for m in config["eval_args"]["mode"].values() if str(m).startswith("pop")]
        if popular:
            raise ValueError(
                f"eval_args.mode: {popular[0]} draws negatives by their number of rows, which under `train_examples: "
                "generative` is not their popularity; use full or uniXXX, or `train_examples: prefix`"
            )

    def _rows(self, begins: Indices) -> tuple[Indices, Indices]:
        if not self.generative:
            return super()._rows(begins)
        window = self.max_item_list_len
        first, counts = np.unique(begins, return_counts=True)
        keep = counts >= 2
        first, last = first[keep], (first + counts - 1)[keep]
        # As RecBole splits n - 1 rows of a user with n events: one row always stays in training.
        held_out = np.minimum(_HELD_OUT[self.config["eval_args"]["split"]["LS"]], last - first - 1)
        trained = last - held_out
        windows = np.ones_like(trained)
        if self.options.train_windows is TrainWindows.ALL:
            windows = -((first - trained) // window)
        rows = windows + held_out
        user = np.repeat(np.arange(len(rows)), rows)
        place = np.arange(len(user)) - np.repeat(np.cumsum(rows) - rows, rows)
        # Windows walk back from the last training target: each begins with the event that the one before it predicts.
        behind = windows[user] - 1 - place
        targets = trained[user] - np.where(behind >= 0, behind * window, behind)
        return np.maximum(first[user], targets - window), targets

    def _list_width(self, longest: int) -> int:
        return longest if self.generative else super()._list_width(longest)

    @property
    def item_counter(self) -> Counter[int]:
        """How often each item is a target in training; the popularity that some of RecBole's metrics use."""
        rows = self.inter_feat
        if not self.generative or isinstance(rows, pd.DataFrame) or self.item_list_length_field not in rows:
            counter: Counter[int] = super().item_counter
            return counter
        lists = rows[self.item_id_list_field][:, 1:]
        items = torch.cat([lists[lists > 0], rows[self.iid_field]])
        found, counts = torch.unique(items, return_counts=True)
        return Counter(dict(zip(found.tolist(), counts.tolist(), strict=True)))


def _user_begins(users: Indices) -> Indices:
    """``[events]`` index of the first event of each event's user, for users in blocks."""
    first = np.flatnonzero(np.concatenate([[True], users[1:] != users[:-1]]))
    return np.repeat(first, np.diff(np.append(first, len(users))))
