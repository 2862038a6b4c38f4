"""Baselines: same inputs, no leak, nothing of a batch's other windows, and a chance to learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from hstu_kernels import JaggedLayout
from hstu_plugin.ranking_baselines import DLRM, ItemMean, PooledAttention
from hstu_plugin.ranking_config import Categorical, RankingFeatures
from hstu_plugin.ranking_losses import multi_task_loss
from hstu_plugin.ranking_model import RankingBatch, WindowRanker

from .ranking_cases import RANKING, make_batch, make_features

FEATURES = make_features(series=(Categorical(name="city", num_ids=3),))


def pooled(features: RankingFeatures) -> WindowRanker:
    return PooledAttention(features, 8, RANKING, num_layers=2, num_heads=2, max_seq_len=40, dropout=0.0)


def dlrm(features: RankingFeatures) -> WindowRanker:
    return DLRM(features, 8, RANKING)


both = pytest.mark.parametrize("make", [dlrm, pooled])
Make = Callable[[RankingFeatures], WindowRanker]


def build(make: Make) -> WindowRanker:
    torch.manual_seed(0)
    model = make(FEATURES).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.eval()


@both
def test_a_score_depends_on_user_history_and_candidate_and_on_no_label(make: Make) -> None:
    model, batch = build(make), make_batch(FEATURES)
    scores = model(batch)
    assert scores.shape == (9, 2)
    acted = replace(batch.candidates, action_types=7 - batch.candidates.action_types.clamp(min=0))
    assert torch.equal(model.training_scores(replace(batch, candidates=acted)), scores)

    def changed(**parts: object) -> list[int]:
        return (model(replace(batch, **parts)) != scores).any(1).nonzero().flatten().tolist()

    items = batch.candidates.items.clone()
    items[2, 1] = (items[2, 1] + 1) % 6
    assert changed(candidates=replace(batch.candidates, items=items)) == [2]
    users = batch.users.clone()
    users[1, 0] = (users[1, 0] + 1) % 5
    assert changed(users=users) == [4, 5]
    types = batch.history.action_types.clone()
    types[3] = 7 - types[3].clamp(min=0)
    assert changed(history=replace(batch.history, action_types=types)) == [0, 1, 2, 3]


@both
def test_a_window_alone_scores_as_in_a_batch(make: Make) -> None:
    model, batch = build(make), make_batch(FEATURES)
    alone = RankingBatch(
        batch.history.take(torch.arange(9, 18), JaggedLayout.from_lengths(torch.tensor([9]))),
        batch.candidates.take(torch.arange(6, 9), JaggedLayout.from_lengths(torch.tensor([3]))),
        batch.users[3:],
        batch.labels[6:],
    )
    assert torch.allclose(model(alone), model(batch)[6:], rtol=1e-10, atol=1e-10)


def test_dlrm_reads_every_field_and_every_pair_of_them() -> None:
    model, batch = build(dlrm), make_batch(FEATURES)
    assert isinstance(model, DLRM)
    seen: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    model(batch)
    embedding, history, row = model.embedding, batch.history, 5  # a candidate of the window without history
    assert history.layout.seq_lengths[1] == 0
    fields = [torch.zeros(8, dtype=torch.float64)]
    fields += [embedding.users.table(k)[batch.users[1, k]] for k in range(2)]
    fields += [embedding.series.table(0)[0]]
    fields += [embedding.items.table(k)[batch.candidates.items[row, k]] for k in range(2)]
    products = [a @ b for i, a in enumerate(fields) for b in fields[i + 1 :]]
    assert torch.allclose(seen[0][row], torch.cat([*fields, torch.stack(products)]))
    # A window with history: the mean of its events, and the latest value of the series.
    events = embedding.item_vectors(history) + embedding.actions(history)
    assert torch.allclose(seen[0][0, :8], events[:6].mean(0))
    assert torch.equal(seen[0][0, 24:32], embedding.series.table(0)[history.series[5, 0]])


@both
def test_training_fits_the_labels(make: Make) -> None:
    torch.manual_seed(0)
    model, batch = make(FEATURES), make_batch(FEATURES)
    batch = replace(
        batch,
        labels=batch.labels.float(),
        history=replace(batch.history, intensities=batch.history.intensities.float()),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss, _ = multi_task_loss(model.training_scores(batch), batch.labels, RANKING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_item_means_are_drawn_towards_the_mean_of_all() -> None:
    model = ItemMean(FEATURES, RANKING)
    labels = torch.tensor([[1.0, 4.0], [0.0, torch.nan], [1.0, 2.0]])
    model.fit(torch.tensor([3, 3, 5]), labels)
    mean, prior = 2 / 3, ItemMean.prior_events
    assert model.means[3].tolist() == pytest.approx([(1 + prior * mean) / (2 + prior), (4 + prior * 3) / (1 + prior)])
    assert model.means[7].tolist() == pytest.approx([mean, 3.0])
    batch = make_batch(FEATURES)
    predicted = model.head.predictions(model(batch))
    assert torch.allclose(predicted, model.means[batch.candidates.items[:, 0]])
    assert not any(p.requires_grad for p in model.parameters())


def test_baselines_refuse_what_they_cannot_take() -> None:
    with pytest.raises(ValueError, match="form: expected summed"):
        DLRM(make_features(form="interleaved"), 8, RANKING)
    short = PooledAttention(FEATURES, 8, RANKING, num_layers=1, num_heads=1, max_seq_len=4, dropout=0.0)
    with pytest.raises(ValueError, match="history: expected at most 4 tokens"):
        short.double()(make_batch(FEATURES))
