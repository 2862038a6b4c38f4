"""The work lists of the Triton backend against the definition of the mask, written in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_kernels import AttentionMask, JaggedLayout
from hstu_kernels.attention.triton import plan_triton
from hstu_kernels.attention.triton.schedule import EDGE_SEGMENTS, FULL_SEGMENTS, HEADER, block_spans
from hstu_kernels.testing import ATTENTION_CASES, AttentionCase


def blocks_of(line: list[int], at: int, segments: int, block: int) -> list[int]:
    """First rows of the blocks of the segments that begin at column ``at``, as the kernels work them out."""
    pairs = [(line[at + 2 * s], line[at + 2 * s + 1]) for s in range(segments)]
    begins = []
    for i in range(pairs[-1][1]):
        origin = next(origin for origin, blocks in pairs if i < blocks)
        begins.append(origin + i * block)
    return begins


def check(layout: JaggedLayout, mask: AttentionMask, block_m: int, block_n: int) -> None:
    """Each visible pair lies in exactly one block, and full blocks hold visible pairs only."""
    total = int(layout.seq_offsets[-1])
    plan = plan_triton(layout, mask, None, total)
    for side, work in (("query", plan.query_work(block_m, block_n)), ("key", plan.key_work(block_m, block_n))):
        own, other = (block_m, block_n) if side == "query" else (block_n, block_m)
        met = torch.zeros(total, layout.max_seq_len, dtype=torch.int64)
        full = torch.zeros_like(met, dtype=torch.bool)
        truth = torch.zeros_like(full)
        places = []
        tiles = sum(-(-length // own) for length in layout.seq_lengths.tolist())
        assert tiles <= work.shape[0] == total // own + layout.batch_size
        exists = work[:, 1] > 0
        assert int(exists.sum()) == tiles
        assert not work[~exists].any(), f"{side}: work in an empty line"
        for line in work[exists].tolist():
            start, length, history_end, begin = line[:HEADER]
            assert 0 <= begin < length
            mine = slice(start + begin, start + min(begin + own, length))
            places.append((-length, start))
            for at, segments in ((HEADER, FULL_SEGMENTS), (HEADER + 2 * FULL_SEGMENTS, EDGE_SEGMENTS)):
                for first in blocks_of(line, at, segments, other):
                    assert first >= 0
                    met[mine, first : min(first + other, length)] += 1
                    if at == HEADER:
                        assert first + other <= length
                        full[mine, first : first + other] = True
            index = torch.arange(length)
            visible = mask.visible(index[:, None], index[None, :], history_end, layout.contextual_seq_len)
            ours = visible if side == "query" else visible.T
            truth[start : start + length, :length] = ours
        assert (met <= 1).all(), f"{side}: a pair is met twice"
        assert not (truth & (met == 0)).any(), f"{side}: a visible pair is missed"
        assert not (full & ~truth).any(), f"{side}: a hidden pair in a full block"
        assert places == sorted(places), f"{side}: a longer sequence stands behind a shorter one, or one is torn apart"


@pytest.mark.parametrize("blocks", [(16, 16), (32, 16), (16, 64)], ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_named_cases(case: AttentionCase, blocks: tuple[int, int]) -> None:
    check(case.layout(), case.mask, *blocks)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_random_geometry(data: st.DataObject) -> None:
    contextual = data.draw(st.integers(0, 6))
    lengths, targets = [], []
    for _ in range(data.draw(st.integers(0, 3))):
        length = data.draw(st.just(0) | st.integers(max(1, contextual), 60))
        lengths.append(length)
        targets.append(data.draw(st.integers(0, length - contextual)) if length else 0)
    mask = AttentionMask(
        max_attn_len=data.draw(st.integers(0, 20)),
        global_prefix_len=data.draw(st.integers(0, 10)),
        full_attn_tail_len=data.draw(st.integers(0, 20)),
        window_targets=data.draw(st.booleans()),
        contextual_sees_history=data.draw(st.booleans()),
    )
    layout = JaggedLayout.from_lengths(
        torch.tensor(lengths, dtype=torch.int64),
        num_targets=torch.tensor(targets, dtype=torch.int64),
        contextual_seq_len=contextual,
    )
    check(layout, mask, data.draw(st.sampled_from([2, 4, 8])), data.draw(st.sampled_from([2, 4, 8])))


@pytest.mark.parametrize(
    "mask",
    [
        AttentionMask(max_attn_len=64),
        AttentionMask(max_attn_len=64, global_prefix_len=64),
        AttentionMask(max_attn_len=64, full_attn_tail_len=64),
    ],
    ids=["window", "prefix", "tail"],
)
def test_semi_local_work_grows_with_the_length_alone(mask: AttentionMask) -> None:
    def blocks(length: int) -> tuple[int, int]:
        plan = plan_triton(JaggedLayout.from_lengths(torch.tensor([length])), mask, None, length)
        columns = [HEADER + 2 * FULL_SEGMENTS - 1, -1]
        return (
            int(plan.query_work(64, 64)[:, columns].sum()),
            int(plan.key_work(64, 64)[:, columns].sum()),
        )

    for short, long in zip(blocks(4096), blocks(8192), strict=True):
        assert long <= 2.1 * short


def test_causal_work_is_mostly_full_blocks() -> None:
    plan = plan_triton(JaggedLayout.from_lengths(torch.tensor([4096])), AttentionMask(), None, 4096)
    for work in (plan.query_work(64, 64), plan.key_work(64, 64)):
        assert int(work[:, -1].sum()) == 64, "one edge block for each tile: the diagonal"
        assert int(work[:, HEADER + 2 * FULL_SEGMENTS - 1].sum()) == 63 * 64 // 2


def test_many_targets_do_not_meet_each_other() -> None:
    layout = JaggedLayout.from_lengths(torch.tensor([1024 + 2048]), num_targets=torch.tensor([2048]))
    work = plan_triton(layout, AttentionMask(), None, 1024 + 2048).query_work(64, 64)
    assert int(work[:, [HEADER + 2 * FULL_SEGMENTS - 1, -1]].sum(1).max()) == 1024 // 64 + 1


def test_empty_batches_have_no_work() -> None:
    for lengths in ([], [0, 0]):
        layout = JaggedLayout.from_lengths(torch.tensor(lengths, dtype=torch.int64))
        plan = plan_triton(layout, AttentionMask(), None, 0)
        assert not plan.query_work(64, 64).any()
        assert not plan.key_work(64, 64).any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=5), st.sampled_from([1, 4, 16]), st.integers(0, 2**32))
def test_spans_of_blocks(lengths: list[int], block: int, seed: int) -> None:
    layout = JaggedLayout.from_lengths(torch.tensor(lengths, dtype=torch.int64))
    generator = torch.Generator().manual_seed(seed)
    limits = torch.iinfo(torch.int64)
    times = torch.randint(limits.min, limits.max, (sum(lengths),), generator=generator)
    spans = block_spans(times, layout, block)
    assert spans.shape == (sum(lengths), 2)
    for start, length in zip(layout.seq_offsets.tolist(), lengths, strict=False):
        for begin in range(start, start + length, block):
            own = times[begin : min(begin + block, start + length)]
            assert spans[begin].tolist() == [int(own.min()), int(own.max())]
