"""Embedding tables for serving: rows stay packed until they are on the device that needs them.

A table lies in host memory (pinned beside a GPU) or in the memory of the device. With a host table the distinct rows of
a request travel packed, and become numbers on the device: the CPU gathers them and they are copied, or the device reads
them where they lie. `ServingTable.prefetch` starts that on a stream of its own, so that it runs while the device
computes the previous request.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from hstu_kernels import Backend
from hstu_kernels.int4 import AddedRows, PackedRows, gather_rows
from hstu_kernels.int4.distinct import choose_places, read_host_rows
from hstu_plugin.quantized_embedding import QuantizedEmbedding
from hstu_plugin.staging import Staging
from hstu_plugin.transfers import Placement, Prefetched, Transfer, TransferCounts, usual_transfer

__all__ = ["Placement", "Prefetched", "ServingTable", "Transfer", "TransferCounts"]
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
        transfer: ``copy``: the CPU gathers the distinct rows into pinned memory, from where they are copied. ``read``:
            ids alone are copied, and the device reads the distinct rows out of the pinned table itself, so that a
            request costs the CPU next to nothing; needs a table in host memory, an NVIDIA GPU and Triton. Either
            keeps four bytes for each row of a host table, ``copy`` on the CPU and ``read`` on the device. ``auto``:
            ``read`` where that is possible and ``backend`` allows Triton, otherwise ``copy``.

    Attributes:
        transfer: in use, ``copy`` or ``read``.

    Raises:
        TypeError, ValueError: arguments of the wrong type, or out of their range.
        UnsupportedBackend: ``transfer="read"`` without Triton, or for a device that it does not serve.
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
        transfer: Transfer | str = Transfer.AUTO,
    ) -> None:
        if placement not in list(Placement):
            raise ValueError(f"placement: expected one of {', '.join(Placement)}, got {placement!r}")
        if transfer not in list(Transfer):
            raise ValueError(f"transfer: expected one of {', '.join(Transfer)}, got {transfer!r}")
        if transfer == Transfer.READ and placement != Placement.HOST:
            raise ValueError(
                "transfer: expected auto or copy for a table on the device, got read; only host rows are read"
            )
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
        self.transfer = Transfer(transfer)
        if self.transfer is Transfer.AUTO:
            pinned = on_gpu and self._data.is_pinned()
            self.transfer = usual_transfer(self.device, pinned=pinned, backend=backend)
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._staging = [Staging(self.device) for _ in range(in_flight)]
        self._turn = 0
        self._counts = TransferCounts()
        # Where each row's latest id stands in its request, and how many rows the device has read.
        self._places: Tensor | None = None
        self._distinct: Tensor | None = None
        if self.placement is Placement.HOST:
            home = self.device if self.transfer is Transfer.READ else torch.device("cpu")
            with self._on_stream():
                self._places = torch.zeros(self.num_rows, dtype=torch.int32, device=home)
        if self.transfer is Transfer.READ:
            with self._on_stream():
                self._distinct = torch.zeros(1, dtype=torch.int64, device=self.device)
            # Compiled where the table is made, not in front of the first request.
            self.prefetch(torch.zeros(min(1, self.num_rows), dtype=torch.int64))
            self.reset_counts()

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

    @property
    def counts(self) -> TransferCounts:
        """What has gone to the device so far; where the device reads, it is asked and waited for."""
        if self._distinct is not None:
            with self._on_stream():
                self._counts.unique_rows = int(self._distinct)
        row_bytes = self._data.shape[1] * self._data.element_size()
        return replace(self._counts, bytes=self._counts.bytes + row_bytes * self._counts.unique_rows)

    def prefetch(self, ids: Tensor, *, beside: Sequence[Tensor] = ()) -> Prefetched:
        """Start to bring rows to the device.

        Args:
            ids: ``[L]`` int64 or int32, best on the CPU, where requests arrive: ids on a GPU are waited for when the
                table lies in host memory.
            beside: other tensors of the CPU that go to the device in the same copy.

        Raises:
            TypeError, ValueError: ids of a wrong type or shape, or (looked at on the CPU only) outside the table.
        """
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ids: expected an int64 or int32 tensor, got {ids.dtype}")
        if ids.dim() != 1:
            raise ValueError(f"ids: expected [L], got {tuple(ids.shape)}")
        self._counts.requests += 1
        self._counts.rows += ids.numel()
        on_device = self.placement is Placement.DEVICE
        if on_device and ids.device.type != "cpu":
            _, extra, ready = self._sent((), (), beside)
            return Prefetched(self._table(self._data), ids.to(self.device), extra, ready)
        ids = ids.cpu()
        self._refuse_outside(ids)
        if on_device:
            (there,), extra, ready = self._sent((), (ids,), beside)
            return Prefetched(self._table(self._data), there, extra, ready)
        if self._distinct is not None:
            return self._read(ids.long(), beside)
        return self._gathered(ids.long(), beside)

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
            prefetched.wait(torch.cuda.current_stream(self.device))
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
        counts, self._counts = self.counts, TransferCounts()
        if self._distinct is not None:
            with self._on_stream():
                self._distinct.zero_()
        return counts

    def _table(self, data: Tensor) -> PackedRows | Tensor:
        return data if self._format is None else PackedRows(data, self._dim, self._format)

    def _gathered(self, ids: Tensor, beside: Sequence[Tensor]) -> Prefetched:
        """The CPU gathers the distinct rows."""
        assert self._places is not None
        chosen = choose_places(ids, self._places)
        first = chosen == torch.arange(ids.shape[0], dtype=torch.int32)
        distinct = ids[first]
        # The number of chosen places before each, so that rows lie without gaps.
        where = (first.cumsum(0, dtype=torch.int32) - 1).index_select(0, chosen)
        self._counts.unique_rows += distinct.numel()
        (rows, where), extra, ready = self._sent([distinct], [where], beside)
        return Prefetched(self._table(rows), where, extra, ready)

    def _read(self, ids: Tensor, beside: Sequence[Tensor]) -> Prefetched:
        """The device reads the distinct rows."""
        assert self._places is not None
        assert self._distinct is not None
        with self._on_stream():
            (there,), extra, _ = self._sent((), (ids,), beside)
            chosen = choose_places(there, self._places)
            rows = read_host_rows(self._data.view(torch.uint8), there, chosen, self._distinct)
            ready = self._mark()
        return Prefetched(self._table(rows.view(self._data.dtype)), chosen, extra, ready)

    def _sent(
        self, picked: Sequence[Tensor], ids: Sequence[Tensor], beside: Sequence[Tensor]
    ) -> tuple[list[Tensor], tuple[Tensor, ...], torch.cuda.Event | None]:
        """Rows ``picked`` of the table and other tensors on the device: rows and ids, what goes beside, the event."""
        self._turn = (self._turn + 1) % len(self._staging)
        staging = self._staging[self._turn]
        width, whole = self._data.shape[1], [*ids, *beside]
        kinds = [((p.numel(), width), self._data.dtype) for p in picked] + [(t.shape, t.dtype) for t in whole]
        filled = staging.take(kinds)
        for rows, chosen in zip(filled, picked, strict=False):
            torch.index_select(self._data, 0, chosen, out=rows)
        for area, tensor in zip(filled[len(picked) :], whole, strict=True):
            area.copy_(tensor)
        self._counts.bytes += sum(tensor.numel() * tensor.element_size() for tensor in ids)
        with self._on_stream():
            there = staging.send(self._stream)
            ready = self._mark()
        own = len(picked) + len(ids)
        return there[:own], tuple(there[own:]), ready

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _mark(self) -> torch.cuda.Event | None:
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def _refuse_outside(self, ids: Tensor) -> None:
        if not ids.numel():
            return
        low, high = (int(end) for end in torch.aminmax(ids))
        if low < 0 or high >= self.num_rows:
            raise ValueError(
                f"ids: expected ids in [0, {self.num_rows - 1}] for a table of {self.num_rows} rows, got {low} to "
                f"{high}; map unknown ids to a row of the table"
            )
