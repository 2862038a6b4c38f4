"""Names: which keys of a KeyedJaggedTensor (or columns of a file) hold what, and which embedding tables serve them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig

_INIT_STD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One embedding table ``[num_embeddings, D]`` and the feature keys that look ids up in it.

    Keys that share a table share its weights; id 0 is the padding id in item tables.
    """

    name: str
    num_embeddings: int
    features: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(self.features))
        if not self.name or "." in self.name or hasattr(torch.nn.ModuleDict(), self.name):
            raise ValueError(f"table {self.name!r}: expected a name that PyTorch's modules do not use for themselves")
        if not isinstance(self.num_embeddings, int) or self.num_embeddings < 2:
            raise ValueError(f"table {self.name!r}: expected num_embeddings >= 2, got {self.num_embeddings!r}")
        if not self.features:
            raise ValueError(f"table {self.name!r}: expected at least one feature key, got none")


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSchema:
    """The keys of a batch; the same names are the columns of a parquet file.

    Ids lie in one KeyedJaggedTensor, whole numbers that are never looked up (times) in a second one of int64: as float
    weights of the first, seconds would be rounded to 64 or 128.

    Attributes:
        item: history items, oldest first.
        side: more history features of one id each event; their vectors are added to the item's.
        time: int64 seconds of the history events, in the second tensor; ``None`` for models without a time bias.
        contextual: features of the user, one row of the sequence each; several ids are summed.
        candidate: items to score, any number for each user; shares the table of ``item``.
        candidate_side: more features of the candidates, added likewise.
        candidate_time: int64 seconds at which each candidate is asked for; ``None`` for models without a time bias.
        request_time: int64 seconds of the request, one for each user (retrieval only).
        negative: key of the drawn negatives that the trainer adds (retrieval only).
        tables: embedding tables; together they must serve every id key exactly once.
    """

    item: str = "item_id"
    side: tuple[str, ...] = ()
    time: str | None = "time"
    contextual: tuple[str, ...] = ()
    candidate: str | None = None
    candidate_side: tuple[str, ...] = ()
    candidate_time: str | None = None
    request_time: str | None = None
    negative: str | None = None
    tables: tuple[Table, ...] = field(kw_only=True)

    def __post_init__(self) -> None:
        for name in ("side", "contextual", "candidate_side", "tables"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.candidate is None and (self.candidate_side or self.candidate_time):
            raise ValueError("candidate: candidate_side and candidate_time need the key of the candidates, got None")
        keys = [*self.id_keys, *self.number_keys]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"schema: expected each key in one role, got {twice} in several")
        served = [key for table in self.tables for key in table.features]
        wrong = sorted(set(self.id_keys) ^ set(served)) + sorted({key for key in served if served.count(key) > 1})
        if wrong:
            raise ValueError(f"tables: expected every id key {list(self.id_keys)} in exactly one table; check {wrong}")
        for key in (self.candidate, self.negative):
            if key is not None and self.table_of(key) is not self.table_of(self.item):
                raise ValueError(f"tables: expected {key!r} in the table of {self.item!r}; they name the same items")

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> FeatureSchema:
        """From a configuration file's mapping; ``tables`` is a list of mappings.

        Raises:
            ValueError: keys are unknown or ``tables`` is missing.
        """
        known = set(cls.__dataclass_fields__)
        unknown = sorted(set(plain) - known)
        if unknown:
            raise ValueError(f"schema: unknown keys {unknown}; known: {sorted(known)}")
        if not plain.get("tables"):
            raise ValueError("schema.tables: expected a list of {name, num_embeddings, features}, got nothing")
        try:
            tables = tuple(Table(**table) for table in plain["tables"])
        except TypeError as error:
            raise ValueError(f"schema.tables: expected entries {{name, num_embeddings, features}}: {error}") from None
        return cls(**{**plain, "tables": tables})

    @property
    def id_keys(self) -> tuple[str, ...]:
        """Keys that are looked up in tables, in a fixed order."""
        single = (self.item, *self.side, *self.contextual)
        scored = () if self.candidate is None else (self.candidate, *self.candidate_side)
        return single + scored + (() if self.negative is None else (self.negative,))

    @property
    def number_keys(self) -> tuple[str, ...]:
        """Keys of exact int64 numbers, in a fixed order."""
        return tuple(key for key in (self.time, self.candidate_time, self.request_time) if key is not None)

    @property
    def history(self) -> tuple[str, ...]:
        return (self.item, *self.side)

    @property
    def candidates(self) -> tuple[str, ...]:
        return () if self.candidate is None else (self.candidate, *self.candidate_side)

    def table_of(self, key: str) -> Table:
        """The table that serves ``key``."""
        return next(table for table in self.tables if key in table.features)

    def embedding_configs(self, embedding_dim: int, data_type: DataType = DataType.FP32) -> list[EmbeddingConfig]:
        """TorchRec's description of the tables, all of width ``embedding_dim``."""
        return [
            EmbeddingConfig(
                name=table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=embedding_dim,
                feature_names=list(table.features),
                data_type=data_type,
                init_fn=_draw,
            )
            for table in self.tables
        ]


def _draw(table: torch.Tensor) -> None:
    torch.nn.init.trunc_normal_(table, std=_INIT_STD)
