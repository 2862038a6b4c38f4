"""AttentionMask against drawings: one line per row, one column per key, x visible. `key_range` against `visible`."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_kernels import AttentionMask, KeyRange

from .loops import sees


@dataclasses.dataclass(frozen=True)
class Drawing:
    name: str
    picture: str
    mask: dict[str, Any]
    contextual: int = 0
    targets: int = 0

    def __str__(self) -> str:
        return self.name


DRAWINGS = [
    Drawing(
        "causal",
        """
        x.....
        xx....
        xxx...
        xxxx..
        xxxxx.
        xxxxxx
        """,
        {},
    ),
    Drawing(
        "window-1",
        """
        x.....
        xx....
        .xx...
        ..xx..
        ...xx.
        ....xx
        """,
        {"max_attn_len": 1},
    ),
    Drawing(
        "window-2",
        """
        x.....
        xx....
        xxx...
        .xxx..
        ..xxx.
        ...xxx
        """,
        {"max_attn_len": 2},
    ),
    Drawing(
        "semi-local-prefix-reading",
        """
        x.....
        xx....
        xxx...
        xxxx..
        xx.xx.
        xx..xx
        """,
        {"max_attn_len": 1, "global_prefix_len": 2},
    ),
    Drawing(
        "semi-local-tail-reading",
        """
        x.....
        xx....
        .xx...
        ..xx..
        xxxxx.
        xxxxxx
        """,
        {"max_attn_len": 1, "full_attn_tail_len": 2},
    ),
    Drawing(
        "semi-local-both-readings",
        """
        x.......
        xx......
        xxx.....
        x.xx....
        x..xx...
        x...xx..
        xxxxxxx.
        xxxxxxxx
        """,
        {"max_attn_len": 1, "global_prefix_len": 1, "full_attn_tail_len": 2},
    ),
    Drawing(
        "prefix-without-window-changes-nothing",
        """
        x.....
        xx....
        xxx...
        xxxx..
        xxxxx.
        xxxxxx
        """,
        {"global_prefix_len": 2},
    ),
    Drawing(
        "tail-without-window-changes-nothing",
        """
        x.....
        xx....
        xxx...
        xxxx..
        xxxxx.
        xxxxxx
        """,
        {"full_attn_tail_len": 2},
    ),
    Drawing(
        "contextual",
        """
        xx....
        xx....
        xxx...
        xxxx..
        xxxxx.
        xxxxxx
        """,
        {},
        contextual=2,
    ),
    Drawing(
        "contextual-window",
        """
        xx....
        xx....
        xxx...
        xxxx..
        xx.xx.
        xx..xx
        """,
        {"max_attn_len": 1},
        contextual=2,
    ),
    Drawing(
        "contextual-window-prefix",
        """
        xx......
        xx......
        xxx.....
        xxxx....
        xxxxx...
        xxx.xx..
        xxx..xx.
        xxx...xx
        """,
        {"max_attn_len": 1, "global_prefix_len": 1},
        contextual=2,
    ),
    Drawing(
        "contextual-sees-history",
        """
        xxxxxx
        xxxxxx
        xxx...
        xxxx..
        xxxxx.
        xxxxxx
        """,
        {"contextual_sees_history": True},
        contextual=2,
    ),
    Drawing(
        "contextual-sees-history-window-targets-behind",
        """
        xxxxxx..
        xxxxxx..
        xxx.....
        xxxx....
        xx.xx...
        xx..xx..
        xxxxxxx.
        xxxxxx.x
        """,
        {"contextual_sees_history": True, "max_attn_len": 1},
        contextual=2,
        targets=2,
    ),
    Drawing(
        "contextual-sees-history-without-context-changes-nothing",
        """
        x.....
        xx....
        xxx...
        xxxx..
        xxxxx.
        xxxxxx
        """,
        {"contextual_sees_history": True},
    ),
    Drawing(
        "targets",
        """
        x.....
        xx....
        xxx...
        xxxx..
        xxx.x.
        xxx..x
        """,
        {},
        targets=3,
    ),
    Drawing(
        "all-targets",
        """
        x.....
        .x....
        ..x...
        ...x..
        ....x.
        .....x
        """,
        {},
        targets=6,
    ),
    Drawing(
        "window-does-not-bind-targets",
        """
        x.......
        xx......
        .xx.....
        ..xx....
        ...xx...
        xxxxxx..
        xxxxx.x.
        xxxxx..x
        """,
        {"max_attn_len": 1},
        targets=3,
    ),
    Drawing(
        "window-targets",
        """
        x.......
        xx......
        xxx.....
        .xxx....
        ..xxx...
        ...xxx..
        ...xx.x.
        ...xx..x
        """,
        {"max_attn_len": 2, "window_targets": True},
        targets=3,
    ),
    Drawing(
        "window-targets-without-window-changes-nothing",
        """
        x.....
        xx....
        xxx...
        xxxx..
        xxxxx.
        xxxx.x
        """,
        {"window_targets": True},
        targets=2,
    ),
    Drawing(
        "window-targets-keep-the-prefix",
        """
        x.......
        xx......
        xxx.....
        x.xx....
        x..xx...
        x...xx..
        x....xx.
        x....x.x
        """,
        {"max_attn_len": 1, "window_targets": True, "global_prefix_len": 1},
        targets=2,
    ),
    Drawing(
        "tail-counts-history-rows-not-targets",
        """
        x.......
        xx......
        .xx.....
        ..xx....
        xxxxx...
        xxxxxx..
        .....xx.
        .....x.x
        """,
        {"max_attn_len": 1, "window_targets": True, "full_attn_tail_len": 2},
        targets=2,
    ),
    Drawing(
        "everything",
        """
        xx......
        xx......
        xxx.....
        xxxx....
        xxxxx...
        xxxxxx..
        xxx..xx.
        xxx..x.x
        """,
        {"max_attn_len": 1, "window_targets": True, "global_prefix_len": 1, "full_attn_tail_len": 1},
        contextual=2,
        targets=2,
    ),
    Drawing(
        "tail-longer-than-the-history",
        """
        xx....
        xx....
        xxx...
        xxxx..
        xx.xx.
        xx.x.x
        """,
        {"max_attn_len": 1, "full_attn_tail_len": 99, "window_targets": True},
        contextual=2,
        targets=2,
    ),
]


def drawn(drawing: Drawing) -> list[str]:
    return drawing.picture.split()


def computed(drawing: Drawing) -> list[str]:
    size = len(drawn(drawing))
    index = torch.arange(size)
    visible = AttentionMask(**drawing.mask).visible(
        index[:, None], index[None, :], size - drawing.targets, drawing.contextual
    )
    assert visible.dtype == torch.bool
    return ["".join("x" if cell else "." for cell in row) for row in visible.tolist()]


@pytest.mark.parametrize("drawing", DRAWINGS, ids=str)
def test_visible_is_as_drawn(drawing: Drawing) -> None:
    assert computed(drawing) == drawn(drawing)


def test_every_field_is_drawn() -> None:
    used = {name for drawing in DRAWINGS for name in drawing.mask}
    assert used == {f.name for f in dataclasses.fields(AttentionMask)}


masks = st.builds(
    AttentionMask,
    max_attn_len=st.integers(0, 9),
    global_prefix_len=st.integers(0, 6),
    full_attn_tail_len=st.integers(0, 8),
    window_targets=st.booleans(),
    contextual_sees_history=st.booleans(),
)


@st.composite
def geometries(draw: st.DrawFn) -> tuple[int, int, int]:
    """``(seq_len, history_end, contextual_seq_len)`` of one sequence."""
    contextual = draw(st.integers(0, 4))
    history_end = contextual + draw(st.integers(0, 20))
    return history_end + draw(st.integers(0, 8)), history_end, contextual


@settings(max_examples=150, deadline=None)
@given(masks, geometries())
def test_visible_equals_loops(mask: AttentionMask, geometry: tuple[int, int, int]) -> None:
    size, history_end, contextual = geometry
    index = torch.arange(size)
    visible = mask.visible(index[:, None], index[None, :], history_end, contextual).tolist()
    for row in range(size):
        for key in range(size):
            assert visible[row][key] == sees(mask, row, key, history_end, contextual), (row, key)


def test_visible_broadcasts_over_sequences() -> None:
    mask = AttentionMask(max_attn_len=2, full_attn_tail_len=1, window_targets=True)
    index = torch.arange(7)
    ends = torch.tensor([3, 7, 5])
    batched = mask.visible(index[None, :, None], index[None, None, :], ends[:, None, None], 1)
    assert batched.shape == (3, 7, 7)
    for one, end in zip(batched, ends.tolist(), strict=True):
        assert torch.equal(one, mask.visible(index[:, None], index[None, :], end, 1))


@settings(max_examples=400, deadline=None)
@given(masks, geometries(), st.data())
def test_key_range_covers_visible(mask: AttentionMask, geometry: tuple[int, int, int], data: st.DataObject) -> None:
    size, history_end, contextual = geometry
    begin = data.draw(st.integers(0, size), label="row_begin")
    # Blocks may reach beyond the sequence.
    end = data.draw(st.integers(begin, size + 5), label="row_end")
    bound = mask.key_range(begin, end, size, history_end, contextual)
    assert 0 <= bound.prefix_end <= bound.begin <= bound.end <= size
    for row in range(begin, min(end, size)):
        for key in range(size):
            if sees(mask, row, key, history_end, contextual):
                assert key < bound.prefix_end or bound.begin <= key < bound.end, (row, key, bound)


@settings(max_examples=200, deadline=None)
@given(masks.filter(lambda m: m.max_attn_len > 0), geometries(), st.data())
def test_key_range_of_windowed_rows_is_small(
    mask: AttentionMask, geometry: tuple[int, int, int], data: st.DataObject
) -> None:
    """History rows between context and tail cost prefix + window + block keys, however long the sequence."""
    size, history_end, contextual = geometry
    last = history_end - mask.full_attn_tail_len
    if last <= contextual:
        return
    begin = data.draw(st.integers(contextual, last - 1), label="row_begin")
    end = data.draw(st.integers(begin + 1, last), label="row_end")
    bound = mask.key_range(begin, end, size, history_end, contextual)
    keys = bound.prefix_end + bound.end - bound.begin
    assert keys <= contextual + mask.global_prefix_len + mask.max_attn_len + end - begin


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(0, 6), geometries().filter(lambda g: g[0] > g[1]), st.integers(1, 4))
def test_key_range_of_windowed_targets_is_small(
    window: int, prefix: int, geometry: tuple[int, int, int], block: int
) -> None:
    """With window_targets, the first block of targets costs prefix + window + block keys."""
    size, history_end, contextual = geometry
    mask = AttentionMask(max_attn_len=window, global_prefix_len=prefix, window_targets=True)
    bound = mask.key_range(history_end, history_end + block, size, history_end, contextual)
    assert bound.prefix_end + bound.end - bound.begin <= contextual + prefix + window + block


def test_key_range_of_a_causal_block_ends_with_it() -> None:
    assert AttentionMask().key_range(64, 128, 1000, 1000, 0) == KeyRange(0, 0, 128)


def test_key_range_of_a_windowed_block_by_hand() -> None:
    mask = AttentionMask(max_attn_len=10, global_prefix_len=4)
    assert mask.key_range(64, 128, 1000, 1000, 2) == KeyRange(6, 54, 128)


def test_key_range_of_no_rows_is_empty() -> None:
    assert AttentionMask().key_range(5, 5, 9, 9, 0) == KeyRange(0, 0, 0)
    assert AttentionMask().key_range(9, 12, 9, 9, 0) == KeyRange(0, 0, 0)


def test_mask_is_a_key() -> None:
    assert AttentionMask(max_attn_len=3) == AttentionMask(max_attn_len=3)
    assert len({AttentionMask(max_attn_len=3), AttentionMask(max_attn_len=3), AttentionMask(max_attn_len=4)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        AttentionMask().max_attn_len = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", ["max_attn_len", "global_prefix_len", "full_attn_tail_len"])
@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("1", TypeError)])
def test_numbers_are_checked(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        AttentionMask(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["window_targets", "contextual_sees_history"])
def test_booleans_are_checked(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        AttentionMask(**{name: 1})  # type: ignore[arg-type]
