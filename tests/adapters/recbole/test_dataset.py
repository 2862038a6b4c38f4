"""Order, times, rows: against the raw file and against RecBole's own rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import recbole
import torch
from recbole.config import Config
from recbole.data.dataset import SequentialDataset

from hstu_plugin.adapters.recbole.dataset import ExactTimeDataset, HSTUDataset

ML_100K = Path(recbole.__file__).parent / "dataset_example" / "ml-100k" / "ml-100k.inter"


def _config(dataset: str = "tiny", **values: Any) -> Config:
    return Config("HSTU", dataset, config_dict={"data_path": "dataset", "time_bias": True, **values})


def _build(dataset: str = "tiny", kind: type[Any] = HSTUDataset, **values: Any) -> tuple[Any, list[Any]]:
    data = kind(_config(dataset, **values))
    return data, data.build()


def _tokens(data: Any, row: Any) -> list[str]:
    """Item tokens of a row's history and target."""
    length = int(row["item_length"])
    ids = [*row["item_id_list"][:length].tolist(), int(row["item_id"])]
    return [str(token) for token in data.id2token("item_id", ids)]


def _by_user(data: Any, part: Any) -> dict[str, list[list[str]]]:
    rows: dict[str, list[list[str]]] = {}
    for i in range(len(part.inter_feat)):
        row = {field: part.inter_feat[field][i] for field in part.inter_feat}
        rows.setdefault(str(data.id2token("user_id", int(row["user_id"]))), []).append(_tokens(data, row))
    return rows


@pytest.fixture(scope="module")
def raw() -> dict[str, pd.DataFrame]:
    """Events of ml-100k by user, in exact order, ties in the order of the file."""
    frame = pd.read_csv(ML_100K, sep="\t", header=0, names=["user", "item", "rating", "time"], dtype=str)
    frame["time"] = frame["time"].astype("int64")
    frame = frame.sort_values("time", kind="stable")
    return dict(list(frame.groupby("user")))


class TestMovieLens:
    @pytest.mark.parametrize("length", [20, 200])
    def test_order_times_and_no_leak(self, raw: dict[str, pd.DataFrame], length: int) -> None:
        data, (train, valid, test) = _build("ml-100k", MAX_ITEM_LIST_LENGTH=length)
        assert [len(part) for part in (train, valid, test)] == [943, 943, 943]
        for part, behind in ((train, 3), (valid, 2), (test, 1)):
            rows = part.inter_feat
            assert rows["timestamp"].dtype == rows["timestamp_list"].dtype == torch.int64
            for i, user in enumerate(data.id2token("user_id", rows["user_id"].tolist())):
                events = raw[user]
                end = len(events) - behind
                begin = max(0, end - length)
                count = int(rows["item_length"][i])
                ids = [*rows["item_id_list"][i][:count].tolist(), int(rows["item_id"][i])]
                assert data.id2token("item_id", ids).tolist() == events["item"].tolist()[begin : end + 1]
                times = [*rows["timestamp_list"][i][:count].tolist(), int(rows["timestamp"][i])]
                assert times == events["time"].tolist()[begin : end + 1]

    def test_rows_equal_stock_where_times_are_exact(self) -> None:
        # Where RecBole's float32 can hold the times, its rows are the reference, column by column.
        folder = Path("dataset/small")
        folder.mkdir(parents=True)
        frame = pd.read_csv(ML_100K, sep="\t")
        frame["timestamp:float"] -= frame["timestamp:float"].min()
        frame = frame[frame["timestamp:float"] < 2**22]
        frame.to_csv(folder / "small.inter", sep="\t", index=False)
        values = {"load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]}, "MAX_ITEM_LIST_LENGTH": 20}
        _, stock = _build("small", SequentialDataset, **values)
        for kind, extra in ((ExactTimeDataset, {}), (HSTUDataset, {"train_examples": "prefix"}), (HSTUDataset, {})):
            _, ours = _build("small", kind, **values, **extra)
            rows = [(mine.inter_feat, theirs.inter_feat) for mine, theirs in zip(ours, stock, strict=True)]
            if kind is HSTUDataset and not extra:
                # One training row for each user; the order of users is that of their first row, hence another.
                rows = [(mine[mine["user_id"].argsort()], ref[ref["user_id"].argsort()]) for mine, ref in rows[1:]]
            for mine, reference in rows:
                assert set(mine) == set(reference)
                assert all(torch.equal(mine[field].double(), reference[field].double()) for field in reference)


class TestRows:
    EVENTS = tuple((u, 10 * u + k, 1000 * k) for u, n in enumerate((1, 2, 3, 4, 9)) for k in range(n))

    @pytest.mark.parametrize("split", ["valid_and_test", "valid_only", "test_only"])
    def test_short_users_split_as_in_stock(self, write_inter: Any, split: str) -> None:
        write_inter(self.EVENTS)
        values = {"eval_args": {"split": {"LS": split}, "order": "TO", "mode": "full"}, "MAX_ITEM_LIST_LENGTH": 4}
        data, ours = _build(**values)
        stock_data, stock = _build(kind=SequentialDataset, **values)
        for mine, theirs in zip(ours[1:], stock[1:], strict=True):
            assert _by_user(data, mine) == _by_user(stock_data, theirs)
        trained = {user: rows[-1] for user, rows in _by_user(stock_data, stock[0]).items()}
        assert {user: rows[0] for user, rows in _by_user(data, ours[0]).items()} == trained

    @pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 50])
    def test_windows_train_every_position_once(self, write_inter: Any, length: int) -> None:
        write_inter(self.EVENTS)
        data, (train, _, _) = _build(MAX_ITEM_LIST_LENGTH=length, train_windows="all")
        _, (prefix, _, _) = _build(MAX_ITEM_LIST_LENGTH=length, train_examples="prefix")
        trained = sorted((u, item) for u, rows in _by_user(data, train).items() for row in rows for item in row[1:])
        assert trained == sorted((u, r[-1]) for u, rows in _by_user(data, prefix).items() for r in rows)
        assert train.item_counter == prefix.item_counter

    def test_long_sequences_keep_the_latest(self, write_inter: Any) -> None:
        write_inter(self.EVENTS)
        data, (train, _, test) = _build(MAX_ITEM_LIST_LENGTH=3)
        assert _by_user(data, train)["u4"] == [["i43", "i44", "i45", "i46"]]
        assert _by_user(data, test)["u4"] == [["i45", "i46", "i47", "i48"]]

    def test_ties_keep_the_order_of_the_file(self, write_inter: Any) -> None:
        items = np.random.default_rng(0).permutation(50)
        write_inter([(0, int(i), 5) for i in items])
        data, (_, _, test) = _build(MAX_ITEM_LIST_LENGTH=50)
        assert _by_user(data, test)["u0"] == [[f"i{i}" for i in items]]

    def test_duplicates_by_exact_time(self, write_inter: Any) -> None:
        # One second apart: all the same in float32.
        write_inter([(0, item, 1_400_000_001 + k) for k, item in enumerate((1, 2, 1, 3, 4))])
        data, (_, _, test) = _build(rm_dup_inter="last")
        assert _by_user(data, test)["u0"] == [["i2", "i1", "i3", "i4"]]

    def test_milliseconds(self, write_inter: Any) -> None:
        # Two events in one second: the order is by the milliseconds, the batch has seconds.
        write_inter([(0, 2, 1400000000900), (0, 1, 1400000000100), (0, 3, 1400000007000), (0, 4, 1400000008999)])
        data, (_, _, test) = _build(timestamp_unit="ms")
        assert _by_user(data, test)["u0"] == [["i1", "i2", "i3", "i4"]]
        assert test.inter_feat["timestamp_list"][0, :3].tolist() == [1400000000, 1400000000, 1400000007]
        assert test.inter_feat["timestamp"].tolist() == [1400000008]


class TestWithoutTime:
    def test_missing_column_says_what_works(self, write_inter: Any) -> None:
        write_inter([(0, 1, 0), (0, 2, 0)], time=None)
        with pytest.raises(ValueError, match=r"'timestamp' \(TIME_FIELD\).*TIME_FIELD: ~.*time_bias: False"):
            _build()

    def test_other_name(self, write_inter: Any) -> None:
        write_inter([(0, k, k) for k in range(5)], time="when")
        data, (_, _, test) = _build(TIME_FIELD="when")
        assert _by_user(data, test)["u0"] == [["i0", "i1", "i2", "i3", "i4"]]

    def test_file_order_on_request(self, write_inter: Any) -> None:
        from hstu_plugin.adapters.recbole import run

        write_inter([(u, (u + k) % 7, 0) for k in range(6) for u in range(5)], time=None)
        values = {"data_path": "dataset", "TIME_FIELD": None, "hidden_size": 8, "epochs": 1}
        with pytest.raises(ValueError, match="topk: cannot rank the best 10 of 7 items"):
            run("HSTU", "tiny", config_dict={**values, "time_bias": False})
        values |= {"topk": [3], "valid_metric": "MRR@3"}
        result = run("HSTU", "tiny", config_dict={**values, "time_bias": False}, show_progress=False)
        assert _by_user(result.dataset, result.test_data._dataset)["u1"] == [["i1", "i2", "i3", "i4", "i5", "i6"]]
        with pytest.raises(ValueError, match=r"TIME_FIELD: .*time_bias: False"):
            run("HSTU", "tiny", config_dict=values)


class TestBadInput:
    @pytest.mark.parametrize(
        ("time", "message"),
        [
            ("", "is missing"),
            (-1, "is negative"),
            (1.5, "not a whole number"),
            (1e17, "too large"),
            ("inf", "too large"),
        ],
    )
    def test_times_name_line_and_column(self, write_inter: Any, time: Any, message: str) -> None:
        write_inter([(0, 1, 5), (0, 2, time), (0, 3, 7)])
        with pytest.raises(ValueError, match=f"line 3, column 'timestamp'.*{message}"):
            _build()

    def test_missing_folder_and_file(self) -> None:
        with pytest.raises(FileNotFoundError, match=r"expected the folder 'dataset/nowhere' with the file"):
            _build("nowhere")
        Path("dataset/nowhere").mkdir(parents=True)
        with pytest.raises(FileNotFoundError, match=r"nowhere.inter"):
            _build("nowhere")

    def test_missing_item_column(self, write_inter: Any) -> None:
        write_inter([(0, 1, 5)])
        with pytest.raises(ValueError, match=r"'movie_id' \(ITEM_ID_FIELD\), found \['user_id', 'item_id'"):
            _build(ITEM_ID_FIELD="movie_id")

    def test_header_without_types(self, write_inter: Any) -> None:
        file = write_inter([(0, 1, 5)]) / "tiny.inter"
        file.write_text("user_id\titem_id\n1\t2\n", encoding="utf-8")
        with pytest.raises(ValueError, match="`name:type` columns"):
            _build()

    def test_nothing_left_after_filters(self, write_inter: Any) -> None:
        write_inter([(0, 1, 5), (0, 2, 6)])
        with pytest.raises(ValueError, match=r"no interaction is left of 2 in the file.*\[5,inf\)"):
            _build(user_inter_num_interval="[5,inf)")

    def test_nothing_to_predict(self, write_inter: Any) -> None:
        write_inter([(0, 1, 5), (1, 2, 6)])
        with pytest.raises(ValueError, match="no user has two interactions"):
            _build()

    @pytest.mark.parametrize("split", [{"RS": [0.8, 0.1, 0.1]}, {"TS": [0.8, 0.1, 0.1]}])
    def test_generative_needs_leave_one_out(self, split: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"leave-one-out.*train_examples: prefix"):
            _build(eval_args={"split": split, "order": "TO", "mode": "full"})

    def test_popularity_negatives(self) -> None:
        with pytest.raises(ValueError, match="pop100"):
            _build(eval_args={"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "pop100"})
