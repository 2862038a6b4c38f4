"""Embedding tables for serving: rows stay packed until they are on the device that needs them.

A table lies in host memory (pinned beside a GPU) or in the memory of the device. With a host table the distinct rows of
a request are gathered on the CPU, copied packed, and turned into numbers on the device. `ServingTable.prefetch` gathers
and starts the copy on a stream of its own, so that both run while the device computes the previous request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from hstu_kernels import Backend
from hstu_kernels.int4 import AddedRows, PackedRows, gather_rows
from hstu_plugin.quantized_embedding import QuantizedEmbedding

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Placement(StrEnum):
    """Where a table lies: ``HOST`` memory, pinned beside a GPU, or the memory of the ``DEVICE``."""

    HOST = "host"
    DEVICE = "device"


@dataclass(slots=True)
class TransferCounts:
    """What went from host to device since the table was made or `ServingTable.reset_counts` was called.

    Attributes:
        requests: prefetches.
        rows: ids asked for.
        unique_rows: rows copied.
        bytes: of rows and ids.
    """

    requests: int = 0
    rows: int = 0
    unique_rows: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Prefetched:
    """Rows on their way; a handle for `ServingTable.rows`, good once or more often, in any order.

    Attributes:
        table: the rows of the request, on the device: packed, or dense.
        ids: ``[L]`` where in ``table`` each row of the request lies.
        ready: what the device has to wait for; ``None`` where nothing runs in the background.
    """

    table: PackedRows | Tensor
    ids: Tensor
    ready: torch.cuda.Event | None


class ServingTable:
    """Maps ids ``[L]`` to rows ``[L, D]`` on a device.

    ``table(ids)`` is ``table.rows(table.prefetch(ids))``. For overlap, prefetch the next request before computing this
    one. Not for use by several threads at once: each thread takes its own `ServingTable` over the same rows.

    Args:
        rows: packed rows, a `QuantizedEmbedding`, or a dense ``[rows, D]`` tensor for comparison.
        device: where rows are needed.
        placement: ``host`` or ``device``.
        dtype: of the rows that come out.
        backend: of the dequantising gather (`hstu_kernels.int4.gather_rows`).
        in_flight: prefetches whose copies may be under way at once; staging memory for each.

    Raises:
        TypeError, ValueError: arguments of the wrong type, or out of their range.
    """

    def __init__(
        self,
        rows: PackedRows | QuantizedEmbedding | Tensor,
        *,
        device: torch.device | str = "cpu",
        placement: Placement | str = Placement.HOST,
        dtype: torch.dtype = torch.bfloat16,
        backend: Backend | str = Backend.AUTO,
        in_flight: int = 2,
    ) -> None:
        if placement not in list(Placement):
            raise ValueError(f"placement: expected one of {', '.join(Placement)}, got {placement!r}")
        if dtype not in _DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(map(str, _DTYPES))}, got {dtype}")
        if not isinstance(in_flight, int) or in_flight < 1:
            raise ValueError(f"in_flight: expected an int >= 1, got {in_flight!r}")
        packed = rows.rows if isinstance(rows, QuantizedEmbedding) else rows
        if isinstance(packed, Tensor) and (packed.dim() != 2 or packed.dtype not in _DTYPES):
            raise ValueError(
                f"rows: expected packed rows or a dense [rows, D] table of {', '.join(map(str, _DTYPES))}, got "
                f"{tuple(packed.shape)} of {packed.dtype}"
            )
        if not isinstance(packed, Tensor | PackedRows):
            raise TypeError(f"rows: expected PackedRows, QuantizedEmbedding or a tensor, got {type(rows).__name__}")
        self.device = torch.device(device)
        self.placement = Placement(placement)
        self.dtype, self.backend = dtype, backend
        data = packed.data if isinstance(packed, PackedRows) else packed.detach().contiguous()
        self._dim = packed.dim if isinstance(packed, PackedRows) else packed.shape[1]
        self._format = packed.format if isinstance(packed, PackedRows) else None
        on_gpu = self.device.type == "cuda"
        if self.placement is Placement.DEVICE:
            self._data = data.to(self.device)
        else:
            self._data = data.cpu()
            if on_gpu and not self._data.is_pinned():
                self._data = self._data.pin_memory()
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._staging = [_Staging(pinned=on_gpu) for _ in range(in_flight)]
        self._turn = 0
        self.counts = TransferCounts()

    @property
    def source(self) -> PackedRows | Tensor:
        """The rows where they lie; another `ServingTable` of the same placement over them takes no further memory."""
        return self._table(self._data)

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return self._data.shape[0]

    @property
    def dim(self) -> int:
        """Width ``D`` of a row."""
        return self._dim

    @property
    def nbytes(self) -> int:
        """Bytes of the table, where it lies."""
        return self._data.numel() * self._data.element_size()

    def prefetch(self, ids: Tensor) -> Prefetched:
        """Start to bring rows to the device.

        Args:
            ids: ``[L]`` int64 or int32, best on the CPU, where requests arrive: ids on a GPU are waited for when the
                table lies in host memory.

        Raises:
            TypeError, ValueError: ids of a wrong type or shape, or (looked at on the CPU only) outside the table.
        """
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ids: expected an int64 or int32 tensor, got {ids.dtype}")
        if ids.dim() != 1:
            raise ValueError(f"ids: expected [L], got {tuple(ids.shape)}")
        self.counts.requests += 1
        self.counts.rows += ids.numel()
        if self.placement is Placement.DEVICE:
            return self._prefetch_ids(ids)
        ids = ids.cpu()
        self._refuse_outside(ids)
        distinct, places = torch.unique(ids, return_inverse=True)
        staging = self._next_staging()
        rows = staging.take("rows", (distinct.numel(), self._data.shape[1]), self._data.dtype)
        torch.index_select(self._data, 0, distinct, out=rows)
        where = staging.take("ids", places.shape, places.dtype).copy_(places)
        (there, where), ready = self._copied(staging, rows, where)
        self.counts.unique_rows += distinct.numel()
        return Prefetched(self._table(there), where, ready)

    def rows(
        self,
        prefetched: Prefetched,
        *,
        item_scale: float = 1.0,
        actions: AddedRows | None = None,
        positions: AddedRows | None = None,
    ) -> Tensor:
        """``[L, D]`` of a prefetched request, on the current stream; optional terms as in `gather_rows`."""
        if prefetched.ready is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(prefetched.ready)
            # Allocated on the copying stream: not to be used again there before this stream is done with them.
            held = prefetched.table.data if isinstance(prefetched.table, PackedRows) else prefetched.table
            for tensor in (held, prefetched.ids):
                tensor.record_stream(stream)
        if isinstance(prefetched.table, PackedRows):
            return gather_rows(
                prefetched.table,
                prefetched.ids,
                item_scale=item_scale,
                actions=actions,
                positions=positions,
                dtype=self.dtype,
                backend=self.backend,
            )
        values = prefetched.table.index_select(0, prefetched.ids).float() * item_scale
        for term in (actions, positions):
            if term is not None:
                added = term.table.index_select(0, term.ids.clamp(min=0)).float()
                values = values + added * (term.ids >= 0)[:, None]
        return values.to(self.dtype)

    def __call__(self, ids: Tensor) -> Tensor:
        """Rows ``[L, D]`` of ids ``[L]``, without overlap."""
        return self.rows(self.prefetch(ids))

    def reset_counts(self) -> TransferCounts:
        """The counts so far; they start anew."""
        counts, self.counts = self.counts, TransferCounts()
        return counts

    def _table(self, data: Tensor) -> PackedRows | Tensor:
        return data if self._format is None else PackedRows(data, self._dim, self._format)

    def _prefetch_ids(self, ids: Tensor) -> Prefetched:
        if ids.device.type != "cpu":
            return Prefetched(self._table(self._data), ids.to(self.device), None)
        self._refuse_outside(ids)
        staging = self._next_staging()
        (there,), ready = self._copied(staging, staging.take("ids", ids.shape, ids.dtype).copy_(ids))
        return Prefetched(self._table(self._data), there, ready)

    def _next_staging(self) -> _Staging:
        self._turn = (self._turn + 1) % len(self._staging)
        return self._staging[self._turn]

    def _refuse_outside(self, ids: Tensor) -> None:
        if not ids.numel():
            return
        low, high = (int(end) for end in torch.aminmax(ids))
        if low < 0 or high >= self.num_rows:
            raise ValueError(
                f"ids: expected ids in [0, {self.num_rows - 1}] for a table of {self.num_rows} rows, got {low} to "
                f"{high}; map unknown ids to a row of the table"
            )

    def _copied(self, staging: _Staging, *tensors: Tensor) -> tuple[list[Tensor], torch.cuda.Event | None]:
        self.counts.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self._stream is None:
            # A copy here as well: a later request writes to the staging memory again.
            return [tensor.to(self.device, copy=True) for tensor in tensors], None
        with torch.cuda.stream(self._stream):
            there = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
            staging.busy = torch.cuda.Event()  # type: ignore[no-untyped-call]
            staging.busy.record(self._stream)
        return there, staging.busy


class _Staging:
    """Memory from which the copies of one request go out; it grows, and is written again when they have arrived."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._memory: dict[str, Tensor] = {}
        self.busy: torch.cuda.Event | None = None

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in this memory, its content undefined; waits for the last copy from it."""
        if self.busy is not None:
            self.busy.synchronize()
            self.busy = None
        needed = dtype.itemsize
        for size in shape:
            needed *= size
        memory = self._memory.get(name)
        if memory is None or memory.numel() < needed:
            # Half as much again: requests grow in small steps.
            memory = torch.empty(needed + needed // 2, dtype=torch.uint8, pin_memory=self._pinned)
            self._memory[name] = memory
        return memory[:needed].view(dtype).view(tuple(shape))
