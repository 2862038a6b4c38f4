"""The life of cached histories: pages, sizes, eviction, host memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hstu_kernels import JaggedLayout, LayerKV
from hstu_plugin.kv_cache import HistoryCache
from hstu_plugin.kv_pages import KVPages, KVShape, OutOfPages
from hstu_plugin.mfalcon import MFalconRanker
from hstu_plugin.ranker import HSTURanker

from .mfalcon_cases import MIXTURE, make_histories, make_ranker, make_sequence, rows_of, same

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: streams and pinned memory"),
        ],
    ),
]


def make_pages(**options: Any) -> KVPages:
    shape = KVShape(2, 1, 3, 4, torch.float64, torch.device("cpu"), timed=True)
    return KVPages(shape, **{"page_size": 4, "slab_pages": 2, **options})


def fill(pages: KVPages, rows: torch.Tensor, seed: int = 0) -> list[LayerKV]:
    generator = torch.Generator().manual_seed(seed)
    layout = JaggedLayout.from_lengths(torch.tensor([rows.numel()]))
    times = torch.randint(10**9, (rows.numel(),), generator=generator)

    def draw(width: int) -> torch.Tensor:
        return torch.randn(rows.numel(), 1, width, dtype=torch.float64, generator=generator)

    fresh = [LayerKV(draw(3), draw(4), layout, times) for _ in range(2)]
    pages.write(rows, fresh, times)
    return fresh


@pytest.mark.parametrize("order", ["side-by-side", "scattered", "one-slab-scattered"])
def test_pages_give_back_what_was_written(order: str) -> None:
    pages = make_pages()
    taken = pages.take(5)
    assert (taken, pages.num_pages) == ([0, 1, 2, 3, 4], 5)
    own = {"side-by-side": [0, 1], "scattered": [4, 0, 2], "one-slab-scattered": [1, 0]}[order]
    rows = pages.rows_of(own, 0, 4 * len(own) - 1)
    fresh = fill(pages, rows)
    got = pages.read(rows)
    for layer, kv in enumerate(fresh):
        assert torch.equal(got.k[layer], kv.k)
        assert torch.equal(got.v[layer], kv.v)
    assert got.times is not None and fresh[0].timestamps is not None
    assert torch.equal(got.times, fresh[0].timestamps)
    assert torch.equal(pages.read_times(rows), fresh[0].timestamps)
    assert torch.equal(pages.read(rows[2:5]).v[1], fresh[1].v[2:5])
    # Side by side in one slab nothing is copied.
    assert (pages.read(rows).k.data_ptr() == got.k.data_ptr()) is (order == "side-by-side")


def test_pages_are_counted_and_used_again() -> None:
    pages = make_pages(max_pages=3)
    first = pages.take(2)
    pages.take(1)
    with pytest.raises(OutOfPages, match=r"^max_pages: 1 more pages are needed beside 3 in use, and the limit is 3"):
        pages.take(1)
    pages.give_back(first)
    assert pages.num_pages == 1
    assert pages.take(2) == first
    assert pages.num_pages == 3
    # A page: 4 rows of 2 layers of 1 head of 3 + 4 doubles, and a time each.
    assert pages.page_nbytes == 4 * (2 * 7 * 8 + 8)
    assert pages.reserved_nbytes == 2 * 2 * pages.page_nbytes
    assert [pages.pages_for(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


@pytest.mark.parametrize("name", ["page_size", "slab_pages"])
def test_sizes_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected a number >= 1, got 0"):
        make_pages(**{name: 0})


def filled(kind: str, **options: Any) -> tuple[MFalconRanker, HistoryCache]:
    scorer = MFalconRanker(make_ranker(kind), micro_batch_size=8)
    cache = scorer.new_cache(**{"page_size": 4, "slab_pages": 2, **options})
    scorer.prefill(cache, ["ann", "bob", "cid"], make_histories(kind, (9, 0, 5), contextual=0))
    return scorer, cache


def test_sizes_of_entries() -> None:
    _, cache = filled("no-bias")
    # 3 layers of 2 heads of 4 + 4 doubles, no times, pages of 4 rows, and no row that an append runs again.
    page = 4 * 3 * 2 * 8 * 8
    assert [cache.nbytes_of(user) for user in ("ann", "bob", "cid")] == [3 * page, 0, 2 * page]
    assert (cache.nbytes, cache.host_nbytes, cache.reserved_nbytes) == (5 * page, 0, 6 * page)
    _, timed = filled("plain")
    # With times: 8 bytes a row, and the last row's input.
    assert timed.nbytes_of("ann") == 3 * (page + 4 * 8) + 8 * 8


def test_sizes_count_what_lies_beside_the_pages() -> None:
    _, cache = filled("truncated-semi-local-tail")
    page = 4 * (1 * 2 * 8 * 8 + 8)
    # The tail's inputs, the rows that enter the later layers, and two layers' keys and values of these.
    assert cache.nbytes_of("ann") == 3 * page + 4 * 64 + 5 * 64 + 2 * 5 * 128


def test_evicted_users_are_gone_and_their_pages_free() -> None:
    scorer, cache = filled("truncated")
    assert cache.users == ("ann", "bob", "cid")
    assert ("ann" in cache, "eve" in cache, len(cache)) == (True, False, 3)
    reserved = cache.reserved_nbytes
    cache.evict(["ann", "eve"])
    assert cache.users == ("bob", "cid")
    with pytest.raises(ValueError, match=r"^users: no cached history of 'ann'"):
        scorer.score_cached(cache, ["ann"], make_sequence((1,)))
    scorer.prefill(cache, ["dan"], make_sequence((12,)))
    assert cache.reserved_nbytes == reserved


def test_others_keep_their_scores_when_one_is_evicted_and_replaced() -> None:
    scorer, cache = filled(MIXTURE)
    candidates = make_sequence((3,), begin=3000)
    before = scorer.score_cached(cache, ["cid"], candidates)
    cache.evict(["ann"])
    scorer.prefill(cache, ["dan", "bob"], make_histories(MIXTURE, (14, 3), contextual=0))
    assert same(scorer.score_cached(cache, ["cid"], candidates), before)


def test_a_new_prefill_replaces_an_entry() -> None:
    scorer, cache = filled("truncated")
    candidates = make_sequence((3,), begin=3000)
    shorter = make_sequence((2,), seed=5)
    scorer.prefill(cache, ["ann"], shorter)
    assert same(scorer.score_cached(cache, ["ann"], candidates), scorer.score(shorter, candidates))
    assert cache.channels[""].lengths(["ann"]) == [2]
    assert cache.channels[""].pages.num_pages == 1 + 2


def test_a_full_cache_stays_as_it_was() -> None:
    scorer, cache = filled(MIXTURE, max_pages=5)
    candidates = make_sequence((3,), begin=3000)
    before = scorer.score_cached(cache, ["ann"], candidates), cache.nbytes
    # Only the channel "watch" is full: "buy" must not go on alone.
    with pytest.raises(OutOfPages, match=r"evict or offload users first"):
        scorer.prefill(cache, ["dan"], make_histories(MIXTURE, (4,), contextual=0))
    with pytest.raises(OutOfPages):
        scorer.append(cache, ["ann"], {"buy": make_sequence((1,)), "watch": make_sequence((9,))})
    assert cache.users == ("ann", "bob", "cid")
    assert same(scorer.score_cached(cache, ["ann"], candidates), before[0])
    assert cache.nbytes == before[1]
    cache.offload(["cid"])
    scorer.prefill(cache, ["dan"], make_histories(MIXTURE, (4,), contextual=0))
    with pytest.raises(OutOfPages):
        cache.prefetch(["cid"])
    assert cache.offloaded("cid")


def on(device: str, kind: str) -> tuple[MFalconRanker, HistoryCache, Any]:
    ranker = make_ranker(kind).to(device)
    assert isinstance(ranker, HSTURanker)
    scorer = MFalconRanker(ranker, micro_batch_size=8)
    return scorer, scorer.new_cache(page_size=4, slab_pages=2), lambda seq: to_device(seq, device)


def to_device(seq: Any, device: str) -> Any:
    layout = JaggedLayout.from_lengths(
        seq.layout.seq_lengths.to(device), contextual_seq_len=seq.layout.contextual_seq_len
    )
    return type(seq)(seq.values.to(device), layout, seq.timestamps.to(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["plain", "truncated-semi-local-tail"])
def test_offloaded_users_come_back_unchanged(kind: str, device: str) -> None:
    scorer, cache, move = on(device, kind)
    whole = make_sequence((20, 11))
    scorer.prefill(cache, ["ann", "bob"], move(rows_of(whole, [0, 0], [13, 9])))
    candidates = move(make_sequence((4, 5), begin=3000))
    before = scorer.score_cached(cache, ["ann", "bob"], candidates)
    size = cache.nbytes_of("ann")
    cache.offload(["ann"])
    assert cache.offloaded("ann") and not cache.offloaded("bob")
    assert cache.nbytes_of("ann") == 0 < cache.host_nbytes <= size
    cache.offload(["ann"])
    # Its pages belong to others now.
    scorer.prefill(cache, ["cid"], move(make_sequence((10,), seed=8)))
    assert same(scorer.score_cached(cache, ["ann", "bob"], candidates), before)
    assert not cache.offloaded("ann")
    assert (cache.nbytes_of("ann"), cache.host_nbytes) == (size, 0)
    # Prefetched by hand, then appended to.
    cache.offload(["ann", "bob"])
    cache.prefetch(["bob", "ann"])
    assert cache.host_nbytes == 0
    cache.offload(["ann"])
    scorer.append(cache, ["ann", "bob"], move(rows_of(whole, [13, 9], [20, 11])))
    assert same(scorer.score_cached(cache, ["ann", "bob"], candidates), scorer.score(move(whole), candidates))


def test_offloading_unknown_users_is_refused() -> None:
    _, cache = filled("plain")
    with pytest.raises(ValueError, match=r"^users: no cached history of 'eve'"):
        cache.offload(["eve"])
    with pytest.raises(ValueError, match=r"^users: no cached history of 'eve'"):
        cache.prefetch(["eve"])


def test_a_cache_filled_in_inference_mode_can_be_used_outside() -> None:
    scorer = MFalconRanker(make_ranker("truncated"), micro_batch_size=8)
    cache = scorer.new_cache()
    whole, candidates = make_sequence((9,)), make_sequence((3,), begin=3000)
    with torch.inference_mode():
        scorer.prefill(cache, ["ann"], rows_of(whole, [0], [6]))
    scorer.append(cache, ["ann"], rows_of(whole, [6], [9]))
    cache.offload(["ann"])
    with torch.inference_mode():
        got = scorer.score_cached(cache, ["ann"], candidates)
    assert same(got, scorer.score(whole, candidates))
