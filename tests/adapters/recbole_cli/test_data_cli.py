"""hstu-data: tables to atomic files, with errors that name file, column and row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from hstu_plugin.adapters.recbole import atomic
from hstu_plugin.adapters.recbole.data_cli import main

HEADER = "user_id:token\titem_id:token\ttimestamp:float"


def table(path: Path, **columns: object) -> Path:
    frame = pd.DataFrame(columns or {"user_id": [2, 1, 2, 1], "item_id": [7, 8, 9, 7], "timestamp": [30, 10, 20, 10]})
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False)
    return path


def to_atomic(cli: CliRunner, source: Path, *options: str) -> Result:
    return cli.invoke(main, ["to-atomic", str(source), "--name", "d", *options])


def lines(path: str = "dataset/d/d.inter") -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_are_chronological_and_ties_keep_their_order(cli: CliRunner, tmp_path: Path, suffix: str):
    result = to_atomic(cli, table(tmp_path / f"t{suffix}"))
    assert result.exit_code == 0, result.output
    assert lines() == [HEADER, "2\t9\t20", "2\t7\t30", "1\t8\t10", "1\t7\t10"]
    assert "interactions" in result.output
    assert "--dataset=d --data_path=dataset" in result.output


def test_order_is_exact_where_float32_is_not(cli: CliRunner, tmp_path: Path):
    rng = np.random.default_rng(1)
    times = 1_700_000_000 + rng.permutation(2000)
    source = table(tmp_path / "t.csv", user_id=np.arange(2000) % 5, item_id=np.arange(2000), timestamp=times)
    assert to_atomic(cli, source).exit_code == 0
    frame = pd.read_csv("dataset/d/d.inter", sep="\t")
    assert (frame.groupby("user_id:token")["timestamp:float"].diff().dropna() > 0).all()
    assert sorted(frame["timestamp:float"]) == sorted(times)


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("user_id:token", "item_id:token", "timestamp:float"), ()),
        (("userId", "movieId", "timestamp"), ()),
        (("who", "what", "when"), ("--user", "who", "--item", "what", "--time", "when")),
    ],
)
def test_columns_are_found(cli: CliRunner, tmp_path: Path, names: tuple[str, ...], options: tuple[str, ...]):
    source = table(tmp_path / "t.parquet", **dict(zip(names, ([1, 1], ["a", "b"], [5, 4]), strict=True)))
    assert to_atomic(cli, source, *options).exit_code == 0
    assert lines() == [HEADER, "1\tb\t4", "1\ta\t5"]


def test_ratings_travel_along_unless_refused(cli: CliRunner, tmp_path: Path):
    source = table(tmp_path / "t.csv", user_id=[1, 1], item_id=[1, 2], rating=[4.5, 3], timestamp=[1, 2])
    assert to_atomic(cli, source).exit_code == 0
    assert lines() == ["user_id:token\titem_id:token\trating:float\ttimestamp:float", "1\t1\t4.5\t1", "1\t2\t3.0\t2"]
    assert to_atomic(cli, source, "--no-rating", "--force").exit_code == 0
    assert lines()[0] == HEADER


def test_leading_zeros_survive(cli: CliRunner, tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text("user_id,item_id,timestamp\n007,01,5\n")
    assert to_atomic(cli, path).exit_code == 0
    assert lines()[1] == "007\t01\t5"


def test_milliseconds_become_seconds_where_nothing_is_lost(cli: CliRunner, tmp_path: Path):
    source = table(tmp_path / "t.csv", user_id=[1, 1], item_id=[1, 2], timestamp=[2_000_000_001_000, 2_000_000_000_000])
    result = to_atomic(cli, source, "--time-unit", "ms")
    assert lines()[1:] == ["1\t2\t2000000000", "1\t1\t2000000001"]
    assert "timestamp_unit" not in result.output
    source = table(source, user_id=[1, 1], item_id=[1, 2], timestamp=[2_000_000_000_007, 2_000_000_000_001])
    result = to_atomic(cli, source, "--time-unit", "ms", "--force")
    assert lines()[1:] == ["1\t2\t2000000000001", "1\t1\t2000000000007"]
    assert "--timestamp_unit=ms" in result.output


def test_date_times_of_parquet(cli: CliRunner, tmp_path: Path):
    times = pd.to_datetime(["2020-01-02", "2020-01-01"]).tz_localize("UTC")
    assert to_atomic(cli, table(tmp_path / "t.parquet", user_id=[1, 1], item_id=[1, 2], timestamp=times)).exit_code == 0
    assert lines()[1:] == ["1\t2\t1577836800", "1\t1\t1577923200"]


def good(**changes: list[object]) -> dict[str, list[object]]:
    return {"user_id": [1, 1], "item_id": [1, 2], "timestamp": [1, 2], **changes}


BAD = {
    "missing column": (
        {"user_id": [1], "movie": [1], "timestamp": [1]},
        "no item column",
        "the file has: user_id, movie, timestamp",
    ),
    "null item": (good(item_id=["a", None]), "column item_id", "2: the value is missing"),
    "null time": (good(timestamp=[None, 2.0]), "column timestamp", "the value is missing"),
    "text time": (good(timestamp=["1", "soon"]), "column timestamp, row 2", "expected a number, got 'soon'"),
    "negative time": (good(timestamp=[5, -5]), "column timestamp", "-5 lies before 1970"),
    "milliseconds": (good(timestamp=[1, 1_700_000_000_000]), "after the year 2100", "--time-unit ms"),
    "tab in token": (good(item_id=["a", "a\tb"]), "column item_id", "a tab or a line break"),
    "newline in token": (good(user_id=["a\nb", "c"]), "column user_id", "a tab or a line break"),
    "quotation mark": (good(user_id=["a", 'a"b']), "column user_id", "quotation mark"),
    "NA": (good(item_id=["a", "NA"]), "column item_id", "'NA' would be read as a missing value"),
    "blank": (good(user_id=[" ", "a"]), "column user_id", "the token is empty"),
    "fraction as id": (good(user_id=[1.5, 2]), "column user_id", "1.5"),
    "no rows": ({"user_id": [], "item_id": [], "timestamp": []}, "there are no rows", ""),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(cli: CliRunner, tmp_path: Path, case: str):
    columns, where, what = BAD[case]
    source = table(tmp_path / "t.parquet", **columns)
    result = to_atomic(cli, source)
    assert result.exit_code == 1
    assert str(source) in result.output
    assert where in result.output
    assert what in result.output
    assert not Path("dataset").exists()


def test_text_rows_are_counted_as_editors_do(cli: CliRunner, tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text("user_id,item_id,timestamp\n1,1,5\n1,,6\n1,,7\n")
    assert "column item_id, line 3: the value is missing (and 1 more)" in to_atomic(cli, path).output


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.parquet", b"PAR1 but no", "not a readable Parquet file"),
        ("t.csv", b"", "the file is empty"),
        ("t.csv", b"user_id,item_id,timestamp\n", "there are no rows"),
        ("t.csv", b"user_id,item_id,timestamp\n1,2,3,4,5\n1,2,3\n1,2,3,4,5,6,7\n", "not readable as text"),
        ("t.csv", b"user_id,item_id,timestamp\n\xff\xfe,2,3\n", "not readable as text"),
        ("t.xls", b"x", "expected a .parquet, .csv"),
    ],
)
def test_unreadable_files(cli: CliRunner, tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    result = to_atomic(cli, tmp_path / name)
    assert result.exit_code == 1
    assert message in result.output


def test_absent_file(cli: CliRunner, tmp_path: Path):
    assert "no such file" in to_atomic(cli, tmp_path / "none.csv").output


def test_repeats_are_reported_and_dropped_on_request(cli: CliRunner, tmp_path: Path):
    source = table(tmp_path / "t.csv", user_id=[1, 1, 1], item_id=[5, 5, 5], timestamp=[1, 1, 2])
    result = to_atomic(cli, source)
    assert "1 rows repeat user, item and time of an earlier row: kept" in result.output
    assert len(lines()) == 4
    result = to_atomic(cli, source, "--drop-duplicates", "--force")
    assert "dropped" in result.output
    assert lines() == [HEADER, "1\t5\t1", "1\t5\t2"]


def test_an_existing_data_set_stays(cli: CliRunner, tmp_path: Path):
    source = table(tmp_path / "t.csv")
    assert to_atomic(cli, source).exit_code == 0
    before = lines()
    result = to_atomic(cli, source)
    assert result.exit_code == 1
    assert "--force" in result.output
    assert lines() == before
    assert [p.name for p in Path("dataset/d").iterdir()] == ["d.inter"]


def test_names_that_lead_elsewhere_are_refused(cli: CliRunner, tmp_path: Path):
    source = table(tmp_path / "t.csv")
    assert "--name: expected" in cli.invoke(main, ["to-atomic", str(source), "--name", "../d"]).output


def test_summary_counts():
    data = atomic.Interactions(
        users=np.array(["a", "a", "b", "a", "b"], dtype=object),
        items=np.array(["x", "y", "x", "x", "z"], dtype=object),
        times=np.array([2000, 1000, 5000, 2000, 5000]),
    )
    summary = atomic.summarize(data)
    assert (summary.users, summary.items, summary.interactions) == (2, 3, 5)
    assert summary.density == pytest.approx(5 / 6)
    # a: 1, 2, 2 and b: 5, 5
    assert summary.tied_pairs == pytest.approx(2 / 3)
    assert (summary.repeated_pairs, summary.repeated_rows) == (1, 1)
    assert not summary.chronological
    assert atomic.summarize(atomic.chronological(data)).chronological
    assert summary.lengths["median"] == 2.5


def test_check_accepts_what_to_atomic_writes(cli: CliRunner, tmp_path: Path):
    assert to_atomic(cli, table(tmp_path / "t.csv")).exit_code == 0
    result = cli.invoke(main, ["check", "dataset/d"])
    assert result.exit_code == 0, result.output
    assert "The data set can be used." in result.output
    assert "Note" not in result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("user_id,item_id,timestamp\n1,2,3\n", "expected fields such as user_id:token"),
        ("user_id:token\titem_id:token\n1\t2\n", "the header lacks timestamp"),
        (f"{HEADER}\n1\t2\tsoon\n", "line 2: expected a number"),
        (f"{HEADER}\n", "there are no rows"),
        (f"{HEADER}\n1\t2\t3.5\n", "timestamp_unit: ms"),
    ],
)
def test_check_refuses(cli: CliRunner, tmp_path: Path, content: str, message: str):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "bad.inter").write_text(content)
    result = cli.invoke(main, ["check", str(folder)])
    assert result.exit_code == 1
    assert message in result.output


def test_check_remarks_on_order_and_items(cli: CliRunner, tmp_path: Path):
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "odd.inter").write_text(f"{HEADER}\n1\ta\t9\n1\tb\t3\n")
    (folder / "odd.item").write_text("item_id:token\ttitle:token_seq\na\tA film\n")
    result = cli.invoke(main, ["check", str(folder)])
    assert result.exit_code == 0
    assert "not in order of time" in result.output
    assert "1 items of the interactions are not in it, such as 'b'" in result.output


def test_check_wants_the_file_named_as_its_directory(cli: CliRunner, tmp_path: Path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y.inter").write_text(HEADER)
    assert "expected x.inter" in cli.invoke(main, ["check", str(tmp_path / "x")]).output
    assert "no such directory" in cli.invoke(main, ["check", str(tmp_path / "z")]).output
