"""Windows of a log for generative ranking: each event is a candidate once, many candidates share one history.

A user's events are cut into blocks of up to ``max_candidates`` consecutive events. A block's history is what the user
did before the block's first event. A pass over ``n`` events then costs ``n / max_candidates`` encodings of a history in
place of ``n``; the price is that a candidate does not see what happened to earlier candidates of its own block, as in a
request that shows several items at once. ``max_candidates=1`` is the exact protocol, one history for each event.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_kernels import JaggedLayout
from hstu_plugin.events import Events
from hstu_plugin.ranking_model import RankingBatch


@dataclass(frozen=True, slots=True)
class EventLog:
    """All events of all users, on one device.

    Attributes:
        events: one sequence for each user, in order of time, with timestamps.
        users: ``[U, user features]`` int64 ids.
        labels: ``[E, num_tasks]`` float; NaN missing.
        roles: ``[E]`` int64, the split of each event: the caller's numbers. Rising with time inside a user.
    """

    events: Events
    users: Tensor
    labels: Tensor
    roles: Tensor

    def __post_init__(self) -> None:
        rows, users = self.events.items.shape[0], self.events.layout.batch_size
        if self.users.dim() != 2 or self.users.shape[0] != users:
            raise ValueError(f"users: expected [{users}, features], got {tuple(self.users.shape)}")
        if self.labels.dim() != 2 or self.labels.shape[0] != rows:
            raise ValueError(f"labels: expected [{rows}, tasks], got {tuple(self.labels.shape)}")
        if self.roles.shape != (rows,):
            raise ValueError(f"roles: expected [{rows}], got {tuple(self.roles.shape)}")
        times = self.events.timestamps
        if times is None:
            raise ValueError("events: expected timestamps, got None")
        same_user = self.events.layout.row_indices(rows)[1:] > 0
        for name, column in (("events.timestamps", times), ("roles", self.roles)):
            if bool(((column.diff() < 0) & same_user).any()):
                raise ValueError(f"{name}: expected each user's to rise; sort the events by user and time")


@dataclass(frozen=True, slots=True)
class Windows:
    """Rows of an `EventLog`: histories ``[begin, history_end)``, candidates ``[first, end)``; each ``[W]`` int64."""

    user: Tensor
    begin: Tensor
    history_end: Tensor
    first: Tensor
    end: Tensor

    def __len__(self) -> int:
        return self.user.numel()

    def take(self, rows: Tensor) -> Windows:
        """These windows, in this order."""
        return Windows(*(getattr(self, name)[rows] for name in Windows.__slots__))


def cut_windows(
    log: EventLog, role: int, *, max_history: int, max_candidates: int, session_gap: int | None = None
) -> Windows:
    """Blocks of the events with this role; every one of them is a candidate of exactly one window.

    A history ends before the first event of its block's first second, so that events logged together do not tell about
    each other.

    Args:
        log: on the CPU.
        role: whose events are candidates; earlier events of any role are history.
        max_history: latest events that a history keeps.
        max_candidates: events of a block.
        session_gap: a block also ends where this many seconds pass between two events.
    """
    if max_history < 0 or max_candidates < 1 or (session_gap is not None and session_gap < 0):
        raise ValueError(
            "max_history, max_candidates, session_gap: expected numbers >= 0, >= 1 and >= 0 or None, "
            f"got {max_history}, {max_candidates} and {session_gap}"
        )
    times = log.events.timestamps
    assert times is not None
    rows = (log.roles == role).nonzero().flatten()
    layout, total = log.events.layout, log.events.items.shape[0]
    users = layout.sequence_ids(total)
    owner = users[rows]
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[1:] = owner[1:] != owner[:-1]
    if session_gap is not None:
        begins[1:] |= times[rows].diff() > session_gap
    # Place inside the session; each `max_candidates`-th event begins another block.
    index = torch.arange(rows.numel())
    place = index - index[begins][begins.long().cumsum(0) - 1]
    starts = (place % max_candidates == 0).nonzero().flatten()
    first = rows[starts]
    last = torch.cat([starts[1:], torch.tensor([rows.numel()])])[: starts.numel()] - 1
    user = users[first]
    history_end = _first_of_second(times, users)[first]
    begin = torch.maximum(layout.seq_offsets[user], history_end - max_history)
    return Windows(user, begin, history_end, first, rows[last] + 1)


def window_batch(log: EventLog, windows: Windows, device: torch.device | str = "cpu") -> RankingBatch:
    """The windows as a batch on ``device``, where the log's tensors are; indices are made on the CPU."""
    history, history_layout = _ranges(windows.begin, windows.history_end)
    shown, shown_layout = _ranges(windows.first, windows.end)
    history, shown, user = (rows.to(device, non_blocking=True) for rows in (history, shown, windows.user))
    return RankingBatch(
        log.events.take(history, _moved(history_layout, device)),
        log.events.take(shown, _moved(shown_layout, device)),
        log.users[user],
        log.labels[shown],
    )


def _first_of_second(times: Tensor, users: Tensor) -> Tensor:
    """``[E]``: the first row of the same user and second."""
    begins = torch.ones_like(times, dtype=torch.bool)
    begins[1:] = (times.diff() != 0) | (users.diff() != 0)
    return begins.nonzero().flatten()[begins.long().cumsum(0) - 1]


def _ranges(begins: Tensor, ends: Tensor) -> tuple[Tensor, JaggedLayout]:
    layout = JaggedLayout.from_lengths(ends - begins)
    total = int(layout.seq_offsets[-1])
    starts = torch.repeat_interleave(begins, layout.seq_lengths, output_size=total)
    return starts + layout.row_indices(total), layout


def _moved(layout: JaggedLayout, device: torch.device | str) -> JaggedLayout:
    return JaggedLayout(layout.seq_offsets.to(device, non_blocking=True), layout.max_seq_len)
