"""Small ranking inputs shared by the tests."""

from __future__ import annotations

from typing import Any

import torch

from hstu_kernels import JaggedLayout
from hstu_plugin.config import HSTUConfig
from hstu_plugin.events import Events
from hstu_plugin.ranking_config import Categorical, Intensity, RankingConfig, RankingFeatures, TaskConfig, TaskKind
from hstu_plugin.ranking_model import RankingBatch, RankingModel

RANKING = RankingConfig(
    tasks=(TaskConfig(name="click"), TaskConfig(name="rating", kind=TaskKind.REGRESSION)), head_dims=(7,)
)


def make_features(**options: Any) -> RankingFeatures:
    return RankingFeatures(
        **{
            "items": (Categorical(name="item", num_ids=20), Categorical(name="author", num_ids=6)),
            "action_types": ("click", "like", "share"),
            "intensities": (Intensity(name="watched", boundaries=(0.1, 0.5, 1.0)),),
            "action_contexts": (Categorical(name="page", num_ids=4),),
            "users": (Categorical(name="age", num_ids=5), Categorical(name="region", num_ids=3)),
            **options,
        }
    )


def make_events(lengths: list[int], features: RankingFeatures, *, seed: int = 0, start: int = 10_000) -> Events:
    """Random events; each user's times rise by 1 to 600 s."""
    random = torch.Generator().manual_seed(seed)
    layout = JaggedLayout.from_lengths(torch.tensor(lengths, dtype=torch.int64))
    rows = sum(lengths)

    def ids(columns: tuple[Categorical, ...]) -> torch.Tensor:
        drawn = [torch.randint(0, c.num_ids, (rows,), generator=random) for c in columns]
        return torch.stack(drawn, 1) if drawn else torch.zeros(rows, 0, dtype=torch.int64)

    steps = torch.randint(1, 600, (rows,), generator=random)
    times = torch.cat([start + own.cumsum(0) for own in steps.split(lengths)]) if rows else steps
    watched = torch.rand(rows, len(features.intensities), generator=random, dtype=torch.float64) * 1.5
    watched[torch.rand(watched.shape, generator=random) < 0.2] = torch.nan
    types = torch.randint(-1, 1 << len(features.action_types), (rows,), generator=random)
    return Events(
        layout, ids(features.items), times, types, watched, ids(features.action_contexts), ids(features.series)
    )


def make_batch(features: RankingFeatures, *, seed: int = 0) -> RankingBatch:
    """Four windows, one without history, one without candidates."""
    history = make_events([6, 0, 3, 9], features, seed=seed)
    candidates = make_events([4, 2, 0, 3], features, seed=seed + 1, start=20_000)
    random = torch.Generator().manual_seed(seed + 2)
    users = torch.stack([torch.randint(0, c.num_ids, (4,), generator=random) for c in features.users], 1)
    return RankingBatch(history, candidates, users, torch.rand(9, 2, generator=random).round())


def make_model(features: RankingFeatures, **options: Any) -> RankingModel:
    torch.manual_seed(0)
    config = {"embedding_dim": 8, "num_heads": 2, "num_layers": 2, "max_seq_len": 40, "dropout": 0.0, **options}
    model = RankingModel(features, HSTUConfig(**config), RANKING).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.7)
    return model.eval()
