"""MFalconRanker: scores equal one full forward, whatever the micro-batches, order and company; also after appends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hstu_kernels import AttentionMask, JaggedLayout
from hstu_plugin.config import HSTUConfig
from hstu_plugin.embedding import SequenceEmbedding
from hstu_plugin.mfalcon import MFalconRanker
from hstu_plugin.micro_batches import auto_size
from hstu_plugin.ranker import HSTURanker
from hstu_plugin.sequence import JaggedSequence

from .mfalcon_cases import (
    CONTEXT,
    KINDS,
    MIXTURE,
    RANKING,
    TAIL,
    WIDTH,
    Histories,
    each,
    full_scores,
    make_config,
    make_histories,
    make_ranker,
    make_sequence,
    rows_of,
    same,
)

# Users with a long, a short and no history, context alone, and one whose candidates span micro-batches.
LENGTHS, COUNTS = (20, 5, 0, CONTEXT, 11), (7, 0, 0, 2, 12)
# Where there are contextual rows, a user without any has no candidates; without them there may be some.
ANYWHERE = (7, 0, 3, 2, 12)
SIZES = [(200, "triton"), (16384, "triton"), (200, "eager"), (16384, "eager")]
any_kind = pytest.mark.parametrize("kind", [*KINDS, MIXTURE])


def make_candidates(counts: tuple[int, ...] = COUNTS) -> JaggedSequence:
    return make_sequence(counts, begin=2000, seed=3)


@any_kind
@pytest.mark.parametrize(("micro_batch_size", "contextual"), [(1, CONTEXT), (4, 0), (1000, CONTEXT)])
def test_scores_equal_one_full_forward(kind: str, micro_batch_size: int, contextual: int) -> None:
    ranker = make_ranker(kind)
    counts = COUNTS if contextual else ANYWHERE
    histories, candidates = make_histories(kind, LENGTHS, contextual=contextual), make_candidates(counts)
    got = MFalconRanker(ranker, micro_batch_size=micro_batch_size).score(histories, candidates)
    assert got.shape == (sum(counts), 2)
    assert same(got, full_scores(ranker, histories, candidates))


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_backends(backend: str) -> None:
    ranker = make_ranker("truncated-semi-local-tail", backend=backend)
    histories, candidates = make_histories("plain", LENGTHS), make_candidates()
    expected = full_scores(ranker, histories, candidates)
    assert same(MFalconRanker(ranker, micro_batch_size=5).score(histories, candidates), expected)


@any_kind
def test_order_of_candidates(kind: str) -> None:
    scorer = MFalconRanker(make_ranker(kind), micro_batch_size=4)
    histories, candidates = make_histories(kind, LENGTHS), make_candidates()
    order = torch.cat([torch.randperm(n) + sum(COUNTS[:i]) for i, n in enumerate(COUNTS)])
    assert candidates.timestamps is not None
    moved = JaggedSequence(candidates.values[order], candidates.layout, candidates.timestamps[order])
    assert same(scorer.score(histories, moved), scorer.score(histories, candidates)[order])


@any_kind
def test_a_user_alone(kind: str) -> None:
    scorer = MFalconRanker(make_ranker(kind), micro_batch_size=4)
    histories, candidates = make_histories(kind, LENGTHS), make_candidates()
    together = scorer.score(histories, candidates)
    for user, count in enumerate(COUNTS):

        def alone(seq: JaggedSequence, user: int = user) -> JaggedSequence:
            rows = seq.layout.sequence_ids(seq.values.shape[0]) == user
            layout = JaggedLayout.from_lengths(
                seq.layout.seq_lengths[user : user + 1], contextual_seq_len=seq.layout.contextual_seq_len
            )
            return JaggedSequence(seq.values[rows], layout, None if seq.timestamps is None else seq.timestamps[rows])

        begin = sum(COUNTS[:user])
        got = scorer.score(each(histories, alone), alone(candidates))
        assert same(got, together[begin : begin + count])


def test_request_times_of_candidates_count() -> None:
    scorer = MFalconRanker(make_ranker("plain"), micro_batch_size=4)
    histories, candidates = make_histories("plain", LENGTHS), make_candidates()
    assert candidates.timestamps is not None
    later = replace(candidates, timestamps=candidates.timestamps + 10**9)
    assert not same(scorer.score(histories, later), scorer.score(histories, candidates))


@pytest.mark.parametrize("counts", [(0, 0, 0, 0, 0), (0, 0, 3, 0, 0)])
def test_few_or_no_candidates(counts: tuple[int, ...]) -> None:
    ranker = make_ranker("truncated")
    histories, candidates = make_histories("truncated", LENGTHS, contextual=0), make_candidates(counts)
    got = MFalconRanker(ranker, micro_batch_size=2).score(histories, candidates)
    assert got.shape == (sum(counts), 2)
    assert same(got, full_scores(ranker, histories, candidates))


def test_no_users_at_all() -> None:
    scorer = MFalconRanker(make_ranker("plain"), micro_batch_size=2)
    assert scorer.score(make_sequence(()), make_sequence(())).shape == (0, 2)


# The cache.


@any_kind
def test_cached_scores_equal_one_full_forward(kind: str) -> None:
    ranker = make_ranker(kind)
    scorer = MFalconRanker(ranker, micro_batch_size=4)
    histories, candidates = make_histories(kind, LENGTHS), make_candidates()
    cache = scorer.new_cache(contextual_seq_len=CONTEXT, page_size=3, slab_pages=2)
    scorer.prefill(cache, "abcde", histories)
    expected = full_scores(ranker, histories, candidates)
    assert same(scorer.score_cached(cache, "abcde", candidates), expected)
    # Other users, another order, one of them twice.
    users = "eaa"
    some = make_sequence((2, 3, 1), begin=2000, seed=9)
    picked = torch.tensor([4, 0, 0])

    def pick(seq: JaggedSequence) -> JaggedSequence:
        offsets, lengths = seq.layout.seq_offsets[picked], seq.layout.seq_lengths[picked]
        rows = torch.cat([torch.arange(int(o), int(o + n)) for o, n in zip(offsets, lengths, strict=True)])
        assert seq.timestamps is not None
        layout = JaggedLayout.from_lengths(lengths, contextual_seq_len=CONTEXT)
        return JaggedSequence(seq.values[rows], layout, seq.timestamps[rows])

    assert same(scorer.score_cached(cache, users, some), full_scores(ranker, each(histories, pick), some))


# Where histories stand before, between and behind appends, per user: from context alone, in steps of one, in leaps over
# the tail and the truncation, and not at all.
STEPS = [(2, 2, 2, 4, 2), (2, 3, 2, 9, 6), (5, 4, 2, 9, 7), (6, 12, 2, 10, 8), (20, 13, 2, 11, 22)]


@pytest.mark.parametrize(
    ("kind", "page_size"), [*((kind, 4) for kind in (*KINDS, MIXTURE)), ("truncated-twice", 1), ("truncated-twice", 64)]
)
def test_appending_equals_encoding_the_longer_history(kind: str, page_size: int) -> None:
    ranker = make_ranker(kind)
    scorer = MFalconRanker(ranker, micro_batch_size=6)
    whole, candidates = make_histories(kind, STEPS[-1]), make_candidates((2, 1, 3, 2, 4))
    cache = scorer.new_cache(contextual_seq_len=CONTEXT, page_size=page_size, slab_pages=3)

    def until(step: int) -> Histories:
        def cut(seq: JaggedSequence) -> JaggedSequence:
            ends = [min(n, int(m)) for n, m in zip(STEPS[step], seq.layout.seq_lengths, strict=True)]
            return rows_of(seq, [0] * 5, ends, contextual=CONTEXT)

        return each(whole, cut)

    def between(step: int) -> Histories:
        def cut(seq: JaggedSequence) -> JaggedSequence:
            limits = seq.layout.seq_lengths.tolist()
            begin, end = ([min(n, m) for n, m in zip(STEPS[s], limits, strict=True)] for s in (step - 1, step))
            return rows_of(seq, begin, end)

        return each(whole, cut)

    scorer.prefill(cache, "abcde", until(0))
    for step in range(1, len(STEPS)):
        scorer.append(cache, "abcde", between(step))
        expected = full_scores(ranker, until(step), candidates)
        assert same(scorer.score_cached(cache, "abcde", candidates), expected), step


def test_only_the_channels_and_users_with_news_need_to_be_given() -> None:
    ranker = make_ranker(MIXTURE)
    scorer = MFalconRanker(ranker, micro_batch_size=6)
    whole = make_histories(MIXTURE, (9, 7))
    assert not isinstance(whole, JaggedSequence)
    candidates = make_candidates((2, 3))
    cache = scorer.new_cache(contextual_seq_len=CONTEXT)
    lengths = whole["watch"].layout.seq_lengths.tolist()
    before = {**whole, "watch": rows_of(whole["watch"], [0, 0], [lengths[0] - 2, lengths[1]], contextual=CONTEXT)}
    scorer.prefill(cache, ["ann", "bob"], before)
    news = rows_of(whole["watch"], [lengths[0] - 2, lengths[1]], lengths)
    alone = JaggedSequence(news.values, JaggedLayout.from_lengths(torch.tensor([2])), news.timestamps)
    scorer.append(cache, ["ann"], {"watch": alone})
    assert same(scorer.score_cached(cache, ["ann", "bob"], candidates), full_scores(ranker, whole, candidates))


def test_appending_does_not_touch_rows_that_stay() -> None:
    scorer = MFalconRanker(make_ranker("semi-local-tail"), micro_batch_size=6)
    whole = make_sequence((20,))
    cache = scorer.new_cache(page_size=4)
    scorer.prefill(cache, ["ann"], rows_of(whole, [0], [15]))
    channel = cache.channels[""]
    before = [kv.k.clone() for kv in channel.read(["ann"])]
    address = [kv.k.data_ptr() for kv in channel.read(["ann"])]
    scorer.append(cache, ["ann"], rows_of(whole, [15], [20]))
    after = channel.read(["ann"])
    assert [kv.k.data_ptr() for kv in after] == address
    stable = 15 - TAIL.full_attn_tail_len
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:stable], new.k[:stable])
    # What the docs say about the tail: rows that it leaves behind do change.
    assert not same(before[-1][stable:15], after[-1].k[stable:15])


# Refusals.


def test_contextual_rows_that_see_the_history_cannot_grow() -> None:
    ranker = make_ranker("plain", mask=AttentionMask(contextual_sees_history=True))
    scorer = MFalconRanker(ranker, micro_batch_size=4)
    histories, candidates = make_histories("plain", LENGTHS), make_candidates()
    cache = scorer.new_cache(contextual_seq_len=CONTEXT)
    scorer.prefill(cache, "abcde", histories)
    # The cache itself is right.
    assert same(scorer.score_cached(cache, "abcde", candidates), full_scores(ranker, histories, candidates))
    with pytest.raises(ValueError, match=r"^mask.contextual_sees_history: expected False to append"):
        scorer.append(cache, ["a"], make_sequence((2,)))


class AgeEmbedding(SequenceEmbedding):
    """Adds how long ago an event was."""


def test_tokens_that_depend_on_the_request_are_refused() -> None:
    ranker = make_ranker("plain")
    ranker.embedding = AgeEmbedding(ranker.config)  # type: ignore[arg-type,union-attr]
    with pytest.raises(TypeError, match=r"^ranker: expected the tokens of SequenceEmbedding, got AgeEmbedding"):
        MFalconRanker(ranker, micro_batch_size=4)


def test_weights_that_changed_make_the_cache_stale() -> None:
    ranker = make_ranker("plain")
    scorer = MFalconRanker(ranker, micro_batch_size=4)
    cache = scorer.new_cache()
    scorer.prefill(cache, ["ann"], make_sequence((5,)))
    with torch.no_grad():
        next(ranker.parameters()).mul_(1.01)
    with pytest.raises(ValueError, match=r"^cache: made by another ranker, or the weights have changed"):
        scorer.score_cached(cache, ["ann"], make_sequence((2,)))
    other = MFalconRanker(make_ranker(MIXTURE), micro_batch_size=4)
    with pytest.raises(ValueError, match=r"^cache: made by another ranker"):
        other.append(cache, ["ann"], {"buy": make_sequence((2,))})


def test_training_mode_is_refused() -> None:
    scorer = MFalconRanker(make_ranker("plain").train(), micro_batch_size=4)
    with pytest.raises(ValueError, match=r"^ranker: expected evaluation mode"):
        scorer.score(make_sequence((5,)), make_sequence((2,)))


def test_autocast_around_a_cache_is_refused() -> None:
    scorer = MFalconRanker(make_ranker("plain").float(), micro_batch_size=4)
    cache = scorer.new_cache()
    history, candidates = make_sequence((5,)), make_sequence((2,))
    history, candidates = (seq.with_values(seq.values.float()) for seq in (history, candidates))
    scorer.prefill(cache, ["ann"], history)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert scorer.score(history, candidates).shape == (2, 2)
        with pytest.raises(ValueError, match=r"^autocast: expected none around a cache"):
            scorer.score_cached(cache, ["ann"], candidates)
        with pytest.raises(ValueError, match=r"^autocast: "):
            scorer.prefill(cache, ["bob"], history)


@any_kind
def test_half_precision_stays_near_double(kind: str) -> None:
    """bf16, as a whole and after appends: within twice the error of one full forward pass in bf16 (the budget rule)."""
    double = make_ranker(kind)
    histories, candidates = make_histories(kind, (20, 7)), make_candidates((70, 60))
    truth = full_scores(double, histories, candidates)
    half = double.to(torch.bfloat16)

    def rounded(seq: JaggedSequence) -> JaggedSequence:
        return seq.with_values(seq.values.to(torch.bfloat16))

    histories, candidates = each(histories, rounded), rounded(candidates)
    error = (full_scores(half, histories, candidates).double() - truth).abs().max()
    budget = 2 * float(error) + torch.finfo(torch.bfloat16).eps
    scorer = MFalconRanker(half, micro_batch_size=32)
    cache = scorer.new_cache(contextual_seq_len=CONTEXT, page_size=4)
    scorer.prefill(cache, "ab", each(histories, lambda seq: rows_of(seq, [0, 0], [6, 4], contextual=CONTEXT)))

    def rest(seq: JaggedSequence) -> JaggedSequence:
        return rows_of(seq, [6, 4], seq.layout.seq_lengths.tolist())

    scorer.append(cache, "ab", each(histories, rest))
    for got in (scorer.score(histories, candidates), scorer.score_cached(cache, "ab", candidates)):
        assert float((got.double() - truth).abs().max()) <= budget


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "many"])
def test_micro_batch_size_is_checked(size: Any) -> None:
    with pytest.raises(ValueError, match=r"^micro_batch_size: expected an int >= 1"):
        MFalconRanker(make_ranker("plain"), micro_batch_size=size)


def test_the_automatic_size_follows_the_memory() -> None:
    ranker = make_ranker("plain")
    assert MFalconRanker(ranker).micro_batch_size == 65536
    configs = [make_config("plain", embedding_dim=512, max_seq_len=n, backend=b) for n, b in SIZES]
    weight = torch.zeros(1, dtype=torch.bfloat16)
    assert [auto_size([config], weight) for config in configs] == [16384, 8192, 16384, 2048]
    assert auto_size(configs, weight) == 2048


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^ranker: expected an HSTURanker or a MixtureRanker, got Linear"):
        MFalconRanker(torch.nn.Linear(2, 2), micro_batch_size=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^ranker: expected context_width 0, got 3"):
        MFalconRanker(HSTURanker(HSTUConfig(), RANKING, context_width=3).eval(), micro_batch_size=4)


def test_calls_that_do_not_fit() -> None:
    scorer = MFalconRanker(make_ranker("plain"), micro_batch_size=4)
    cache = scorer.new_cache(contextual_seq_len=CONTEXT)
    history = make_sequence((5, 6), contextual=CONTEXT)
    with pytest.raises(ValueError, match=r"^history: expected 1 sequences as users, got 2"):
        scorer.prefill(cache, ["ann"], history)
    with pytest.raises(ValueError, match=r"^history: expected 2 contextual rows as the cache was made for, got 0"):
        scorer.prefill(cache, ["ann", "bob"], make_sequence((5, 6)))
    with pytest.raises(ValueError, match=r"^users: expected each one once"):
        scorer.prefill(cache, ["ann", "ann"], history)
    with pytest.raises(ValueError, match=r"^history: expected a JaggedSequence, got a mapping"):
        scorer.prefill(cache, ["ann", "bob"], {"watch": history})
    with_targets = replace(history, layout=replace(history.layout, num_targets=torch.tensor([1, 1])))
    with pytest.raises(ValueError, match=r"^history: expected sequences without targets"):
        scorer.score(with_targets, make_sequence((1, 1)))
    scorer.prefill(cache, ["ann", "new"], make_sequence((5, 0), contextual=CONTEXT))
    with pytest.raises(ValueError, match=r"^users: no cached history of 'eve'; prefill it first"):
        scorer.score_cached(cache, ["eve"], make_sequence((1,)))
    with pytest.raises(ValueError, match=r"^users: no cached history of 'eve'"):
        scorer.append(cache, ["eve"], make_sequence((1,)))
    with pytest.raises(ValueError, match=r"^users: 'new' has no contextual rows yet"):
        scorer.append(cache, ["new"], make_sequence((1,)))
    with pytest.raises(ValueError, match=r"^events: expected new events alone, got contextual rows"):
        scorer.append(cache, ["ann"], make_sequence((3,), contextual=CONTEXT))
    with pytest.raises(ValueError, match=r"^candidates: expected 1 sequences as histories, got 2"):
        scorer.score_cached(cache, ["ann"], make_sequence((1, 1)))
    with pytest.raises(ValueError, match=r"^timestamps: the model has a time bias"):
        scorer.append(cache, ["ann"], replace(make_sequence((2,)), timestamps=None))
    mixture = MFalconRanker(make_ranker(MIXTURE), micro_batch_size=4)
    with pytest.raises(ValueError, match=r"^history: expected one sequence for each channel of \['buy', 'watch'\]"):
        mixture.score(history, make_sequence((1, 1)))
    assert history.values.shape[1] == WIDTH
