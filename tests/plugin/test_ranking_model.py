"""Ranking models over windows: no score knows its own label, another candidate, or how it was computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hstu_kernels import AttentionMask, JaggedLayout
from hstu_plugin.config import Variant
from hstu_plugin.events import Events
from hstu_plugin.ranking_config import Categorical, RankingFeatures, TokenForm
from hstu_plugin.ranking_embedding import RankingEmbedding, with_targets
from hstu_plugin.ranking_model import RankingBatch, RankingModel
from hstu_plugin.sequence import JaggedSequence

from .ranking_cases import RANKING, make_batch, make_features, make_model

FORMS = {
    "summed": make_features(),
    "learned-no-action": make_features(learned_no_action=True),
    "interleaved": make_features(form="interleaved"),
    "series": make_features(series=(Categorical(name="city", num_ids=3), Categorical(name="device", num_ids=2))),
    "interleaved-series": make_features(form="interleaved", series=(Categorical(name="city", num_ids=3),)),
}
every_form = pytest.mark.parametrize("features", FORMS.values(), ids=FORMS.keys())
CANDIDATES = (4, 2, 0, 3)


def other_action(events: Events, row: int, *, seed: int = 5) -> Events:
    """The same events with another action at one row."""
    types, watched, contexts = events.action_types.clone(), events.intensities.clone(), events.action_contexts.clone()
    types[row] = 7 - types[row].clamp(min=0)
    watched[row] = 0.7 if not watched[row] > 0.6 else 0.2
    contexts[row] = (contexts[row] + 1) % 4
    return replace(events, action_types=types, intensities=watched, action_contexts=contexts)


def rows_that_know_their_own_action(model: RankingModel, batch: RankingBatch) -> list[int]:
    """Candidates whose training score differs in any bit when nothing but their own action is changed."""
    scores = model.training_scores(batch)
    found = []
    for row in range(scores.shape[0]):
        changed = replace(batch, candidates=other_action(batch.candidates, row))
        if not torch.equal(model.training_scores(changed)[row], scores[row]):
            found.append(row)
    return found


class LeakingEmbedding(RankingEmbedding):
    """What must not be: candidates that carry their action."""

    def candidates(self, events: Events) -> JaggedSequence:
        return events.as_sequence(self.item_vectors(events) + self.actions(events))

    def generative(
        self, history: Events, following: Events, users: Tensor | None = None
    ) -> tuple[JaggedSequence, Tensor]:
        seq, rows = super().generative(history, following, users)
        return seq, rows + 1  # the action's row in place of the item's


@every_form
@pytest.mark.parametrize("mask", [AttentionMask(), AttentionMask(max_attn_len=3, full_attn_tail_len=2)], ids=str)
def test_no_score_knows_its_own_action(features: RankingFeatures, mask: AttentionMask) -> None:
    model = make_model(features, mask=mask)
    assert rows_that_know_their_own_action(model, make_batch(features)) == []


@every_form
def test_the_leakage_test_notices_a_leak(features: RankingFeatures) -> None:
    model = make_model(features)
    model.embedding.__class__ = LeakingEmbedding
    assert rows_that_know_their_own_action(model, make_batch(features)) == list(range(9))


@every_form
def test_scores_in_use_know_no_candidate_but_their_own(features: RankingFeatures) -> None:
    model, batch = make_model(features), make_batch(features)
    scores = model(batch)
    for row in range(9):
        items = batch.candidates.items.clone()
        items[row] = (items[row] + 1) % 5
        changed = other_action(replace(batch.candidates, items=items), row)
        difference = (model(replace(batch, candidates=changed)) != scores).any(1)
        assert difference.nonzero().flatten().tolist() == [row]


def test_interleaved_training_knows_the_actions_before_and_none_after() -> None:
    features = FORMS["interleaved"]
    model, batch = make_model(features), make_batch(features)
    scores = model.training_scores(batch)
    changed = replace(batch, candidates=other_action(batch.candidates, 1))
    difference = (model.training_scores(changed) != scores).any(1)
    # The first window has candidates 0 to 3.
    assert difference.nonzero().flatten().tolist() == [2, 3]


@pytest.mark.parametrize("name", ["interleaved", "interleaved-series"])
def test_interleaved_training_scores_the_first_candidate_as_in_use(name: str) -> None:
    features = FORMS[name]
    model, batch = make_model(features, row_time="event"), make_batch(features)
    first = torch.tensor([0, 4, 6])
    assert torch.allclose(model.training_scores(batch)[first], model(batch)[first], rtol=1e-10, atol=1e-10)
    # And a later one as in use behind the events before it.
    history = Events(
        *[
            getattr(batch.history, name) if name == "layout" else torch.cat([old[:6], new[:3], old[6:]])
            for name in Events.__slots__
            for old, new in [(getattr(batch.history, name), getattr(batch.candidates, name))]
        ]
    )
    history = replace(history, layout=JaggedLayout.from_lengths(torch.tensor([9, 0, 3, 9])))
    if features.series:
        # Training takes no series values from the candidates: they repeat the last one.
        history.series[6:9] = history.series[5]
    later = batch.candidates.take(torch.tensor([3]), JaggedLayout.from_lengths(torch.tensor([1, 0, 0, 0])))
    seq = model.embedding.scoring(history, later, batch.users)
    assert torch.allclose(model.ranker(seq)[0], model.training_scores(batch)[3], rtol=1e-10, atol=1e-10)


@every_form
@pytest.mark.parametrize("variant", [Variant.RESEARCH, Variant.ULTRA], ids=str)
def test_cached_scores_equal_the_full_forward(features: RankingFeatures, variant: Variant) -> None:
    model, batch = make_model(features, variant=variant), make_batch(features)
    embedding, ranker = model.embedding, model.ranker
    cache = ranker.prefill(embedding.history(batch.history, batch.users))
    full = model(batch)
    assert torch.allclose(ranker.decode(embedding.candidates(batch.candidates), cache), full, rtol=1e-10, atol=1e-10)
    for row, owner in enumerate([0, 0, 0, 0, 1, 1, 3, 3, 3]):
        counts = torch.zeros(4, dtype=torch.int64)
        counts[owner] = 1
        one = batch.candidates.take(torch.tensor([row]), JaggedLayout.from_lengths(counts))
        bare = Events.without_actions(one.layout, one.items, one.timestamps)
        got = ranker.decode(embedding.candidates(bare), cache)
        assert torch.allclose(got[0], full[row], rtol=1e-10, atol=1e-10)


def test_summed_training_is_use_and_reads_no_action_of_a_candidate() -> None:
    model, batch = make_model(FORMS["summed"]), make_batch(FORMS["summed"])
    bare = Events.without_actions(batch.candidates.layout, batch.candidates.items, batch.candidates.timestamps)
    assert torch.equal(model.training_scores(batch), model(replace(batch, candidates=bare)))
    with pytest.raises(ValueError, match="form: expected interleaved"):
        model.embedding.generative(batch.history, batch.candidates)


@every_form
def test_gradients_reach_every_parameter(features: RankingFeatures) -> None:
    model = make_model(features).train()
    model.training_scores(make_batch(features)).square().sum().backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert unused == set()


def test_targets_stand_behind_their_own_history() -> None:
    history = JaggedSequence(torch.arange(5), JaggedLayout.from_lengths(torch.tensor([3, 0, 2])))
    targets = JaggedSequence(torch.arange(10, 13), JaggedLayout.from_lengths(torch.tensor([1, 2, 0])))
    joined = with_targets(history, targets)
    assert joined.values.tolist() == [0, 1, 2, 10, 11, 12, 3, 4]
    assert joined.layout.seq_lengths.tolist() == [4, 2, 2]
    assert joined.layout.num_targets is not None and joined.layout.num_targets.tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="without targets"):
        with_targets(joined, targets)


def test_a_batch_that_does_not_fit_is_refused() -> None:
    batch = make_batch(FORMS["summed"])
    with pytest.raises(ValueError, match=r"labels: expected \[9, tasks\]"):
        replace(batch, labels=batch.labels[:3])
    with pytest.raises(ValueError, match="expected 4 windows"):
        replace(batch, users=batch.users[:2])


def test_form_is_read_from_text() -> None:
    assert make_features(form="interleaved").form is TokenForm.INTERLEAVED


@every_form
def test_the_head_may_see_the_users_features(features: RankingFeatures) -> None:
    plain = make_model(features)
    torch.manual_seed(0)
    model = RankingModel(features, plain.ranker.config, RANKING, head_users=True).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.7)
    batch = make_batch(features)
    context = model.context(batch.users)
    assert context is not None and context.shape == (4, 2 * 8)
    full = model(batch)
    # The same in cached scoring, and each window reads its own users' row.
    cache = model.ranker.prefill(model.embedding.history(batch.history, batch.users))
    targets = model.embedding.candidates(batch.candidates)
    cached = model.ranker.decode(targets, cache, context)
    assert torch.allclose(cached, full, rtol=1e-10, atol=1e-10)
    owners = [0, 0, 0, 0, 1, 1, 3, 3, 3]
    for window in range(4):
        moved = context.clone()
        moved[window] += 1.0
        differs = (model.ranker.decode(targets, cache, moved) != cached).any(1).tolist()
        assert differs == [owner == window for owner in owners]
    assert rows_that_know_their_own_action(model, batch) == []
    with pytest.raises(ValueError, match=r"context: expected \[B, 16\], got None"):
        model.ranker.decode(targets, cache)
    with pytest.raises(ValueError, match="context: expected None, as the ranker has none"):
        plain.ranker(plain.embedding.scoring(batch.history, batch.candidates, batch.users), context)
