"""Tokens of a ranker: what an action's vector is made of, where tokens stand, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hstu_kernels import JaggedLayout
from hstu_plugin.events import Events, check_ids, join_events
from hstu_plugin.ranking_config import Categorical, Intensity, RankingFeatures
from hstu_plugin.ranking_embedding import ActionEncoder, RankingEmbedding

from .ranking_cases import make_events, make_features


def one_event(**columns: Any) -> Events:
    given = {
        "layout": JaggedLayout.from_lengths(torch.tensor([1])),
        "items": torch.tensor([[1, 2]]),
        "timestamps": torch.tensor([7]),
        "action_types": torch.tensor([0]),
        "intensities": torch.tensor([[torch.nan]]),
        "action_contexts": torch.tensor([[0]]),
        "series": torch.zeros(1, 0, dtype=torch.int64),
    }
    return Events(**{**given, **columns})


def make_encoder() -> ActionEncoder:
    torch.manual_seed(0)
    encoder = ActionEncoder(make_features(), 4)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_()
    return encoder


@pytest.mark.parametrize(
    ("bits", "watched", "bucket"),
    [(0b000, torch.nan, 0), (0b001, 0.0, 1), (0b101, 0.1, 2), (0b110, 0.49, 2), (0b111, 0.5, 3), (0b010, 9.0, 4)],
)
def test_an_action_is_the_sum_of_its_bits_bucket_and_context(bits: int, watched: float, bucket: int) -> None:
    encoder = make_encoder()
    event = one_event(
        action_types=torch.tensor([bits]), intensities=torch.tensor([[watched]]), action_contexts=torch.tensor([[3]])
    )
    expected = encoder.shown + encoder.intensities.table(0)[bucket] + encoder.contexts.table(0)[3]
    for place in range(3):
        if bits >> place & 1:
            expected = expected + encoder.types[place]
    assert torch.allclose(encoder(event)[0], expected, atol=1e-6)


def test_an_unknown_action_is_a_row_of_its_own_and_no_reaction_is_another() -> None:
    encoder = make_encoder()
    unknown = encoder(one_event(action_types=torch.tensor([-1]), intensities=torch.tensor([[3.0]])))[0]
    assert torch.equal(unknown, encoder.unknown)
    assert not torch.equal(encoder(one_event())[0], encoder.unknown)


def test_actions_without_any_feature_still_differ_from_candidates() -> None:
    features = RankingFeatures(items=(Categorical(name="item", num_ids=3),))
    embedding = RankingEmbedding(features, 4)
    events = make_events([2], features)
    assert not torch.equal(embedding.history(events).values, embedding.candidates(events).values)


def test_summed_tokens() -> None:
    features = make_features()
    embedding, events = RankingEmbedding(features, 8), make_events([3, 0, 2], features)
    tokens = embedding.history(events, torch.tensor([[1, 1], [2, 0], [4, 2]]))
    assert tokens.layout.seq_lengths.tolist() == [5, 2, 4] and tokens.layout.contextual_seq_len == 2
    expected = embedding.item_vectors(events) + embedding.actions(events)
    assert torch.equal(tokens.values[[2, 3, 4, 9, 10]], expected)
    assert torch.equal(tokens.values[6], embedding.users.table(1)[0])
    assert tokens.timestamps is not None and events.timestamps is not None
    assert tokens.timestamps[[0, 1, 5, 6, 7, 8]].tolist() == [0] * 6
    assert torch.equal(tokens.timestamps[[2, 3, 4, 9, 10]], events.timestamps)
    # New events of a cached history bring no contextual tokens.
    assert torch.equal(embedding.history(events).values, expected)
    items = embedding.items
    summed = items.table(0)[events.items[:, 0]] + items.table(1)[events.items[:, 1]]
    assert torch.equal(embedding.candidates(events).values, summed)


def test_the_learned_row_stands_for_a_candidates_action() -> None:
    features = make_features(learned_no_action=True)
    embedding, events = RankingEmbedding(features, 8), make_events([3], features)
    assert embedding.no_action is not None
    torch.nn.init.normal_(embedding.no_action)
    expected = embedding.item_vectors(events) + embedding.no_action
    assert torch.equal(embedding.candidates(events).values, expected)


def test_interleaved_tokens() -> None:
    features = make_features(form="interleaved")
    embedding, events = RankingEmbedding(features, 8), make_events([2, 1], features)
    tokens = embedding.history(events)
    assert tokens.layout.seq_lengths.tolist() == [4, 2]
    assert torch.equal(tokens.values[0::2], embedding.item_vectors(events))
    assert torch.equal(tokens.values[1::2], embedding.actions(events))
    assert tokens.timestamps is not None and events.timestamps is not None
    assert torch.equal(tokens.timestamps, events.timestamps.repeat_interleave(2))


def test_slow_series_stand_before_the_event_that_first_has_them() -> None:
    features = make_features(series=(Categorical(name="city", num_ids=3),))
    embedding, events = RankingEmbedding(features, 8), make_events([4, 2], features)
    events.series[:, 0] = torch.tensor([1, 1, 2, 2, 2, 1])
    tokens = embedding.history(events)
    main, city = embedding.item_vectors(events) + embedding.actions(events), embedding.series.table(0)
    expected = torch.stack([city[1], main[0], main[1], city[2], main[2], main[3], city[2], main[4], city[1], main[5]])
    assert torch.equal(tokens.values, expected)
    assert tokens.layout.seq_lengths.tolist() == [6, 4]


def test_joined_events_keep_every_column() -> None:
    features = make_features(series=(Categorical(name="city", num_ids=3),))
    history, following = make_events([2, 0, 1], features), make_events([1, 2, 0], features, seed=1, start=20_000)
    joined, places = join_events(history, following)
    assert joined.layout.seq_lengths.tolist() == [3, 2, 1] and places.tolist() == [2, 3, 4]
    for name in ("items", "timestamps", "action_types", "intensities", "action_contexts", "series"):
        old, new, got = (getattr(events, name) for events in (history, following, joined))
        assert torch.equal(got.nan_to_num(-5), torch.cat([old[:2], new, old[2:]]).nan_to_num(-5))


def test_columns_that_do_not_fit_are_named() -> None:
    features = make_features()
    embedding, events = RankingEmbedding(features, 8), make_events([3], features)
    with pytest.raises(ValueError, match="items: expected 2 columns"):
        embedding.candidates(replace(events, items=events.items[:, :1]))
    with pytest.raises(ValueError, match="intensities: expected 1 columns"):
        embedding.history(replace(events, intensities=events.intensities[:, :0]))
    with pytest.raises(ValueError, match=r"users: expected \[B, 2\]"):
        embedding.contextual(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="users: expected 1 rows"):
        embedding.history(events, torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="action_types: expected 1-D int64 with 3 rows"):
        replace(events, action_types=events.action_types.float())
    with pytest.raises(ValueError, match="intensities: expected"):
        replace(events, intensities=events.intensities.long())
    with pytest.raises(ValueError, match=r"items: expected ids of author in \[0, 6\), got 6 to 7"):
        check_ids("items", torch.tensor([[3, 6], [1, 7]]), features.items)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"items": ()}, "items: expected at least one"),
        ({"action_types": ("a", "a")}, "action_types: expected different names"),
        ({"action_types": tuple(map(str, range(63)))}, "action_types: expected at most 62"),
        ({"form": "stacked"}, "form: expected one of summed, interleaved"),
        ({"form": "interleaved", "learned_no_action": True}, "learned_no_action: expected False"),
        ({"users": ("age",)}, "users: expected a sequence of Categorical"),
    ],
)
def test_wrong_features_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_features(**options)


@pytest.mark.parametrize("boundaries", [(), (1.0, 1.0), (2.0, 1.0), (float("nan"),), 3.0])
def test_boundaries_must_rise(boundaries: Any) -> None:
    with pytest.raises(ValueError, match="boundaries: expected one or more rising finite numbers"):
        Intensity(name="watched", boundaries=boundaries)
