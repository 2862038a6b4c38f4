"""Small models and batches."""

from __future__ import annotations

import torch

from hstu_plugin.adapters.torchrec import (
    FeatureSchema,
    HSTURankingModel,
    HSTURetrievalModel,
    SequenceBatch,
    Table,
    keyed_jagged,
)
from hstu_plugin.config import HSTUConfig, RetrievalConfig
from hstu_plugin.ranking_config import RankingConfig, TaskConfig

ITEMS = 40
NOW = 1_700_000_000
RETRIEVAL = FeatureSchema(
    side=("kind",),
    candidate="candidate",
    negative="negative",
    request_time="asked_at",
    tables=(
        Table(name="item", num_embeddings=ITEMS, features=("item_id", "candidate", "negative")),
        Table(name="kind", num_embeddings=5, features=("kind",)),
    ),
)


def config(**changes: object) -> HSTUConfig:
    return HSTUConfig(**{"embedding_dim": 8, "num_heads": 2, "max_seq_len": 12, "dropout": 0.0, **changes})


def retrieval_model(**changes: object) -> HSTURetrievalModel:
    torch.manual_seed(0)
    model = HSTURetrievalModel(
        config(**changes), RETRIEVAL, RetrievalConfig(loss="sampled_softmax", num_negatives=8, temperature=0.2)
    )
    with torch.no_grad():
        # Unit-scale weights: near-zero embeddings would hide errors.
        for weight in model.embeddings.parameters():
            weight.normal_(std=0.5)
        unit_tables(model.head.core.encoder)
    return model


def unit_tables(encoder: torch.nn.Module) -> None:
    """Relative bias tables of unit scale."""
    with torch.no_grad():
        for name, table in encoder.named_parameters():
            if name.endswith(("pos_table", "time_table")):
                table.normal_()


def retrieval_batch(lengths: tuple[int, ...] = (3, 0, 7, 1), seed: int = 0) -> SequenceBatch:
    draw = torch.Generator().manual_seed(seed)

    def ids(high: int, count: int) -> torch.Tensor:
        return torch.randint(1, high, (count,), generator=draw)

    def times(count: int) -> torch.Tensor:
        return NOW + torch.randint(1, 300, (count,), generator=draw).cumsum(0)

    features = {
        "item_id": [ids(ITEMS, n) for n in lengths],
        "kind": [ids(5, n) for n in lengths],
        "candidate": [ids(ITEMS, 2 + b % 3) for b in range(len(lengths))],
        "negative": [ids(ITEMS, 8 if b == 0 else 0) for b in range(len(lengths))],
    }
    numbers = {
        "time": [times(n) for n in lengths],
        "asked_at": [torch.tensor([NOW + 100_000 + b]) for b in range(len(lengths))],
    }
    return SequenceBatch(keyed_jagged(features), keyed_jagged(numbers))


RANKING = FeatureSchema(
    side=("action",),
    contextual=("age", "tags"),
    candidate="candidate",
    candidate_time="candidate_time",
    tables=(
        Table(name="item", num_embeddings=ITEMS, features=("item_id", "candidate")),
        Table(name="action", num_embeddings=8, features=("action",)),
        Table(name="user", num_embeddings=20, features=("age", "tags")),
    ),
)
TASKS = RankingConfig(
    tasks=(TaskConfig(name="click"), TaskConfig(name="watch", kind="regression", weight=0.5)), head_dims=(8,)
)


def ranking_model(**changes: object) -> HSTURankingModel:
    torch.manual_seed(0)
    model = HSTURankingModel(config(**changes), RANKING, TASKS)
    with torch.no_grad():
        for weight in model.embeddings.parameters():
            weight.normal_(std=0.5)
        unit_tables(model.head.core.encoder)
    return model


def ranking_batch(lengths: tuple[int, ...] = (3, 0, 7, 1), seed: int = 0) -> SequenceBatch:
    draw = torch.Generator().manual_seed(seed)
    asked = [(2 + b) % 4 for b in range(len(lengths))]

    def ids(high: int, count: int) -> torch.Tensor:
        return torch.randint(1, high, (count,), generator=draw)

    times = [NOW + torch.randint(1, 300, (n,), generator=draw).cumsum(0) for n in lengths]
    features = {
        "item_id": [ids(ITEMS, n) for n in lengths],
        "action": [ids(8, n) for n in lengths],
        "age": [ids(20, 1) for _ in lengths],
        "tags": [ids(20, b % 3) for b in range(len(lengths))],
        "candidate": [ids(ITEMS, n) for n in asked],
    }
    numbers = {
        "time": times,
        "candidate_time": [NOW + 9000 + torch.arange(n) for n in asked],
    }
    labels = torch.rand(sum(asked), 2, generator=draw)
    labels[:, 0] = labels[:, 0].round()
    labels[0, 1] = torch.nan
    return SequenceBatch(keyed_jagged(features), keyed_jagged(numbers), labels)
