"""Small models and batches."""

from __future__ import annotations

import torch

from hstu_plugin.adapters.torchrec import FeatureSchema, HSTURetrievalModel, SequenceBatch, Table, keyed_jagged
from hstu_plugin.config import HSTUConfig, RetrievalConfig

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
