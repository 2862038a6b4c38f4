"""HSTURanker: candidates behind a history, cached scoring, generative rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu_kernels import AttentionMask, JaggedLayout
from hstu_kernels.testing import make_timestamps
from hstu_plugin.config import HSTUConfig, Variant
from hstu_plugin.ranker import HSTURanker, MultiTaskHead
from hstu_plugin.ranking_config import RankingConfig, TaskConfig, TaskKind
from hstu_plugin.sequence import JaggedSequence

LENGTHS, TARGETS, CONTEXT = (16, 5, 0, 9), (5, 0, 0, 4), 2
RANKING = RankingConfig(
    tasks=(TaskConfig(name="click"), TaskConfig(name="rating", kind=TaskKind.REGRESSION)), head_dims=(7,)
)
MASKS = {
    "causal": AttentionMask(),
    "semi-local": AttentionMask(max_attn_len=3, global_prefix_len=1, full_attn_tail_len=2),
    "window-targets": AttentionMask(max_attn_len=3, full_attn_tail_len=2, window_targets=True),
}


def make_ranker(**options: Any) -> HSTURanker:
    torch.manual_seed(0)
    config = {"embedding_dim": 8, "num_heads": 2, "num_layers": 3, "max_seq_len": 12, "dropout": 0.3, **options}
    ranker = HSTURanker(HSTUConfig(**config), RANKING).double()
    with torch.no_grad():
        for parameter in ranker.parameters():
            parameter.normal_(std=0.7)
    return ranker.eval()


def make_batch(seed: int = 0) -> JaggedSequence:
    layout = JaggedLayout.from_lengths(
        torch.tensor(LENGTHS), num_targets=torch.tensor(TARGETS), contextual_seq_len=CONTEXT
    )
    rows = sum(LENGTHS)
    values = torch.randn(rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return JaggedSequence(values, layout, make_timestamps(layout, rows, seed=seed))


def rows_of(seq: JaggedSequence, rows: Tensor, counts: list[int]) -> JaggedSequence:
    assert seq.timestamps is not None
    return JaggedSequence(seq.values[rows], JaggedLayout.from_lengths(torch.tensor(counts)), seq.timestamps[rows])


def close(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("variant", list(Variant), ids=str)
def test_cached_scores_equal_the_full_forward_in_any_micro_batch(variant: Variant, mask: AttentionMask) -> None:
    ranker, seq = make_ranker(variant=variant, mask=mask), make_batch()
    full = ranker(seq)
    assert full.shape == (sum(TARGETS), 2)
    cache = ranker.prefill(seq.history())
    targets = seq.targets()
    assert close(ranker.decode(targets, cache), full)
    place = targets.layout.row_indices(targets.values.shape[0])
    for size in (1, 2, 3):
        for begin in range(0, max(TARGETS), size):
            rows = ((place >= begin) & (place < begin + size)).nonzero().flatten()
            counts = [min(size, max(0, n - begin)) for n in TARGETS]
            assert close(ranker.decode(rows_of(targets, rows, counts), cache), full[rows])


def test_order_and_company_of_candidates_do_not_matter() -> None:
    ranker, seq = make_ranker(), make_batch()
    cache, targets, full = ranker.prefill(seq.history()), seq.targets(), ranker(seq)
    order = torch.tensor([4, 2, 0, 1, 3, 8, 6, 5, 7])
    assert close(ranker.decode(rows_of(targets, order, [5, 0, 0, 4]), cache), full[order])
    # The last user alone.
    history = seq.history()
    alone = rows_of(history, torch.arange(16, 21), [5])
    alone = replace(alone, layout=replace(alone.layout, contextual_seq_len=CONTEXT))
    got = ranker.decode(rows_of(targets, torch.arange(5, 9), [4]), ranker.prefill(alone))
    assert close(got, full[5:])


def test_the_history_decides_the_score() -> None:
    ranker, seq = make_ranker(), make_batch()
    changed = seq.values.clone()
    changed[3, 0] += 1
    difference = (ranker(seq.with_values(changed)) - ranker(seq)).abs().amax(1)
    assert (difference[:5] > 1e-6).all() and (difference[5:] == 0).all()


def test_scores_at_history_rows_equal_scores_of_candidates() -> None:
    # With times of the rows' own events a row in the history and a candidate in its place are the same thing.
    ranker = make_ranker(row_time="event")
    layout = JaggedLayout.from_lengths(torch.tensor([7, 4]), contextual_seq_len=1)
    values = torch.randn(11, 8, dtype=torch.float64)
    seq = JaggedSequence(values, layout, make_timestamps(layout, 11))
    rows = torch.tensor([6, 10])
    got = ranker.score_rows(seq, rows)
    behind = JaggedLayout.from_lengths(torch.tensor([7, 4]), num_targets=torch.tensor([1, 1]), contextual_seq_len=1)
    assert close(got, ranker(replace(seq, layout=behind)))


def test_rows_are_not_scored_where_the_mask_would_tell() -> None:
    ranker = make_ranker(mask=AttentionMask(contextual_sees_history=True))
    seq = make_batch().history()
    with pytest.raises(ValueError, match="contextual_sees_history"):
        ranker.score_rows(seq, torch.tensor([3]))


def test_a_layout_without_targets_and_a_foreign_cache_are_refused() -> None:
    ranker, seq = make_ranker(), make_batch()
    with pytest.raises(ValueError, match="num_targets"):
        ranker(seq.history())
    cache = ranker.prefill(seq.history())
    with pytest.raises(ValueError, match="cache: expected 1 sequences"):
        ranker.decode(rows_of(seq.targets(), torch.tensor([0]), [1]), cache)


def test_an_untrained_head_predicts_the_means() -> None:
    head = MultiTaskHead(8, RANKING)
    torch.nn.init.zeros_(head.output.weight)
    head.start_from(torch.tensor([0.25, 3.5]))
    predicted = head.predictions(head(torch.randn(3, 8)))
    assert torch.allclose(predicted, torch.tensor([[0.25, 3.5]]).expand(3, 2))
    with pytest.raises(ValueError, match=r"means: expected \[2\]"):
        head.start_from(torch.zeros(3))


def test_gradients_reach_every_parameter() -> None:
    ranker = make_ranker().train()
    ranker(make_batch()).square().sum().backward()
    assert not [name for name, p in ranker.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ()}, "tasks: expected at least one"),
        ({"tasks": (TaskConfig(name="a"), TaskConfig(name="a"))}, "tasks: expected different names"),
        ({"tasks": ("click",)}, "tasks: expected a sequence of TaskConfig"),
        ({"tasks": (TaskConfig(name="a"),), "head_dims": (0,)}, "head_dims: expected an int >= 1"),
        ({"tasks": (TaskConfig(name="a"),), "head_dropout": 1.0}, "head_dropout"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankingConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "name"),
        ({"kind": "ordinal"}, "kind: expected one of binary, regression"),
        ({"weight": -1.0}, "weight"),
        ({"loss": "l1"}, "loss: expected one of mse, huber"),
        ({"huber_delta": 0}, "huber_delta"),
    ],
)
def test_wrong_tasks_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskConfig(**{"name": "click", **options})
