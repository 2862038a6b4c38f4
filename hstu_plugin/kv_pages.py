"""Keys and values of many users in pages of one pool, so that a history grows without being copied."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_kernels import LayerKV


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one row of the pool holds.

    Attributes:
        layers, heads, qk_dim, v_dim: of the transducer.
        dtype, device: of keys and values.
        timed: whether rows have times.
    """

    layers: int
    heads: int
    qk_dim: int
    v_dim: int
    dtype: torch.dtype
    device: torch.device
    timed: bool

    @property
    def row_nbytes(self) -> int:
        return self.layers * self.heads * (self.qk_dim + self.v_dim) * self.dtype.itemsize + 8 * self.timed


class OutOfPages(RuntimeError):
    """The pool has reached its limit."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of all layers. ``k [layers, R, H, Dqk]``, ``v [layers, R, H, Dv]``, ``times [R]`` int64 or ``None``."""

    k: Tensor
    v: Tensor
    times: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.k, self.v, self.times) if t is not None)


class KVPages:
    """A pool of pages of ``page_size`` rows. It grows by slabs of ``slab_pages`` pages, which never move.

    Args:
        shape: of a row.
        page_size: rows of a page; a user wastes at most one page.
        slab_pages: pages that are allocated at once.
        max_pages: `take` raises `OutOfPages` beyond; ``None`` for no limit.
    """

    def __init__(self, shape: KVShape, *, page_size: int, slab_pages: int, max_pages: int | None = None) -> None:
        for name, value in (("page_size", page_size), ("slab_pages", slab_pages)):
            if value < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {value}")
        self.shape, self.page_size, self.max_pages = shape, page_size, max_pages
        self.slab_pages = slab_pages
        self._slabs: list[Rows] = []
        self._free: list[int] = []

    @property
    def num_pages(self) -> int:
        """Pages in use."""
        return len(self._slabs) * self.slab_pages - len(self._free)

    @property
    def page_nbytes(self) -> int:
        return self.shape.row_nbytes * self.page_size

    @property
    def reserved_nbytes(self) -> int:
        """Bytes of all slabs, in use or not."""
        return sum(slab.nbytes for slab in self._slabs)

    def pages_for(self, rows: int) -> int:
        """Pages that ``rows`` rows need."""
        return -(-rows // self.page_size)

    def take(self, count: int) -> list[int]:
        """``count`` free pages, those of low number first.

        Raises:
            OutOfPages: there would be more than ``max_pages`` in use; nothing is taken then.
        """
        if self.max_pages is not None and self.num_pages + count > self.max_pages:
            raise OutOfPages(
                f"max_pages: {count} more pages are needed beside {self.num_pages} in use, and the limit is "
                f"{self.max_pages}; evict or offload users first"
            )
        while len(self._free) < count:
            first = len(self._slabs) * self.slab_pages
            self._slabs.append(self._slab())
            for page in range(first, first + self.slab_pages):
                heapq.heappush(self._free, page)
        return [heapq.heappop(self._free) for _ in range(count)]

    def give_back(self, pages: Sequence[int]) -> None:
        """These pages are free again."""
        for page in pages:
            heapq.heappush(self._free, page)

    def rows_of(self, pages: Sequence[int], first: int, last: int) -> Tensor:
        """``[last - first]`` int64 of the CPU: where rows ``[first, last)`` of a user with these pages lie."""
        rows = torch.arange(first, last)
        if first >= last:
            return rows
        return torch.tensor(pages)[rows // self.page_size] * self.page_size + rows % self.page_size

    def write(self, rows: Tensor, fresh: Sequence[LayerKV], times: Tensor | None) -> None:
        """Put the keys and values of ``fresh``, one entry for each layer, and ``times`` at ``rows [R]``."""
        for slab, here, mine in self._by_slab(rows):
            for layer, kv in enumerate(fresh):
                slab.k[layer].index_copy_(0, here, kv.k if mine is None else kv.k[mine])
                slab.v[layer].index_copy_(0, here, kv.v if mine is None else kv.v[mine])
            if slab.times is not None and times is not None:
                slab.times.index_copy_(0, here, times if mine is None else times[mine])

    def restore(self, rows: Tensor, content: Rows) -> None:
        """Put back what `read` gave, from wherever it is."""
        device = self.shape.device
        k, v = content.k.to(device, non_blocking=True), content.v.to(device, non_blocking=True)
        times = None if content.times is None else content.times.to(device, non_blocking=True)
        for slab, here, mine in self._by_slab(rows):
            pick = slice(None) if mine is None else mine
            slab.k.index_copy_(1, here, k[:, pick])
            slab.v.index_copy_(1, here, v[:, pick])
            if slab.times is not None and times is not None:
                slab.times.index_copy_(0, here, times[pick])

    def read_pages(self, pages: Sequence[int], count: int) -> Rows | None:
        """The first ``count`` rows of ``pages`` as views, where the pages lie side by side; otherwise ``None``."""
        first = pages[0] if pages else 0
        slab, page = divmod(first, self.slab_pages)
        if not count or list(pages) != list(range(first, first + len(pages))):
            return None
        if page + len(pages) > self.slab_pages:
            return None
        return _part(self._slabs[slab], page * self.page_size, count)

    def read(self, rows: Tensor) -> Rows:
        """The content of ``rows [R]``: a view where they lie side by side, otherwise a copy. Not to be written to."""
        count, shape = rows.numel(), self.shape
        parts = list(self._by_slab(rows))
        if len(parts) == 1:
            slab, here, _ = parts[0]
            first = int(rows[0]) % (self.slab_pages * self.page_size)
            if bool((rows.diff() == 1).all()):
                return _part(slab, first, count)
            times = None if slab.times is None else slab.times[here]
            return Rows(slab.k.index_select(1, here), slab.v.index_select(1, here), times)
        out = self._rows(count)
        for slab, here, mine in parts:
            assert mine is not None
            out.k.index_copy_(1, mine, slab.k.index_select(1, here))
            out.v.index_copy_(1, mine, slab.v.index_select(1, here))
            if out.times is not None and slab.times is not None:
                out.times.index_copy_(0, mine, slab.times[here])
        assert out.k.shape == (shape.layers, count, shape.heads, shape.qk_dim)
        return out

    def read_times(self, rows: Tensor) -> Tensor:
        """``[R]`` int64 times of ``rows``."""
        out = torch.empty(rows.numel(), dtype=torch.int64, device=self.shape.device)
        for slab, here, mine in self._by_slab(rows):
            if slab.times is None:
                raise ValueError("times: this pool holds none")
            out[slice(None) if mine is None else mine] = slab.times[here]
        return out

    def _by_slab(self, rows: Tensor) -> list[tuple[Rows, Tensor, Tensor | None]]:
        """Slab, rows inside it, and which of ``rows`` they are (``None`` for all), for each slab that is touched."""
        if not rows.numel():
            return []
        device, size = self.shape.device, self.slab_pages * self.page_size
        slabs = rows // size
        low, high = int(slabs.min()), int(slabs.max())
        if low == high:
            return [(self._slabs[low], (rows - low * size).to(device, non_blocking=True), None)]
        found: list[tuple[Rows, Tensor, Tensor | None]] = []
        for index in range(low, high + 1):
            mine = (slabs == index).nonzero().squeeze(1)
            if mine.numel():
                here = (rows[mine] - index * size).to(device, non_blocking=True)
                found.append((self._slabs[index], here, mine.to(device, non_blocking=True)))
        return found

    def _slab(self) -> Rows:
        # An ordinary tensor, though the call may come from inference mode: others must be able to write to it.
        with torch.inference_mode(False):
            return self._rows(self.slab_pages * self.page_size)

    def _rows(self, count: int) -> Rows:
        shape = self.shape

        def room(width: int) -> Tensor:
            size = (shape.layers, count, shape.heads, width)
            return torch.empty(size, dtype=shape.dtype, device=shape.device)

        times = torch.empty(count, dtype=torch.int64, device=shape.device) if shape.timed else None
        return Rows(room(shape.qk_dim), room(shape.v_dim), times)


def _part(slab: Rows, first: int, count: int) -> Rows:
    rows = slice(first, first + count)
    return Rows(slab.k[:, rows], slab.v[:, rows], None if slab.times is None else slab.times[rows])
