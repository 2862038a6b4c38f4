"""Windows of a log, against a loop over users and events."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from hstu_plugin.ranking_windows import EventLog, cut_windows, window_batch

from .ranking_cases import make_events, make_features

LENGTHS = [7, 0, 1, 23, 4]


def make_log(seed: int = 0) -> EventLog:
    features = make_features()
    events = make_events(LENGTHS, features, seed=seed)
    assert events.timestamps is not None
    # Events of one second: 3 and 4 of the first user, 5 to 9 of the fourth.
    events.timestamps[4] = events.timestamps[3]
    events.timestamps[13:18] = events.timestamps[13]
    times = events.timestamps
    roles = (times > 11_000).long() + (times > 13_000).long()
    return EventLog(events, torch.zeros(5, 2, dtype=torch.int64), torch.rand(35, 2), roles)


def naive(log: EventLog, role: int, max_history: int, max_candidates: int, gap: int | None) -> list[tuple[int, ...]]:
    times, roles = log.events.timestamps.tolist(), log.roles.tolist()  # type: ignore[union-attr]
    offsets = log.events.layout.seq_offsets.tolist()
    windows = []
    for user, (begin, end) in enumerate(itertools.pairwise(offsets)):
        block: list[int] = []
        blocks = []
        for row in range(begin, end):
            if roles[row] != role:
                continue
            far = block and gap is not None and times[row] - times[block[-1]] > gap
            if far or len(block) == max_candidates:
                blocks.append(block)
                block = []
            block.append(row)
        blocks += [block] if block else []
        for rows in blocks:
            known = [row for row in range(begin, end) if times[row] < times[rows[0]]]
            kept = known[-max_history:] if max_history else []
            last = begin + len(known)
            windows.append((user, kept[0] if kept else last, last, rows[0], rows[-1] + 1))
    return windows


@pytest.mark.parametrize("role", [0, 1, 2, 3])
@pytest.mark.parametrize("max_candidates", [1, 3, 50])
@pytest.mark.parametrize(("max_history", "gap"), [(50, None), (4, 300), (0, 0)])
def test_windows_equal_the_loop(role: int, max_candidates: int, max_history: int, gap: int | None) -> None:
    log = make_log()
    got = cut_windows(log, role, max_history=max_history, max_candidates=max_candidates, session_gap=gap)
    columns = [getattr(got, name).tolist() for name in ("user", "begin", "history_end", "first", "end")]
    expected = naive(log, role, max_history, max_candidates, gap)
    assert list(zip(*columns, strict=True)) == expected
    # Each event is a candidate once.
    shown = [row for _, _, _, first, end in expected for row in range(first, end)]
    assert shown == (log.roles == role).nonzero().flatten().tolist()


def test_a_batch_holds_the_rows_of_its_windows() -> None:
    log = make_log()
    windows = cut_windows(log, 1, max_history=4, max_candidates=3)
    order = torch.tensor([len(windows) - 1, 0, 1])
    batch = window_batch(log, windows.take(order))
    for place, window in enumerate(order.tolist()):
        begin, last, first, end = (getattr(windows, n)[window].item() for n in ("begin", "history_end", "first", "end"))
        a, b = batch.history.layout.seq_offsets[place : place + 2].tolist()
        c, d = batch.candidates.layout.seq_offsets[place : place + 2].tolist()
        assert torch.equal(batch.history.items[a:b], log.events.items[begin:last])
        assert torch.equal(batch.candidates.items[c:d], log.events.items[first:end])
        assert torch.equal(batch.labels[c:d], log.labels[first:end])
        assert torch.equal(batch.users[place], log.users[windows.user[window]])
    assert batch.history.timestamps is not None and batch.candidates.timestamps is not None
    assert batch.history.timestamps.max() < batch.candidates.timestamps.max()


def test_logs_out_of_order_and_wrong_sizes_are_refused() -> None:
    log = make_log()
    times = log.events.timestamps.clone()  # type: ignore[union-attr]
    times[2] = 0
    with pytest.raises(ValueError, match=r"events.timestamps: expected each user's to rise"):
        replace(log, events=replace(log.events, timestamps=times))
    with pytest.raises(ValueError, match="roles: expected each user's to rise"):
        replace(log, roles=2 - log.roles)
    with pytest.raises(ValueError, match=r"labels: expected \[35, tasks\]"):
        replace(log, labels=log.labels[1:])
    with pytest.raises(ValueError, match=r"users: expected \[5, features\]"):
        replace(log, users=log.users[1:])
    with pytest.raises(ValueError, match="timestamps, got None"):
        replace(log, events=replace(log.events, timestamps=None))
    with pytest.raises(ValueError, match="max_candidates"):
        cut_windows(log, 1, max_history=3, max_candidates=0)
