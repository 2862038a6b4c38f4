"""Mixture of transducers over windows: which events a channel sees, exact scores, no leak."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hstu_plugin.config import HSTUConfig
from hstu_plugin.mfalcon import MFalconRanker
from hstu_plugin.ranking_embedding import with_targets
from hstu_plugin.ranking_mixture import Channel, MixtureModel

from .ranking_cases import RANKING, make_batch, make_events, make_features
from .test_ranking_model import other_action

FEATURES = make_features()
ENGAGED = Channel(actions=("like", "share"), max_events=2)


def make_model() -> MixtureModel:
    torch.manual_seed(0)
    common: dict[str, Any] = {"embedding_dim": 8, "num_heads": 2, "max_seq_len": 40, "dropout": 0.0, "time_bias": True}
    channels = {
        "all": (Channel(), HSTUConfig(num_layers=2, variant="ultra", **common)),
        "engaged": (ENGAGED, HSTUConfig(num_layers=1, **common)),
    }
    model = MixtureModel(FEATURES, channels, RANKING).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.7)
    return model.eval()


def test_a_channel_sees_the_latest_events_with_its_actions() -> None:
    events = make_events([5, 0, 2], FEATURES)
    # Bits: click 1, like 2, share 4; -1 where nobody knows.
    events.action_types[:] = torch.tensor([2, 4, 1, -1, 6, 0, 3])
    seen = ENGAGED.select(events, FEATURES)
    assert seen.layout.seq_lengths.tolist() == [2, 0, 1]
    assert torch.equal(seen.items, events.items[[1, 4, 6]])
    assert seen.timestamps is not None and events.timestamps is not None
    assert torch.equal(seen.timestamps, events.timestamps[[1, 4, 6]])
    everything = Channel().select(events, FEATURES)
    assert torch.equal(everything.items, events.items)
    assert Channel(max_events=3).select(events, FEATURES).layout.seq_lengths.tolist() == [3, 0, 2]


def test_scores_are_the_head_over_each_channels_own_rows() -> None:
    model, batch = make_model(), make_batch(FEATURES)
    candidates = model.embedding.candidates(batch.candidates)
    rows = []
    for name, transducer in model.ranker.mixture.transducers().items():
        events = model.channels[name].select(batch.history, FEATURES)
        tokens = model.embedding.history(events, batch.users)
        rows.append(transducer(with_targets(tokens, candidates)).targets().values)
    assert torch.allclose(model(batch), model.head(torch.cat(rows, 1)), rtol=1e-10, atol=1e-10)


def test_m_falcon_scores_the_same() -> None:
    model, batch = make_model(), make_batch(FEATURES)
    falcon = MFalconRanker(model.ranker, micro_batch_size=2)
    got = falcon.score(model.histories(batch.history, batch.users), model.embedding.candidates(batch.candidates))
    assert torch.allclose(got, model(batch), rtol=1e-10, atol=1e-10)


def test_no_score_knows_an_action_of_a_candidate() -> None:
    model, batch = make_model(), make_batch(FEATURES)
    scores = model.training_scores(batch)
    for row in range(9):
        changed = replace(batch, candidates=other_action(batch.candidates, row))
        assert torch.equal(model.training_scores(changed), scores)


def test_gradients_reach_every_parameter() -> None:
    model = make_model().train()
    model.training_scores(make_batch(FEATURES)).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0} == set()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"actions: expected names of action types \(click, like, share\), got 'buy'"):
        Channel(actions=("buy",)).select(make_events([2], FEATURES), FEATURES)
    with pytest.raises(ValueError, match="max_events: expected an int >= 1, got 0"):
        Channel(max_events=0)
    interleaved = make_features(form="interleaved")
    with pytest.raises(ValueError, match="form: expected summed for a mixture"):
        MixtureModel(interleaved, {"all": (Channel(), HSTUConfig())}, RANKING)
