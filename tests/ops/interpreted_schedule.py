"""The work lists of the Triton backend against the definition of the mask, written in the interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_kernels import AttentionMask, JaggedLayout
from hstu_kernels.attention.triton import plan_triton, schedule
from hstu_kernels.attention.triton.schedule import FULL_SEGMENTS, HEADER, SEGMENTS, block_spans, list_length
from hstu_kernels.testing import ATTENTION_CASES, AttentionCase


def blocks_of(line: list[int], block: int) -> list[tuple[int, int]]:
    """First row and segment of the blocks of a line, as the kernels work them out."""
    pairs = [(line[HEADER + 2 * s], line[HEADER + 2 * s + 1]) for s in range(SEGMENTS)]
    found = []
    for i in range(pairs[-1][1]):
        segment = next(s for s, (_, blocks) in enumerate(pairs) if i < blocks)
        found.append((pairs[segment][0] + i * block, segment))
    return found


def check(layout: JaggedLayout, mask: AttentionMask, block_m: int, block_n: int) -> int:
    """Each visible pair lies in exactly one block, and full blocks hold visible pairs only. Returns the pieces."""
    total, found = int(layout.seq_offsets[-1]), 0
    plan = plan_triton(layout, mask, None, total)
    for side, work in (("query", plan.query_work(block_m, block_n)), ("key", plan.key_work(block_m, block_n))):
        own, other = (block_m, block_n) if side == "query" else (block_n, block_m)
        met = torch.zeros(total, layout.max_seq_len, dtype=torch.int64)
        full = torch.zeros_like(met, dtype=torch.bool)
        truth = torch.zeros_like(full)
        long, pieces = plan.pieces(side, own)
        tiles = sum(-(-length // own) for length in layout.seq_lengths.tolist())
        assert work.shape[0] == pieces + list_length(total, layout.batch_size, own)
        exists = work[:, 1] > 0
        assert not work[~exists].any(), f"{side}: work in an empty line"
        check_order(work[pieces:][exists[pieces:]].tolist(), layout, mask, own, side)
        owners: dict[tuple[int, int], list[int]] = {}
        ends: dict[tuple[int, int], int] = {}
        for at in exists.nonzero().flatten().tolist():
            line = work[at].tolist()
            start, length, history_end, begin = line[:HEADER]
            assert 0 <= begin < length
            owners.setdefault((start, begin), []).append(at)
            mine = slice(start + begin, start + min(begin + own, length))
            blocks = blocks_of(line, other)
            for first, segment in blocks:
                assert first >= ends.get((start, begin), 0), f"{side}: blocks out of order"
                ends[start, begin] = first + other
                assert first + other <= length or first == blocks[-1][0], f"{side}: reaches over before the last block"
                met[mine, first : min(first + other, length)] += 1
                if segment in FULL_SEGMENTS[side]:
                    assert first + other <= length
                    full[mine, first : first + other] = True
            index = torch.arange(length)
            visible = mask.visible(index[:, None], index[None, :], history_end, layout.contextual_seq_len)
            ours = visible if side == "query" else visible.T
            truth[start : start + length, :length] = ours
        assert len(owners) == tiles
        for lines in owners.values():
            # A tile is whole, or in pieces that stand at equal distances at the front.
            if lines[0] < pieces:
                assert len(lines) > 1
                assert lines == list(range(lines[0], pieces, long))[: len(lines)]
                found += len(lines)
            else:
                assert len(lines) == 1
        assert (met <= 1).all(), f"{side}: a pair is met twice"
        assert not (truth & (met == 0)).any(), f"{side}: a visible pair is missed"
        assert not (full & ~truth).any(), f"{side}: a hidden pair in a full block"
    return found


def check_order(lines: list[list[int]], layout: JaggedLayout, mask: AttentionMask, own: int, side: str) -> None:
    """Sequence by sequence, the longest first; the last of them mixed by the blocks that a causal tile meets."""
    lengths = torch.tensor(sorted(layout.seq_lengths.tolist(), reverse=True), dtype=torch.int64)
    before = (lengths.cumsum(0) - lengths).tolist()
    last = [p for p, rows in enumerate(before) if rows >= int(lengths.sum()) - schedule.END_ROWS]
    last = [] if mask.max_attn_len else last[-64:]
    tiles = [-(-length // own) for length in lengths.tolist()]
    mixed = sum(tiles[p] for p in last)
    single, together = lines[: len(lines) - mixed], lines[len(lines) - mixed :]
    places = [(-length, start) for start, length, *_ in single]
    assert places == sorted(places), f"{side}: a longer sequence stands behind a shorter one, or one is torn apart"
    left = [-(-length // own) - begin // own for _, length, _, begin, *_ in together]
    if side == "query":
        left = [begin // own for _, _, _, begin, *_ in together]
        expected = [t for p in last for t in range(tiles[p])]
    else:
        expected = [t + 1 for p in last for t in range(tiles[p])]
    assert left == sorted(expected, reverse=True), f"{side}: the last sequences are not mixed, the busiest tile first"


BLOCKS = [(16, 16), (32, 16), (16, 64)]


@pytest.mark.parametrize(
    ("case", "blocks"),
    [(case, BLOCKS[i % len(BLOCKS)]) for i, case in enumerate(ATTENTION_CASES)],
    ids=lambda given: str(given).replace(" ", ""),
)
def test_named_cases(case: AttentionCase, blocks: tuple[int, int]) -> None:
    """Each with one of the sizes of blocks; `test_random_geometry` draws sizes and masks freely."""
    check(case.layout(), case.mask, *blocks)


@pytest.mark.parametrize("rows", [8, schedule.PIECE_ROWS], ids=lambda rows: f"pieces-of-{rows}")
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_random_geometry(rows: int, data: st.DataObject) -> None:
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
    blocks = st.sampled_from([2, 4, 8])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "END_ROWS", data.draw(st.sampled_from([0, 16, 100, schedule.END_ROWS])))
        patch.setattr(schedule, "PIECE_ROWS", rows)
        check(layout, mask, data.draw(blocks), data.draw(blocks))


def test_many_sequences_are_mixed_at_the_end() -> None:
    """More than one group holds, and some of them empty."""
    lengths = [1 + 7 * i % 40 for i in range(150)]
    for empty in (0, 3, 70):
        layout = JaggedLayout.from_lengths(torch.tensor(lengths + [0] * empty))
        check(layout, AttentionMask(), 8, 8)


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
        return (
            int(plan.query_work(64, 64)[:, -1].sum()),
            int(plan.key_work(64, 64)[:, -1].sum()),
        )

    for short, long in zip(blocks(1024), blocks(2048), strict=True):
        assert long <= 2.1 * short


def test_causal_work_is_mostly_full_blocks() -> None:
    plan = plan_triton(JaggedLayout.from_lengths(torch.tensor([1024])), AttentionMask(), None, 1024)
    for side, work in (("query", plan.query_work(64, 64)), ("key", plan.key_work(64, 64))):
        assert int(work[:, -1].sum()) == 17 * 16 // 2
        full = [s for line in work.tolist() for _, s in blocks_of(line, 64) if s in FULL_SEGMENTS[side]]
        assert len(full) == 15 * 16 // 2, "one edge block for each tile: the diagonal"


def tail_of(rows: int) -> AttentionMask:
    return AttentionMask(max_attn_len=256, full_attn_tail_len=rows)


@pytest.mark.parametrize("mask", [tail_of(200), AttentionMask(max_attn_len=256, global_prefix_len=200)], ids=str)
def test_long_tiles_are_cut(mask: AttentionMask, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most PIECE_ROWS in one program, with borders that neighbours do not move."""
    rows = 1024
    monkeypatch.setattr(schedule, "PIECE_ROWS", rows)

    def pieces(lengths: list[int], of: int) -> list[list[int]]:
        layout = JaggedLayout.from_lengths(torch.tensor(lengths))
        plan = plan_triton(layout, mask, None, sum(lengths))
        side = "query" if mask.full_attn_tail_len else "key"
        work = plan.query_work(64, 64) if side == "query" else plan.key_work(64, 64)
        start = sum(lengths[:of])
        assert int(work[:, -1].max()) <= rows // 64
        ours = work[: plan.pieces(side, 64)[1]]
        return [line[1:] for line in ours[(ours[:, 0] == start) & (ours[:, 1] > 0)].tolist()]

    alone = pieces([3 * rows + 7], 0)
    assert len(alone) >= 4 * 3
    beside = pieces([rows, 5 * rows, 3 * rows + 7, 0, 77, rows + 1], 2)
    assert sorted(beside) == sorted(alone)


def test_nothing_is_cut_where_no_tile_is_long() -> None:
    rows = schedule.PIECE_ROWS
    for length, mask in (
        (2 * rows, AttentionMask()),
        (2 * rows, AttentionMask(max_attn_len=64)),
        (2 * rows, tail_of(rows)),
        (rows, tail_of(64)),
    ):
        plan = plan_triton(JaggedLayout.from_lengths(torch.tensor([length] * 2)), mask, None, 2 * length)
        assert plan.pieces("query", 64) == plan.pieces("key", 64) == (0, 0)


def test_many_targets_do_not_meet_each_other() -> None:
    layout = JaggedLayout.from_lengths(torch.tensor([1024 + 2048]), num_targets=torch.tensor([2048]))
    work = plan_triton(layout, AttentionMask(), None, 1024 + 2048).query_work(64, 64)
    assert int(work[:, -1].max()) == 1024 // 64 + 1


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


@pytest.mark.parametrize(
    "lengths",
    [(70, 0, 513, 64, 1), (512, 256, 257), (5,), (0, 0), tuple(range(140)), (140_000,)],
    ids=lambda n: str(n[:5]),
)
def test_pairs_stand_sequence_by_sequence_without_gaps(lengths: tuple[int, ...]) -> None:
    """For programs that stay and take lines in turn; 140 sequences and 547 pairs take a program more than one round."""
    layout = JaggedLayout.from_lengths(torch.tensor(lengths))
    work = plan_triton(layout, AttentionMask(), None, sum(lengths)).pair_work()
    expected = []
    for place in layout.seq_lengths.sort(descending=True, stable=True).indices.tolist():
        start, length = int(layout.seq_offsets[place]), lengths[place]
        expected += [[start, length, pair] for pair in range(-(-length // schedule.PAIR_ROWS))]
    assert work[: len(expected), :3].tolist() == expected
    assert not work[len(expected) :, :3].any()
