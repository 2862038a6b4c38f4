"""Actions in the TorchRec ranker: channels of a mixture against the core, cached scoring, and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hstu_kernels import JaggedLayout
from hstu_plugin.adapters.torchrec import (
    FeatureSchema,
    HSTURankingModel,
    HSTURankingTask,
    SequenceBatch,
    Table,
    check_batch,
    keyed_jagged,
)
from hstu_plugin.adapters.torchrec.channel import Channel
from hstu_plugin.adapters.torchrec.schema import ActionColumns
from hstu_plugin.adapters.torchrec.score import score_batch
from hstu_plugin.events import Events
from hstu_plugin.mfalcon import MFalconRanker
from hstu_plugin.ranking_config import Categorical, Intensity, RankingFeatures
from hstu_plugin.ranking_embedding import RankingEmbedding

from .cases import ITEMS, NOW, TASKS, config, unit_tables

ACTIONS = ActionColumns(
    names=("click", "like", "share"),
    intensities=(Intensity(name="watched", boundaries=(0.3, 0.7)),),
    contexts=(Categorical(name="page", num_ids=4),),
)
SCHEMA = FeatureSchema(
    contextual=("age",),
    candidate="candidate",
    candidate_time="candidate_time",
    actions=ACTIONS,
    tables=(
        Table(name="item", num_embeddings=ITEMS, features=("item_id", "candidate")),
        Table(name="user", num_embeddings=20, features=("age",)),
    ),
)
CHANNELS = {
    "all": Channel(config=config(num_layers=1)),
    "engaged": Channel(config=config(num_layers=2, variant="ultra"), actions=("like", "share")),
}
LENGTHS, ASKED = (5, 0, 9, 1), (2, 1, 0, 3)


def model(**changes: Any) -> HSTURankingModel:
    torch.manual_seed(0)
    made = HSTURankingModel(config(), SCHEMA, TASKS, **changes).eval()
    with torch.no_grad():
        for weight in [*made.embeddings.parameters(), *made.head.events.parameters()]:
            weight.normal_(std=0.5)
        unit_tables(made.head.core)
    return made


def batch() -> SequenceBatch:
    draw = torch.Generator().manual_seed(1)

    def ids(low: int, high: int, counts: tuple[int, ...]) -> list[torch.Tensor]:
        return [torch.randint(low, high, (n,), generator=draw) for n in counts]

    features = {"item_id": ids(1, ITEMS, LENGTHS), "age": ids(0, 20, (1,) * 4), "candidate": ids(1, ITEMS, ASKED)}
    numbers = {
        "time": [NOW + some.cumsum(0) for some in ids(1, 300, LENGTHS)],
        "candidate_time": [NOW + 9000 + torch.arange(n) for n in ASKED],
        "action_types": ids(-1, 8, LENGTHS),
        "page": ids(0, 4, LENGTHS),
    }
    watched = [torch.rand(n, generator=draw) for n in LENGTHS]
    watched[0][1] = torch.nan
    labels = torch.rand(sum(ASKED), 2, generator=draw).round()
    measures = keyed_jagged({"watched": watched}, dtype=torch.float32)
    return SequenceBatch(keyed_jagged(features), keyed_jagged(numbers), labels, measures)


def core_scores(made: HSTURankingModel, given: SequenceBatch) -> torch.Tensor:
    """Through the core's own embedding, with the events of each channel picked by hand."""
    features = RankingFeatures(
        items=(Categorical(name="item", num_ids=ITEMS),),
        action_types=ACTIONS.names,
        intensities=ACTIONS.intensities,
        action_contexts=ACTIONS.contexts,
        users=(Categorical(name="age", num_ids=20),),
    )
    embedding = RankingEmbedding(features, 8).eval()
    with torch.no_grad():
        embedding.items.table(0).copy_(made.embeddings.embeddings["item"].weight)
        embedding.users.table(0).copy_(made.embeddings.embeddings["user"].weight)
        embedding.actions.load_state_dict(made.head.events.actions.state_dict())
    numbers = given.numbers
    types = numbers["action_types"].values()
    owners = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    candidates = Events.without_actions(
        JaggedLayout.from_lengths(torch.tensor(ASKED)),
        given.features["candidate"].values()[:, None],
        numbers["candidate_time"].values(),
    )
    histories = {}
    for name, wanted in (("all", None), ("engaged", 0b110)):
        rows = [r for r in range(types.numel()) if wanted is None or (types[r] >= 0 and int(types[r]) & wanted)]
        some = torch.tensor(rows)
        events = Events(
            JaggedLayout.from_lengths(torch.bincount(owners[some], minlength=4)),
            given.features["item_id"].values()[some, None],
            numbers["time"].values()[some],
            types[some],
            given.measures["watched"].values()[some, None],
            numbers["page"].values()[some, None],
            torch.zeros(len(rows), 0, dtype=torch.int64),
        )
        histories[name] = embedding.history(events, given.features["age"].values()[:, None])
    return made.head.core(histories, embedding.candidates(candidates))


def test_channels_read_their_own_events() -> None:
    made, given = model(mixture=CHANNELS), batch()
    check_batch(given, SCHEMA, num_tasks=2)
    scores = made(given.features, given.numbers, given.measures)
    assert scores.shape == (sum(ASKED), 2) and scores.std() > 0.01
    torch.testing.assert_close(scores, core_scores(made, given))
    loss, (_, rows) = HSTURankingTask(made)(given)
    loss.backward()
    assert rows == 12 and all(p.grad is not None for p in made.head.parameters())


@pytest.mark.parametrize("mixture", [None, CHANNELS], ids=["one", "mixture"])
def test_cached_scores_are_the_forwards(mixture: dict[str, Channel] | None) -> None:
    made, given = model(mixture=mixture), batch()
    falcon = MFalconRanker(made.head.core, micro_batch_size=2)
    wanted = made.head.core.head.predictions(made(given.features, given.numbers, given.measures))
    torch.testing.assert_close(score_batch(made, falcon, given), wanted)


@pytest.mark.parametrize(
    ("schema", "channels", "message"),
    [
        (SCHEMA, {"a": Channel(config=config(), actions=("buy",))}, r"mixture\.a\.actions: unknown types \['buy'\]"),
        (SCHEMA, {"a": Channel(config=config(embedding_dim=16))}, r"mixture\.a: expected embedding_dim 8"),
        (replace(SCHEMA, actions=None), CHANNELS, r"expected schema\.actions, got None"),
        (replace(SCHEMA, actions=replace(ACTIONS, form="interleaved")), CHANNELS, "form summed, got interleaved"),
    ],
)
def test_channels_that_do_not_fit(schema: FeatureSchema, channels: dict[str, Channel], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HSTURankingModel(config(), schema, TASKS, mixture=channels)


def test_actions_out_of_bounds_and_missing_are_named() -> None:
    given = batch()
    with pytest.raises(ValueError, match="measure key 'watched'"):
        check_batch(replace(given, measures=None), SCHEMA)
    given.numbers["page"].values()[3] = 4
    with pytest.raises(ValueError, match=r"number key 'page': expected values in \[0, 3\], got 4"):
        check_batch(given, SCHEMA)
    given.numbers["page"].values()[3] = 0
    given.numbers["action_types"].values()[0] = 8
    with pytest.raises(ValueError, match=r"number key 'action_types': expected values in \[-1, 7\], got 8"):
        check_batch(given, SCHEMA)
