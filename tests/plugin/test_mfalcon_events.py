"""M-FALCON behind the ranking model's own tokens: events in, cached scores out."""

from __future__ import annotations

import pytest
import torch

from hstu_kernels import JaggedLayout
from hstu_plugin.config import HSTUConfig
from hstu_plugin.events import Events
from hstu_plugin.mfalcon import MFalconRanker
from hstu_plugin.ranking_config import Categorical, RankingConfig, RankingFeatures, TaskConfig, TokenForm
from hstu_plugin.ranking_embedding import with_targets
from hstu_plugin.ranking_model import RankingModel

from .mfalcon_cases import ready, same

WHOLE, BEFORE, CANDIDATES = (9, 4, 6), (5, 4, 1), (3, 0, 4)


def make_events(lengths: tuple[int, ...], seed: int, day: int) -> Events:
    total = sum(lengths)
    generator = torch.Generator().manual_seed(seed)
    none = torch.zeros(total, 0, dtype=torch.int64)
    return Events(
        JaggedLayout.from_lengths(torch.tensor(lengths)),
        torch.randint(1, 20, (total, 1), generator=generator),
        1_600_000_000 + 86_400 * day + torch.randint(1, 5000, (total,), generator=generator).cumsum(0),
        torch.randint(0, 4, (total,), generator=generator),
        torch.zeros(total, 0),
        none,
        none,
    )


def part(events: Events, first: tuple[int, ...], last: tuple[int, ...]) -> Events:
    starts = events.layout.seq_offsets.tolist()
    rows = [torch.arange(s + a, s + b) for s, a, b in zip(starts, first, last, strict=False)]
    lengths = torch.tensor([b - a for a, b in zip(first, last, strict=True)])
    return events.take(torch.cat(rows), JaggedLayout.from_lengths(lengths))


@pytest.mark.parametrize("form", list(TokenForm), ids=str)
def test_events_appended_to_a_cache_score_as_one_forward(form: TokenForm) -> None:
    features = RankingFeatures(
        items=(Categorical(name="item", num_ids=20),),
        action_types=("click", "like"),
        users=(Categorical(name="country", num_ids=5), Categorical(name="language", num_ids=4)),
        form=form,
    )
    config = HSTUConfig(embedding_dim=8, num_heads=2, num_layers=3, max_seq_len=24, dropout=0.1)
    ranking = RankingConfig(tasks=(TaskConfig(name="click"), TaskConfig(name="like")))
    torch.manual_seed(0)
    model: RankingModel = ready(RankingModel(features, config, ranking))
    events, candidates = make_events(WHOLE, 1, 0), make_events(CANDIDATES, 2, 90)
    users = torch.tensor([[1, 2], [3, 0], [4, 3]])
    tokens = model.embedding
    with torch.no_grad():
        asked = tokens.candidates(candidates)
        expected = model.ranker(with_targets(tokens.history(events, users), asked))
        scorer = MFalconRanker(model.ranker, micro_batch_size=2)
        cache = scorer.new_cache(contextual_seq_len=2, page_size=4)
        scorer.prefill(cache, ["ann", "bob", "cid"], tokens.history(part(events, (0, 0, 0), BEFORE), users))
        scorer.append(cache, ["ann", "bob", "cid"], tokens.history(part(events, BEFORE, WHOLE)))
        assert same(scorer.score_cached(cache, ["ann", "bob", "cid"], asked), expected)
        # The label of a candidate is nowhere in its score.
        shuffled = candidates.take(torch.arange(sum(CANDIDATES)), candidates.layout)
        shuffled.action_types.copy_(shuffled.action_types.flip(0) ^ 3)
        again = scorer.score_cached(cache, ["ann", "bob", "cid"], tokens.candidates(shuffled))
        assert torch.equal(again, scorer.score_cached(cache, ["ann", "bob", "cid"], asked))
