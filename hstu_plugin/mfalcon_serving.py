"""M-FALCON from ids: item rows come out of serving tables while the device scores the request before.

The item tables of a ranker are most of its bytes. Here they stay packed, in host memory or on the device; only the
distinct rows of a request travel, and they become numbers on the device (`hstu_plugin.serving_tables`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType

import torch
from torch import Tensor, nn

from hstu_kernels import Backend, JaggedLayout
from hstu_plugin.events import Events
from hstu_plugin.kv_cache import HistoryCache, User
from hstu_plugin.mfalcon import MFalconRanker
from hstu_plugin.quantized_embedding import QuantizedEmbedding
from hstu_plugin.ranking_model import RankingModel
from hstu_plugin.sequence import JaggedSequence
from hstu_plugin.serving_tables import Placement, Prefetched, ServingTable, Transfer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRequest:
    """Candidates to score, for one user or several; everything on the CPU, where requests arrive.

    Attributes:
        candidates: one sequence of candidates for each user; `Events.without_actions` makes them.
        history: whole histories to encode and forget; with ``cached`` the new events, which are appended to the cache.
        contextual: ``[B, user features]`` int64 ids in front of whole histories; ``None`` where the model has none.
        cached: keys of the users in the server's cache, in the order of the candidates' sequences.
    """

    candidates: Events
    history: Events | None = None
    contextual: Tensor | None = None
    cached: Sequence[User] | None = None

    def __post_init__(self) -> None:
        if self.history is None and self.cached is None:
            raise ValueError("history, cached: expected histories or keys of cached users, got neither")
        if self.contextual is not None and self.cached is not None:
            raise ValueError("contextual: expected none for cached users, whose contextual rows are in the cache")


@dataclass(frozen=True, slots=True)
class _OnTheWay:
    """A request's data: item rows, and all that is read beside them, on the device.

    Items of the events stay on the CPU, and so does the layout of the candidates, which is read there.
    """

    rows: Prefetched
    history: Events | None
    candidates: Events
    contextual: Tensor | None


class ServedEmbedding(nn.Module):
    """Stands in for the ``nn.Embedding`` whose rows a `ServingTable` holds; nothing is fetched ahead."""

    def __init__(self, table: ServingTable) -> None:
        super().__init__()
        self.table = table

    def forward(self, input: Tensor) -> Tensor:
        """``[..., D]`` on the table's device for ids ``[...]``; the argument is called as that of ``nn.Embedding``."""
        return self.table(input.reshape(-1)).view(*input.shape, self.table.dim)


class MFalconServer:
    """Scores streams of requests with `MFalconRanker`, item rows from `ServingTable`.

    ``score`` takes one request. ``stream`` takes many and looks ``ahead``: while the device scores a request, a thread
    gathers the item rows of the next ones and their copies run. Scores are those of `MFalconRanker` on the tokens of
    the same (quantised) model, to the bit. One thread at a time may call; close it, or use it in a ``with`` block.

    Args:
        model: in evaluation mode, where it computes; its own item tables are not looked at.
        table: the rows of all item features of the model, one behind the other, for the model's device and dtype.
        micro_batch_size, cuda_graphs: as `MFalconRanker`.
        ahead: requests that are fetched before the one in front of them is scored.
        cache: of `MFalconRanker.new_cache` for cached users; default: one without limits.

    Raises:
        ValueError: the table does not fit the model, or ``ahead`` is no number >= 1.
    """

    def __init__(
        self,
        model: RankingModel,
        table: ServingTable,
        *,
        micro_batch_size: int,
        cuda_graphs: bool = False,
        ahead: int = 1,
        cache: HistoryCache | None = None,
    ) -> None:
        if isinstance(ahead, bool) or not isinstance(ahead, int) or ahead < 1:
            raise ValueError(f"ahead: expected an int >= 1, got {ahead!r}")
        self.model, self.table, self.ahead = model, table, ahead
        weight = next(model.ranker.parameters())
        self.device = weight.device
        items = model.embedding.items
        facts = (table.num_rows, table.dim, table.dtype, table.device.type)
        expected = (sum(items.sizes), items.width, weight.dtype, self.device.type)
        if facts != expected:
            raise ValueError(
                f"table: expected rows, width, dtype and device of the model's items {expected}, got {facts}; "
                "ServingTable(dtype=..., device=...) sets the last two"
            )
        self.scorer = MFalconRanker(model.ranker, micro_batch_size=micro_batch_size, cuda_graphs=cuda_graphs)
        context = len(model.embedding.features.users)
        self.cache = self.scorer.new_cache(contextual_seq_len=context) if cache is None else cache
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mfalcon-rows")

    @classmethod
    def from_model(
        cls,
        model: RankingModel,
        *,
        device: torch.device | str = "cpu",
        placement: Placement | str = Placement.HOST,
        backend: Backend | str = Backend.AUTO,
        micro_batch_size: int,
        cuda_graphs: bool = False,
        ahead: int = 1,
        transfer: Transfer | str = Transfer.AUTO,
    ) -> MFalconServer:
        """A server for a model whose item tables are quantised (`hstu_plugin.quantize`) or in full precision.

        The item tables become serving tables, and the rest of the model moves to ``device``. Best called while the
        model is on the CPU: then the tables never take memory of the device.

        Args:
            model: changed in place; it goes on working, its item rows then come from the same tables without overlap.
            device: where to compute.
            placement, transfer: of the item tables, as of `ServingTable`.
            backend: of the dequantising gather.
            micro_batch_size, cuda_graphs, ahead: as in the constructor.
        """
        dtype = next(model.ranker.parameters()).dtype

        items = model.embedding.items
        if items.rows is None:
            raise ValueError("model: expected item features, got none")
        rows: nn.Module = items.rows
        table = ServingTable(
            rows if isinstance(rows, QuantizedEmbedding) else items.rows.weight,
            device=device,
            placement=placement,
            dtype=dtype,
            backend=backend,
            in_flight=ahead + 1,
            transfer=transfer,
        )
        # One of its own for the model's lookups, over the same memory: a table serves one thread.
        own = ServingTable(
            table.source,
            device=device,
            placement=placement,
            dtype=dtype,
            backend=backend,
            # Lookups without overlap are not worth four bytes of the device's memory for each row.
            transfer=Transfer.COPY,
        )
        items.rows = ServedEmbedding(own)  # type: ignore[assignment]
        model = model.to(device).eval()
        return cls(model, table, micro_batch_size=micro_batch_size, cuda_graphs=cuda_graphs, ahead=ahead)

    def prefill(self, users: Sequence[User], history: Events, contextual: Tensor | None = None) -> None:
        """Encode histories and keep them in the cache, as `MFalconRanker.prefill`; arguments on the CPU."""
        request = ServingRequest(candidates=_none_of(history), history=history, contextual=contextual)
        fetched = self._worker.submit(self._fetch, request).result()
        with torch.no_grad():
            tokens, _ = self._tokens(fetched)
            assert tokens is not None
            self.scorer.prefill(self.cache, users, tokens)

    def score(self, request: ServingRequest) -> Tensor:
        """``[T, num_tasks]`` in the candidates' order, on the device; as `MFalconRanker.score` or ``score_cached``."""
        return self._scored(request, self._worker.submit(self._fetch, request))

    def stream(self, requests: Iterable[ServingRequest]) -> Iterator[Tensor]:
        """Scores of each request, in their order; the rows of the next ``ahead`` come while one is scored.

        On a GPU scores are given out before they are computed; the host is at most ``ahead`` requests in front.
        """
        waiting: deque[tuple[ServingRequest, Future[_OnTheWay]]] = deque()
        scored: deque[torch.cuda.Event] = deque()
        for request in requests:
            waiting.append((request, self._worker.submit(self._fetch, request)))
            if len(waiting) > self.ahead:
                self._keep_pace(scored)
                yield self._scored(*waiting.popleft())
        while waiting:
            self._keep_pace(scored)
            yield self._scored(*waiting.popleft())

    def close(self) -> None:
        """End the thread."""
        self._worker.shutdown(cancel_futures=True)

    def __enter__(self) -> MFalconServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fetch(self, request: ServingRequest) -> _OnTheWay:
        """In the thread: item rows and all other columns start their way to the device."""
        history, candidates = request.history, request.candidates
        parts = [events for events in (history, candidates) if events is not None]
        for events in parts:
            events.layout.check_rows("items", events.items.shape[0])
        places = self.model.embedding.items.places(torch.cat([events.items for events in parts]))
        columns: list[Tensor] = []
        if history is not None:
            columns += [history.layout.seq_offsets, *history.columns()]
        if candidates.timestamps is not None:
            columns.append(candidates.timestamps)
        if request.contextual is not None:
            columns.append(request.contextual)
        rows = self.table.prefetch(places.reshape(-1), beside=columns)
        there = iter(rows.beside)
        if history is not None:
            # Checked above, where it costs nothing.
            layout = replace(history.layout, seq_offsets=next(there)).vouched(history.items.shape[0])
            history = history.with_columns(layout, [next(there) for _ in history.columns()])
        if candidates.timestamps is not None:
            candidates = replace(candidates, timestamps=next(there))
        return _OnTheWay(rows, history, candidates, None if request.contextual is None else next(there))

    def _keep_pace(self, scored: deque[torch.cuda.Event]) -> None:
        """Wait for the request before the last ``ahead``: a host far in front would only fill the device's memory."""
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        scored.append(event)
        if len(scored) > self.ahead:
            scored.popleft().synchronize()

    @torch.no_grad()
    def _scored(self, request: ServingRequest, fetched: Future[_OnTheWay]) -> Tensor:
        history, candidates = self._tokens(fetched.result())
        if request.cached is None:
            assert history is not None
            return self.scorer.score(history, candidates)
        if history is not None:
            self.scorer.append(self.cache, request.cached, history)
        return self.scorer.score_cached(self.cache, request.cached, candidates)

    def _tokens(self, fetched: _OnTheWay) -> tuple[JaggedSequence | None, JaggedSequence]:
        vectors = self.table.rows(fetched.rows)
        features = len(self.model.embedding.items)
        if features > 1:
            # As `FeatureTables` and `TokenBuilder` do it: [E, features, D], summed.
            vectors = vectors.view(-1, features, self.table.dim).sum(1)
        history, embedding = None, self.model.embedding
        if fetched.history is not None:
            count = fetched.history.items.shape[0]
            history = embedding.history(fetched.history, fetched.contextual, items=vectors[:count])
            vectors = vectors[count:]
        return history, embedding.candidates(fetched.candidates, items=vectors)


def _none_of(events: Events) -> Events:
    """No candidates for each of the users of ``events``."""
    layout = JaggedLayout.from_lengths(torch.zeros(events.layout.batch_size, dtype=torch.int64))
    times = None if events.timestamps is None else events.timestamps[:0]
    return Events.without_actions(layout, events.items[:0], times)
