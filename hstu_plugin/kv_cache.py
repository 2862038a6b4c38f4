"""Encoded histories that outlive a request: one entry for each user, with an explicit life.

A user's keys and values of the layers that see whole sequences lie in pages. What an append makes anew lies beside
them, bounded in size: the inputs of the rows that a later event changes, and, with truncation, the rows that enter the
later layers and those layers' keys and values.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_kernels import JaggedLayout, LayerKV
from hstu_plugin.encoder import KVCache
from hstu_plugin.kv_pages import KVPages, Rows

User = Hashable


@dataclass(frozen=True, slots=True)
class Beside:
    """What one user has beside the pages.

    Attributes:
        tail: ``[rows, D]`` encoder inputs of the rows that a later event changes.
        waist: ``[W, D]`` rows that enter the layers behind the truncation, or ``None``.
        late_k, late_v: ``[late layers, W, H, D]``, or ``None``.
    """

    tail: Tensor
    waist: Tensor | None = None
    late_k: Tensor | None = None
    late_v: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._tensors() if t is not None)

    def to(self, move: _Move) -> Beside:
        return Beside(*(None if t is None else move(t) for t in self._tensors()))  # type: ignore[arg-type]

    def used_by(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator of a stream other than the one that the tensors were made on."""
        for tensor in self._tensors():
            if tensor is not None:
                tensor.record_stream(stream)

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.tail, self.waist, self.late_k, self.late_v


class _Move:
    """Copies to one device: through pinned memory and without waiting, where the other end is a GPU."""

    def __init__(self, device: torch.device, *, pinned: bool) -> None:
        self.device, self.pinned = device, pinned

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cpu" and self.pinned:
            out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return out.copy_(tensor, non_blocking=True)
        return tensor.to(self.device, non_blocking=True, copy=True)


@dataclass(slots=True)
class _Entry:
    length: int
    pages: list[int]
    beside: Beside
    host: Rows | None = None  # the content of the pages, while offloaded
    moved: torch.cuda.Event | None = None  # recorded behind the latest copy to or from the host


class ChannelCache:
    """The entries of one transducer. `hstu_plugin.mfalcon` fills and reads it."""

    def __init__(self, pages: KVPages, *, contextual_seq_len: int) -> None:
        self.pages = pages
        self.contextual_seq_len = contextual_seq_len
        self._entries: dict[User, _Entry] = {}
        device = pages.shape.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __contains__(self, user: User) -> bool:
        return user in self._entries

    @property
    def users(self) -> tuple[User, ...]:
        return tuple(self._entries)

    def lengths(self, users: Sequence[User]) -> list[int]:
        """Rows of each user's history, contextual ones included."""
        return [self._entries[user].length for user in users]

    def beside(self, users: Sequence[User]) -> list[Beside]:
        """What the users have beside the pages, on the device."""
        self.prefetch(users)
        return [self._ready(user).beside for user in users]

    def check_room(self, users: Sequence[User], last: Sequence[int]) -> None:
        """Raise `OutOfPages` unless `write` up to ``last`` would fit."""
        self.pages.give_back(self.pages.take(sum(self._wanted(users, last))))

    def write(
        self,
        users: Sequence[User],
        first: Sequence[int],
        last: Sequence[int],
        fresh: KVCache,
        times: Tensor | None,
        beside: Sequence[Beside],
    ) -> None:
        """Rows ``[first, last)`` of each user anew, all of them in ``fresh``; ``last`` becomes the length.

        Raises:
            OutOfPages: the pool is full; nothing has changed then.
        """
        wanted = self._wanted(users, last)
        taken = self.pages.take(sum(wanted))
        rows = []
        for user, count, begin, end, own in zip(users, wanted, first, last, beside, strict=True):
            pages = (self._ready(user).pages if user in self._entries else []) + taken[:count]
            taken = taken[count:]
            surplus = pages[self.pages.pages_for(end) :]
            self.pages.give_back(surplus)
            pages = pages[: len(pages) - len(surplus)]
            self._entries[user] = _Entry(end, pages, own)
            rows.append(self.pages.rows_of(pages, begin, end))
        self.pages.write(torch.cat([torch.zeros(0, dtype=torch.int64), *rows]), fresh, times)

    def read(self, users: Sequence[User], lengths: Sequence[int] | None = None) -> KVCache:
        """Keys and values of the users' first ``lengths`` rows (all of them by default) in the paged layers."""
        self.prefetch(users)
        entries = [self._ready(user) for user in users]
        counts = [entry.length for entry in entries] if lengths is None else list(lengths)
        # Most requests are about one user, whose pages mostly lie side by side.
        rows = self.pages.read_pages(entries[0].pages, counts[0]) if len(entries) == 1 else None
        if rows is None:
            places = [self.pages.rows_of(e.pages, 0, n) for e, n in zip(entries, counts, strict=True)]
            rows = self.pages.read(torch.cat([torch.zeros(0, dtype=torch.int64), *places]))
        layout = self._layout(counts)
        return tuple(LayerKV(k, v, layout, rows.times) for k, v in zip(rows.k, rows.v, strict=True))

    def read_times(self, users: Sequence[User]) -> Tensor:
        """Times of all rows of the users, one after another."""
        self.prefetch(users)
        entries = [self._ready(user) for user in users]
        places = [self.pages.rows_of(entry.pages, 0, entry.length) for entry in entries]
        return self.pages.read_times(torch.cat([torch.zeros(0, dtype=torch.int64), *places]))

    def read_late(self, users: Sequence[User], times: Tensor | None) -> KVCache:
        """Keys and values of the layers behind the truncation, for rows at ``times``; empty without truncation."""
        beside = self.beside(users)
        if not beside or beside[0].late_k is None:
            return ()
        late_k = torch.cat([b.late_k for b in beside if b.late_k is not None], dim=1)
        late_v = torch.cat([b.late_v for b in beside if b.late_v is not None], dim=1)
        layout = self._layout([b.late_k.shape[1] for b in beside if b.late_k is not None])
        return tuple(LayerKV(k, v, layout, times) for k, v in zip(late_k, late_v, strict=True))

    def evict(self, users: Iterable[User]) -> None:
        for user in users:
            if user in self._entries:
                self.pages.give_back(self._ready(user).pages)
                del self._entries[user]

    def offload(self, users: Iterable[User]) -> None:
        """Move the users' entries to the host; their pages are free for others."""
        to_host = _Move(torch.device("cpu"), pinned=self._stream is not None)
        for user in users:
            entry = self._ready(user)
            if entry.host is not None:
                continue
            rows = self.pages.read(self.pages.rows_of(entry.pages, 0, entry.length))
            times = None if rows.times is None else to_host(rows.times)
            entry.host = Rows(to_host(rows.k), to_host(rows.v), times)
            entry.beside = entry.beside.to(to_host)
            self.pages.give_back(entry.pages)
            entry.pages = []
            entry.moved = self._event(torch.cuda.current_stream(self._stream.device)) if self._stream else None

    def prefetch(self, users: Iterable[User]) -> None:
        """Bring offloaded users back, beside the work of the current stream; users on the device stay as they are."""
        away = [entry for entry in map(self._entry, dict.fromkeys(users)) if entry.host is not None]
        pages = self.pages.take(sum(self.pages.pages_for(entry.length) for entry in away))
        to_device = _Move(self.pages.shape.device, pinned=False)
        for entry in away:
            count = self.pages.pages_for(entry.length)
            entry.pages, pages = pages[:count], pages[count:]
            assert entry.host is not None
            rows = self.pages.rows_of(entry.pages, 0, entry.length)
            if self._stream is None:
                self.pages.restore(rows, entry.host)
                entry.beside = entry.beside.to(to_device)
            else:
                current = torch.cuda.current_stream(self._stream.device)
                # Freed pages may still be read by what is queued now.
                self._stream.wait_stream(current)
                with torch.cuda.stream(self._stream):
                    self.pages.restore(rows, entry.host)
                    entry.beside = entry.beside.to(to_device)
                    entry.moved = self._event(self._stream)
                entry.beside.used_by(current)
            entry.host = None

    def offloaded(self, user: User) -> bool:
        return self._entry(user).host is not None

    def nbytes_of(self, user: User) -> tuple[int, int]:
        """Bytes of the user on the device and on the host."""
        entry = self._entry(user)
        if entry.host is not None:
            return 0, entry.host.nbytes + entry.beside.nbytes
        return len(entry.pages) * self.pages.page_nbytes + entry.beside.nbytes, 0

    def _wanted(self, users: Sequence[User], last: Sequence[int]) -> list[int]:
        """Pages that each user needs beside its own."""
        owned = [len(self._entries[user].pages) if user in self._entries else 0 for user in users]
        return [max(0, self.pages.pages_for(rows) - own) for own, rows in zip(owned, last, strict=True)]

    def _layout(self, lengths: Sequence[int]) -> JaggedLayout:
        device, context = self.pages.shape.device, self.contextual_seq_len
        return JaggedLayout.from_counts(lengths, device=device, contextual_seq_len=context)

    def _entry(self, user: User) -> _Entry:
        if user not in self._entries:
            raise ValueError(f"users: no cached history of {user!r}; prefill it first")
        return self._entries[user]

    def _ready(self, user: User) -> _Entry:
        """The entry, once copies that are under way have arrived."""
        entry = self._entry(user)
        if entry.moved is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(entry.moved)
        return entry

    def _event(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return event


class HistoryCache:
    """Encoded histories by user, over all channels of a ranker; made by `MFalconRanker.new_cache`.

    Nothing leaves it by itself: `evict` and `offload` are the caller's decisions. One thread at a time may use it.
    """

    def __init__(self, channels: dict[str, ChannelCache], *, weights: Hashable) -> None:
        self.channels = channels
        self.weights = weights

    def __contains__(self, user: User) -> bool:
        return any(user in channel for channel in self.channels.values())

    def __len__(self) -> int:
        return len(self.users)

    @property
    def users(self) -> tuple[User, ...]:
        """Users in the order of their first prefill."""
        return next(iter(self.channels.values())).users

    @property
    def nbytes(self) -> int:
        """Bytes of all entries on the device; pages count in whole."""
        return sum(self.nbytes_of(user) for user in self.users)

    @property
    def host_nbytes(self) -> int:
        """Bytes of all offloaded entries."""
        return sum(channel.nbytes_of(u)[1] for channel in self.channels.values() for u in channel.users)

    @property
    def reserved_nbytes(self) -> int:
        """Bytes that the pools hold on the device, free pages included."""
        return sum(channel.pages.reserved_nbytes for channel in self.channels.values())

    def nbytes_of(self, user: User) -> int:
        """Bytes of one user on the device; 0 while offloaded."""
        return sum(channel.nbytes_of(user)[0] for channel in self.channels.values())

    def evict(self, users: Iterable[User]) -> None:
        """Forget these users; unknown ones are no error."""
        users = list(users)
        for channel in self.channels.values():
            channel.evict(users)

    def offload(self, users: Iterable[User]) -> None:
        """Move these users to host memory (pinned beside a GPU). Scoring or appending brings them back.

        Raises:
            ValueError: a user is not cached.
        """
        users = list(users)
        for channel in self.channels.values():
            channel.offload(users)

    def prefetch(self, users: Iterable[User]) -> None:
        """Start to bring offloaded users back, so that the next call finds them there.

        Raises:
            ValueError: a user is not cached.
            OutOfPages: the pool is full.
        """
        users = list(users)
        for channel in self.channels.values():
            channel.prefetch(users)

    def offloaded(self, user: User) -> bool:
        """Whether the user is on the host."""
        return any(channel.offloaded(user) for channel in self.channels.values())
