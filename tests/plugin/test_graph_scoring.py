"""GraphScorer: fixed buffers give the scores of the full forward; recorded graphs give them, too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hstu_kernels import JaggedLayout
from hstu_kernels.attention import static
from hstu_plugin import graph_buffers, graph_scoring
from hstu_plugin.graph_buffers import power_of_two, row_capacity
from hstu_plugin.graph_scoring import GraphScorer
from hstu_plugin.mfalcon import MFalconRanker
from hstu_plugin.ranker import HSTURanker
from hstu_plugin.sequence import JaggedSequence

from .mfalcon_cases import (
    CONTEXT,
    KINDS,
    MIXTURE,
    Ranker,
    each,
    full_scores,
    make_histories,
    make_ranker,
    make_sequence,
    rows_of,
    same,
)


def make_scorer(ranker: Ranker, micro_batch_size: int) -> MFalconRanker:
    """With a `GraphScorer` that runs its steps unrecorded, on any device."""
    scorer = MFalconRanker(ranker, micro_batch_size=micro_batch_size)
    transducers = {"": ranker} if isinstance(ranker, HSTURanker) else dict(ranker.mixture.transducers())
    scorer._graphs = GraphScorer(transducers, ranker.head, micro_batch_size=micro_batch_size, capture=False)
    return scorer


@pytest.mark.parametrize("micro_batch_size", [5, 1000])
@pytest.mark.parametrize("kind", [*KINDS, MIXTURE])
def test_fixed_buffers_equal_one_full_forward(
    kind: str, micro_batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static, "_KEY_BLOCK", 7)
    monkeypatch.setattr(graph_buffers, "_FEWEST_ROWS", 64)
    ranker = make_ranker(kind)
    scorer = make_scorer(ranker, micro_batch_size)
    # Many before few, long before short: what is left in the buffers must not count.
    for lengths, counts in (
        ((20, 5, CONTEXT, 11), (7, 0, 2, 12)),
        ((6, 0, 9), (3, 0, 4)),
        ((21,), (6,)),
        ((CONTEXT,), (6,)),
        ((8, 7, 6), (0, 1, 1)),
    ):
        histories, candidates = make_histories(kind, lengths), make_sequence(counts, begin=2000, seed=4)
        assert same(scorer.score(histories, candidates), full_scores(ranker, histories, candidates))


def test_cached_histories_that_grow() -> None:
    ranker = make_ranker("truncated-semi-local-tail")
    scorer = make_scorer(ranker, 5)
    whole, candidates = make_sequence((20, 9), contextual=CONTEXT), make_sequence((7, 4), begin=2000, seed=4)
    cache = scorer.new_cache(contextual_seq_len=CONTEXT, page_size=3, slab_pages=2)
    scorer.prefill(cache, "ab", rows_of(whole, (0, 0), (11, 4), contextual=CONTEXT))
    scorer.score_cached(cache, "ab", candidates)
    scorer.append(cache, "ab", rows_of(whole, (11, 4), (20, 9)))
    assert same(scorer.score_cached(cache, "ab", candidates), full_scores(ranker, whole, candidates))


def test_missing_request_times() -> None:
    scorer = make_scorer(make_ranker("plain"), 5)
    candidates = replace(make_sequence((3,), begin=2000), timestamps=None)
    with pytest.raises(ValueError, match=r"^timestamps: the model has a time bias"):
        scorer.score(make_sequence((6,)), candidates)


def test_sizes_are_few_and_large_enough() -> None:
    assert [power_of_two(n, 256) for n in (0, 1, 256, 257, 1024, 1025)] == [256, 256, 256, 512, 1024, 2048]
    for most in (5, 64, 1000, 4096):
        sizes = {row_capacity(n, most) for n in range(1, most + 1)}
        assert all(n <= row_capacity(n, most) <= most for n in range(1, most + 1))
        assert len(sizes) <= 4 + 4 * most.bit_length()


def test_only_so_many_buffers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_scoring, "_MOST_SHAPES", 2)
    monkeypatch.setattr(graph_scoring, "_MOST_GRAPHS", 3)
    ranker = make_ranker("plain")
    scorer = make_scorer(ranker, 200)
    for users in (1, 2, 4, 1, 8):
        for count in (3, 70, 130):
            histories = make_sequence((6,) * users)
            candidates = make_sequence((count,) + (0,) * (users - 1), begin=2000)
            assert same(scorer.score(histories, candidates), full_scores(ranker, histories, candidates))
            assert scorer._graphs is not None
            assert len(scorer._graphs._buffers) <= 2
            assert len(scorer._graphs._steps) <= 3


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"^cuda_graphs: expected a ranker on a CUDA device, got one on cpu"):
        MFalconRanker(make_ranker("plain"), micro_batch_size=4, cuda_graphs=True)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: records CUDA graphs")
@pytest.mark.parametrize("kind", ["plain", "truncated-semi-local-tail", MIXTURE])
def test_recorded_graphs_equal_plain_launches(kind: str) -> None:
    ranker = make_ranker(kind).cuda()

    histories = each(make_histories(kind, (20, 5, CONTEXT)), to_cuda)
    recorded = MFalconRanker(ranker, micro_batch_size=4, cuda_graphs=True)
    plain = MFalconRanker(ranker, micro_batch_size=4)
    for counts in ((7, 0, 2), (1, 9, 4)):
        candidates = to_cuda(make_sequence(counts, begin=2000, seed=4))
        assert same(recorded.score(histories, candidates), plain.score(histories, candidates))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: records CUDA graphs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "no-time", "window-targets", "truncated-semi-local-tail", MIXTURE])
def test_recorded_kernels_stay_near_double(kind: str, dtype: torch.dtype) -> None:
    """Against one full forward pass in double; the budget is that of eager scoring in the same precision."""
    pytest.importorskip("triton", reason="Triton is not installed")
    wide = {"attention_dim": 32, "linear_dim": 32, "max_seq_len": 3000}
    exact = make_ranker(kind, **wide).cuda()
    histories, candidates = make_histories(kind, (2900, 70, CONTEXT, 11)), make_sequence((90, 0, 2, 12), begin=2000)
    histories, candidates = each(histories, to_cuda), to_cuda(candidates)
    truth = full_scores(exact, histories, candidates)
    low = each(histories, lambda seq: seq.with_values(seq.values.to(dtype)))
    asked = candidates.with_values(candidates.values.to(dtype))

    def scorer(backend: str, **options: Any) -> MFalconRanker:
        ranker = make_ranker(kind, **wide, backend=backend)
        return MFalconRanker(ranker.to("cuda", dtype), **options)

    scale = truth.abs().max()
    budget = float((scorer("eager").score(low, asked).double() - truth).abs().max() / scale)
    launched, recorded = scorer("triton"), scorer("triton", cuda_graphs=True)
    for size in (None, 40):
        if size is not None:
            launched = scorer("triton", micro_batch_size=size)
            recorded = scorer("triton", micro_batch_size=size, cuda_graphs=True)
        for each_way in (launched, recorded, recorded):
            got = each_way.score(low, asked)
            assert float((got.double() - truth).abs().max() / scale) <= 2 * budget + torch.finfo(dtype).eps


def to_cuda(seq: JaggedSequence) -> JaggedSequence:
    layout = JaggedLayout.from_lengths(seq.layout.seq_lengths.cuda(), contextual_seq_len=seq.layout.contextual_seq_len)
    return JaggedSequence(seq.values.cuda(), layout, None if seq.timestamps is None else seq.timestamps.cuda())
