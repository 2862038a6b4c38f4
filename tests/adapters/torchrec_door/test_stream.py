"""Parquet columns and the order of their rows: refusals, corruption, ranks, workers, positions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hstu_plugin.adapters.torchrec import SequenceBatch, check_batch
from hstu_plugin.adapters.torchrec.data import RankBatches, SkippedData, plan_stream
from hstu_plugin.adapters.torchrec.options import TrainOptions
from hstu_plugin.adapters.torchrec.options_file import options_from_dict
from hstu_plugin.adapters.torchrec.parquet import CorruptFile
from hstu_plugin.adapters.torchrec.samplers import make_sampler

from .training import ITEMS, USERS, histories, retrieval_options, write_retrieval


def options(folder: Path, **data: Any) -> TrainOptions:
    plain = retrieval_options(folder)
    plain["data"].update(data)
    return options_from_dict(plain)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("stream")
    write_retrieval(made)
    return made


def batches(
    given: TrainOptions, *, rank: int = 0, world_size: int = 1, epoch: int = 0, start: int = 0, **more: Any
) -> Iterator[SequenceBatch]:
    plan, _ = plan_stream(given, training=True)
    return RankBatches(given, plan, rank=rank, world_size=world_size, training=True, **more).epoch(epoch, start)


def users(batch: SequenceBatch) -> list[tuple[int, ...]]:
    """Each user by the times and items of its history."""
    items, times = batch.features["item_id"], batch.numbers["time"]
    split = items.lengths().tolist()
    rows = zip(items.values().split(split), times.values().split(split), strict=True)
    return sorted((*a.tolist(), *b.tolist()) for a, b in rows if a.numel())


def test_an_epoch_holds_every_row_once(folder: Path) -> None:
    given = options(folder)
    seen = [user for batch in batches(given) for user in users(batch)]
    columns = histories(0)
    wanted = sorted((*a, *b) for a, b in zip(columns["item_id"], columns["time"], strict=True))
    assert sorted(seen) == wanted and len(seen) == USERS
    for batch in batches(given):
        check_batch(batch, given.schema)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_global_batch_does_not_depend_on_the_ranks(folder: Path, world_size: int) -> None:
    given = options(folder)
    alone = [users(batch) for batch in batches(given)]
    parts = [batches(given, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = [sorted(user for batch in step for user in users(batch)) for step in zip(*parts, strict=True)]
    assert together == alone


def test_a_position_is_a_step(folder: Path) -> None:
    given = options(folder)
    whole = [users(batch) for batch in batches(given)]
    for start in (1, 3, 5):
        assert [users(batch) for batch in batches(given, start=start)] == whole[start:]


def test_epochs_have_orders_of_their_own_and_seeds_repeat_them(folder: Path) -> None:
    given = options(folder)
    first, again, second = ([users(b) for b in batches(given, epoch=epoch)] for epoch in (0, 0, 1))
    assert first == again != second
    in_order = [users(batch) for batch in batches(options(folder, shuffle=False))]
    assert in_order == [users(batch) for batch in batches(options(folder, shuffle=False), epoch=1)] != first


def test_rows_of_one_group_are_drawn_too(tmp_path: Path) -> None:
    # Groups hold neighbours, such as the windows of one user: a step of theirs alone would be a step of few users.
    write_retrieval(tmp_path, files=1, group=USERS)

    def first(**changes: Any) -> list[tuple[int, ...]]:
        return users(next(batches(options(tmp_path, bucket_steps=1, data_shards=1, **changes))))

    columns = histories(0)
    rows = [(*a, *b) for a, b in zip(columns["item_id"], columns["time"], strict=True)]
    kept = first(shuffle=False)
    assert kept == sorted(rows[: len(kept)])
    assert len(set(first()) - set(kept)) > len(kept) // 2


def test_workers_change_nothing(folder: Path) -> None:
    wanted = [users(b) for b in batches(options(folder))]
    assert [users(b) for b in batches(options(folder, workers=2))] == wanted


def test_steps_hold_rows_of_similar_length(folder: Path) -> None:
    def spread(bucket_steps: int) -> float:
        lengths = [
            b.features["item_id"].lengths().double() for b in batches(options(folder, bucket_steps=bucket_steps))
        ]
        return float(torch.stack([x.std() for x in lengths]).mean())

    assert spread(6) < 0.6 * spread(1)


def test_histories_are_cut_to_the_latest_events(folder: Path) -> None:
    cut = list(batches(options(folder, max_history=3)))
    assert max(int(b.features["item_id"].lengths().max()) for b in cut) == 3
    columns = histories(0)
    pairs = zip(columns["item_id"], columns["time"], strict=True)
    latest = {tuple(items[-3:]) + tuple(times[-3:]) for items, times in pairs}
    assert {user for b in cut for user in users(b)} == latest


def test_negatives_are_the_same_on_all_ranks_and_new_in_each_step(folder: Path) -> None:
    given = options(folder)
    drawn = [[b.features["negative"].values().tolist() for b in batches(given, rank=r, world_size=2)] for r in (0, 1)]
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]
    assert all(1 <= item < ITEMS for step in drawn[0] for item in step)


def test_more_ranks_than_rows_still_step_together(folder: Path) -> None:
    given = options(folder, batch_size=64, data_shards=64)
    steps = [[b.features["item_id"].lengths().numel() for b in batches(given, rank=r, world_size=60)] for r in (0, 59)]
    assert len(steps[0]) == len(steps[1]) == 2
    with pytest.raises(ValueError, match="at least one for each of 65 ranks"):
        batches(given, world_size=65)


def test_stochastic_length_shortens_training_histories(folder: Path) -> None:
    plain = retrieval_options(folder)
    plain["stochastic_length"] = {"alpha": 1.2, "max_seq_len": 16, "sampling": "random"}
    for balance in (None, {"warmup_steps": 1, "period": 2}):
        given = options_from_dict({**plain, **({"load_balance": balance} if balance else {})})
        sampled = list(batches(given, sampler=make_sampler(given)))
        whole = [users(batch) for batch in batches(given)]
        rows = [int(batch.features["item_id"].lengths().sum()) for batch in sampled]
        assert sum(rows) < sum(len(user) // 2 for step in whole for user in step)
        for batch in sampled:
            check_batch(batch, given.schema)
            assert all(np.all(np.diff(user[len(user) // 2 :]) > 0) for user in users(batch))


def write(path: Path, **changes: Any) -> Path:
    columns = {key: values[:12] for key, values in histories(0).items()}
    columns.update(changes)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({key: values for key, values in columns.items() if values is not None}), path, row_group_size=5
    )
    return path


def replaced(key: str, row: int, value: Any) -> dict[str, list[Any]]:
    values = histories(0)[key][:12]
    values[row] = value
    return {key: values}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time": None}, r"one\.parquet: expected a column 'time'"),
        ({"item_id": [[0.5]] * 12}, r"column 'item_id': expected whole numbers .* found list<.*double>"),
        (replaced("item_id", 7, [ITEMS]), r"row 7, column '(item_id|kind)': expected"),
        (replaced("kind", 11, [1] * 99), r"one\.parquet: row 11, column 'kind': expected \d+ values as 'item_id'.* 99"),
        (replaced("time", 6, None), r"row 6, column 'time': expected a value, found none"),
        (replaced("time", 3, [None]), r"row 3, column 'time': expected no missing values"),
    ],
    ids=["no-column", "floats", "id-range", "lengths", "null", "null-inside"],
)
def test_bad_data_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path / "train" / "one.parquet", **changes)
    with pytest.raises(ValueError, match=message):
        list(batches(options(tmp_path)))


def test_ids_beyond_their_table_are_named(tmp_path: Path) -> None:
    items = histories(0)["item_id"][:12]
    items[8] = [ITEMS, *items[8][1:]]
    write(tmp_path / "train" / "one.parquet", item_id=items)
    with pytest.raises(ValueError, match=rf"row 8, column 'item_id': expected ids in \[1, {ITEMS}\).* found {ITEMS}"):
        list(batches(options(tmp_path)))


def test_corrupt_files_are_named_or_counted(tmp_path: Path) -> None:
    write_retrieval(tmp_path)
    footless, torn = sorted((tmp_path / "train").glob("*.parquet"))[:2]
    footless.write_bytes(b"PAR1 and no more")
    body = bytearray(torn.read_bytes())
    body[8:200] = bytes(192)
    torn.write_bytes(body)
    with pytest.raises(CorruptFile, match=rf"{footless.name}.*on_corrupt: skip"):
        plan_stream(options(tmp_path), training=True)
    given = options(tmp_path, on_corrupt="skip")
    plan, messages = plan_stream(given, training=True)
    assert len(messages) == 1 and footless.name in messages[0]
    skipped = SkippedData()
    seen = sum(len(users(batch)) for batch in batches(given, skipped=skipped))
    assert 0 < skipped.rows < 32 and seen + skipped.rows == plan.num_rows == 64
    assert any(torn.name in reason and "row group" in reason for reason in skipped.reasons)
    footless.unlink()
    with pytest.raises(CorruptFile, match=torn.name):
        list(batches(options(tmp_path)))


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found none"):
        plan_stream(options(tmp_path), training=True)
    with pytest.raises(ValueError, match=r"data\.eval"):
        plan_stream(options(tmp_path, eval=None), training=False)
