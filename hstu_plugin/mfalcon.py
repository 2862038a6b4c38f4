"""M-FALCON (HSTU, section 3.4): encode a history once, score any number of candidates against it in micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from hstu_kernels import JaggedLayout
from hstu_plugin.appending import append_history, check_can_append, read_history, store_history
from hstu_plugin.embedding import SequenceEmbedding
from hstu_plugin.encoder import KVCache
from hstu_plugin.graph_scoring import GraphScorer
from hstu_plugin.kv_cache import ChannelCache, HistoryCache, User
from hstu_plugin.kv_pages import KVPages, KVShape
from hstu_plugin.micro_batches import auto_size, continued_places, micro_batches, users_of
from hstu_plugin.ranker import HSTURanker
from hstu_plugin.sequence import JaggedSequence
from hstu_plugin.ultra.mixture import MixtureRanker, Transducer

Histories = JaggedSequence | Mapping[str, JaggedSequence]
_ONLY = ""


class MFalconRanker:
    """Scores candidates of many users against histories that are encoded once.

    A candidate attends to its user's history and itself, so its score depends neither on the micro-batch size, nor on
    the order of the candidates, nor on who else is asked about. Sequences are token vectors, as `HSTURanker.forward`
    takes them; a `MixtureRanker` takes one history for each channel, by name.

    Args:
        ranker: in evaluation mode.
        micro_batch_size: candidates, over all users, that go through the layers at once; bounds the memory. ``"auto"``
            takes as many as a part of the free memory holds. Scores do not depend on it.
        cuda_graphs: replay recorded launches, one for each micro-batch. They are recorded when a size is first met, for
            numbers of candidates, users and history rows that are rounded up. Needs a ranker on a GPU, which must
            stay there; with ``backend="triton"`` the graphs hold its kernels, otherwise dense products of all
            candidates of a micro-batch with all its histories.

    Raises:
        TypeError: the ranker is neither, or its tokens may depend on the request.
        ValueError: its head reads more than a candidate's row (``context_width``), the size is neither a number >= 1
            nor ``"auto"``, or graphs are asked for without a GPU.
    """

    def __init__(
        self,
        ranker: HSTURanker | MixtureRanker,
        *,
        micro_batch_size: int | Literal["auto"] = "auto",
        cuda_graphs: bool = False,
    ) -> None:
        given = micro_batch_size
        if given != "auto" and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
            raise ValueError(f"micro_batch_size: expected an int >= 1 or 'auto', got {given!r}")
        transducers: dict[str, HSTURanker | Transducer]
        if isinstance(ranker, HSTURanker):
            if ranker.context_width:
                raise ValueError(
                    f"ranker: expected context_width 0, got {ranker.context_width}; its head also reads the user's "
                    "features, which a cache does not hold: score with ranker.prefill and ranker.decode instead"
                )
            transducers = {_ONLY: ranker}
        elif isinstance(ranker, MixtureRanker):
            transducers = dict(ranker.mixture.transducers())
        else:
            raise TypeError(f"ranker: expected an HSTURanker or a MixtureRanker, got {type(ranker).__name__}")
        for name, transducer in transducers.items():
            if type(transducer.embedding) is not SequenceEmbedding:
                raise TypeError(
                    f"ranker{f' channel {name!r}' if name else ''}: expected the tokens of SequenceEmbedding, got "
                    f"{type(transducer.embedding).__name__}; a token that depends on the request (its age, say) makes "
                    "cached keys and values wrong. Time differences belong in the time bias, which reads the request "
                    "time of each candidate"
                )
        self.ranker = ranker
        self._transducers = transducers
        self._head: nn.Module = ranker.head
        weight = next(ranker.parameters())
        if isinstance(given, str):
            given = auto_size((t.config for t in transducers.values()), weight)
        self.micro_batch_size: int = given
        device = weight.device
        if cuda_graphs and device.type != "cuda":
            raise ValueError(
                f"cuda_graphs: expected a ranker on a CUDA device, got one on {device}; leave it False here"
            )
        self.cuda_graphs = cuda_graphs
        self._graphs: GraphScorer | None = None
        if cuda_graphs:
            size = self.micro_batch_size
            self._graphs = GraphScorer(transducers, ranker.head, micro_batch_size=size, capture=True)

    @torch.no_grad()
    def score(self, history: Histories, candidates: JaggedSequence) -> Tensor:
        """Encode, score, forget.

        Args:
            history: ``[contextual | history]`` token vectors ``[L, D]`` without targets; users may have none.
            candidates: token vectors ``[T, D]``, one sequence of any length for each user; their timestamps are the
                request times where the model has a time bias. The layout may stay on the CPU, where it is read.

        Returns:
            ``[T, num_tasks]`` in the candidates' order, as `HSTURanker.forward` gives them.
        """
        self._check_mode()
        caches = {}
        for name, seq in self._by_channel("history", history).items():
            transducer = self._transducers[name]
            caches[name] = transducer.encoder.prefill(transducer.embedding(seq))[1]
        return self._score(caches, candidates)

    def new_cache(
        self,
        *,
        contextual_seq_len: int = 0,
        page_size: int = 64,
        slab_pages: int = 256,
        max_pages: int | None = None,
    ) -> HistoryCache:
        """An empty cache for histories of this ranker, on its device and in its precision.

        Args:
            contextual_seq_len: leading contextual rows of every history.
            page_size: rows of a page. slab_pages: pages that are allocated at once, for each channel.
            max_pages: limit of the pages in use, for each channel; `OutOfPages` beyond.
        """
        channels = {}
        for name, transducer in self._transducers.items():
            config, weight = transducer.config, next(transducer.encoder.parameters())
            shape = KVShape(
                len(transducer.encoder.first_layers),
                config.num_heads,
                config.attention_dim,
                config.linear_dim,
                weight.dtype,
                weight.device,
                config.time_bias,
            )
            pages = KVPages(shape, page_size=page_size, slab_pages=slab_pages, max_pages=max_pages)
            channels[name] = ChannelCache(pages, contextual_seq_len=contextual_seq_len)
        return HistoryCache(channels, weights=self._weights())

    @torch.no_grad()
    def prefill(self, cache: HistoryCache, users: Sequence[User], history: Histories) -> None:
        """Encode the histories of ``users`` and keep them; a user that is there already is replaced.

        Raises:
            ValueError: sequences, users or the cache do not fit.
            OutOfPages: the cache is full; it is as before then.
        """
        users = self._check_call(cache, users)
        histories = self._by_channel("history", history)
        for name, seq in histories.items():
            context = cache.channels[name].contextual_seq_len
            if seq.layout.batch_size != len(users):
                raise ValueError(f"history: expected {len(users)} sequences as users, got {seq.layout.batch_size}")
            if seq.layout.contextual_seq_len != context:
                raise ValueError(
                    f"history: expected {context} contextual rows as the cache was made for, got "
                    f"{seq.layout.contextual_seq_len}; give contextual_seq_len to new_cache()"
                )
            cache.channels[name].check_room(users, seq.layout.seq_lengths.tolist())
        for name, seq in histories.items() if users else ():
            transducer = self._transducers[name]
            store_history(transducer.encoder, cache.channels[name], users, transducer.embedding(seq))

    @torch.no_grad()
    def append(self, cache: HistoryCache, users: Sequence[User], events: Histories) -> None:
        """Let the cached histories of ``users`` go on; equals `prefill` of the longer histories.

        Args:
            events: token vectors ``[R, D]`` of new events, one sequence of any length for each user, with their times
                where the model has a time bias. Of a mixture, channels without news may be left out.

        Raises:
            ValueError: a user is not cached, or has no contextual rows yet, or the model's mask makes a cache of a
                growing history wrong (`appending.check_can_append`).
            OutOfPages: the cache is full; it is as before then.
        """
        users = self._check_call(cache, users)
        parts = self._by_channel("events", events, partly=True)
        for name, seq in parts.items():
            channel = cache.channels[name]
            check_can_append(self._transducers[name].config, channel.contextual_seq_len)
            if seq.layout.batch_size != len(users):
                raise ValueError(f"events: expected {len(users)} sequences as users, got {seq.layout.batch_size}")
            if seq.layout.contextual_seq_len:
                raise ValueError("events: expected new events alone, got contextual rows")
            channel.prefetch(users)
            before = channel.lengths(users)
            for user, rows in zip(users, before, strict=True):
                if rows < channel.contextual_seq_len:
                    raise ValueError(f"users: {user!r} has no contextual rows yet; prefill the whole history instead")
            counts = seq.layout.seq_lengths.tolist()
            channel.check_room(users, [n + m for n, m in zip(before, counts, strict=True)])
        for name, seq in parts.items() if users else ():
            transducer, channel = self._transducers[name], cache.channels[name]
            placed = transducer.embedding(seq, continued_places(seq, channel.lengths(users)))
            append_history(transducer.encoder, channel, users, placed)

    @torch.no_grad()
    def score_cached(self, cache: HistoryCache, users: Sequence[User], candidates: JaggedSequence) -> Tensor:
        """`score` against cached histories.

        Args:
            users: cached ones, in the order of the candidates' sequences; offloaded ones come back.
        """
        self._check_mode()
        self._check_cache(cache)
        caches = {
            name: read_history(transducer.encoder, cache.channels[name], users)
            for name, transducer in self._transducers.items()
        }
        return self._score(caches, candidates)

    def _score(self, caches: Mapping[str, KVCache], candidates: JaggedSequence) -> Tensor:
        layout = candidates.layout
        if layout.num_targets is not None or layout.contextual_seq_len:
            raise ValueError("candidates: expected sequences of candidates alone, got num_targets or contextual rows")
        for name, cache in caches.items():
            have = cache[0].layout.batch_size
            if have != layout.batch_size:
                where = f" in channel {name!r}" if name else ""
                raise ValueError(f"candidates: expected {have} sequences as histories{where}, got {layout.batch_size}")
        parts = micro_batches(layout.seq_offsets.tolist(), self.micro_batch_size)
        rows: list[Tensor] = []
        users: tuple[int, int] | None = None
        own: Mapping[str, KVCache] = caches
        for part in parts:
            same, users = users == (part.user, part.user_end), (part.user, part.user_end)
            if not same:
                own = {name: users_of(cache, *users) for name, cache in caches.items()}
            values = candidates.values[part.first : part.last]
            times = None if candidates.timestamps is None else candidates.timestamps[part.first : part.last]
            # A graph reads its counts from buffers of its own.
            device = values.device if self._graphs is None else "cpu"
            targets = JaggedSequence(values, JaggedLayout.from_counts(part.counts, device=device), times)
            if self._graphs is None:
                rows.append(self._decode(targets, own))
            else:
                for transducer in self._transducers.values():
                    transducer.encoder.check_times(targets)
                rows.append(self._graphs.score(own, targets, part.counts, loaded=same))
        if rows:
            return torch.cat(rows)
        width = sum(t.config.embedding_dim for t in self._transducers.values())
        empty: Tensor = self._head(candidates.values.new_zeros(0, width))
        return empty

    def _decode(self, targets: JaggedSequence, caches: Mapping[str, KVCache]) -> Tensor:
        rows = []
        for name, transducer in self._transducers.items():
            cache = caches[name]
            ends = cache[0].layout.seq_lengths
            places = torch.repeat_interleave(ends, targets.layout.seq_lengths, output_size=targets.values.shape[0])
            rows.append(transducer.encoder.decode(transducer.embedding(targets, places), cache).values)
        scores: Tensor = self._head(torch.cat(rows, dim=-1) if len(rows) > 1 else rows[0])
        return scores

    def _by_channel(self, name: str, given: Histories, *, partly: bool = False) -> dict[str, JaggedSequence]:
        channels = {_ONLY: given} if isinstance(given, JaggedSequence) else dict(given)
        wanted = set(self._transducers)
        if not (channels.keys() <= wanted if partly else channels.keys() == wanted):
            if wanted == {_ONLY}:
                raise ValueError(f"{name}: expected a JaggedSequence, got a mapping of {sorted(channels)}")
            got = "one sequence" if isinstance(given, JaggedSequence) else f"{sorted(channels)}"
            raise ValueError(f"{name}: expected one sequence for each channel of {sorted(wanted)}, got {got}")
        for seq in channels.values():
            if seq.layout.num_targets is not None:
                raise ValueError(f"{name}: expected sequences without targets; take seq.history() first")
        return channels

    def _check_call(self, cache: HistoryCache, users: Sequence[User]) -> list[User]:
        self._check_mode()
        self._check_cache(cache)
        users = list(users)
        if len(set(users)) != len(users):
            raise ValueError(f"users: expected each one once, got {users!r}")
        return users

    def _check_mode(self) -> None:
        if self.ranker.training:
            raise ValueError("ranker: expected evaluation mode, got training (dropout is on); call ranker.eval() first")

    def _check_cache(self, cache: HistoryCache) -> None:
        device = next(self.ranker.parameters()).device.type
        if torch.is_autocast_enabled(device):
            raise ValueError(
                "autocast: expected none around a cache, whose keys and values have the precision of the weights; cast "
                "the ranker itself, ranker.to(torch.bfloat16), and make the cache from that"
            )
        if set(cache.channels) != set(self._transducers) or cache.weights != self._weights():
            raise ValueError(
                "cache: made by another ranker, or the weights have changed since; its keys and values are stale. "
                "Make a new one with new_cache() and prefill the histories again"
            )

    def _weights(self) -> tuple[tuple[int, int], ...]:
        """Where the weights of the transducers lie, and how often they were written to."""
        modules = [m for t in self._transducers.values() for m in (t.embedding, t.encoder)]
        return tuple((p.data_ptr(), p._version) for module in modules for p in module.parameters())
