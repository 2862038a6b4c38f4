"""Names: which keys of a KeyedJaggedTensor (or columns of a file) hold what, and which embedding tables serve them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig

from hstu_plugin.adapters.input_errors import close_names
from hstu_plugin.ranking_config import Categorical, Intensity, RankingFeatures, TokenForm

_INIT_STD = 0.02
# Columns of the candidates' own actions are called as the history's, with this in front.
_OF_CANDIDATES = "candidate_"


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
class ActionColumns:
    """What was done at the events of a history: columns beside the items', and the form of the tokens.

    Their small tables belong to the dense part. Candidates have no action; training on interleaved tokens reads theirs
    from columns ``candidate_<name>``, behind the rows that predict them.

    Attributes:
        types: key of int64 bits, bit ``t`` for an action ``names[t]``; 0 where nothing was done, -1 where nobody knows.
        names: of the types, at most 62.
        intensities: numbers that belong to an action, each a float column of its name; NaN or nothing where unknown.
        contexts: ids in ``[0, num_ids)`` that belong to an action, each a column of its name; 0 unknown.
        form, learned_no_action: as `RankingFeatures`.
    """

    types: str = "action_types"
    names: tuple[str, ...] = ()
    intensities: tuple[Intensity, ...] = ()
    contexts: tuple[Categorical, ...] = ()
    form: TokenForm = TokenForm.SUMMED
    learned_no_action: bool = False

    def __post_init__(self) -> None:
        for name in ("names", "intensities", "contexts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "form", self.features(users=(), series=()).form)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ActionColumns:
        """From a configuration file's mapping; intensities ``{name, boundaries}``, contexts ``{name, num_ids}``.

        Raises:
            ValueError: a key is unknown or missing, or a value wrong.
        """
        try:
            intensities = tuple(Intensity(**one) for one in plain.get("intensities") or ())
            contexts = tuple(Categorical(**one) for one in plain.get("contexts") or ())
            return cls(**{**plain, "intensities": intensities, "contexts": contexts})
        except TypeError as error:
            raise ValueError(f"schema.actions: {error}") from None

    def features(self, *, users: tuple[str, ...], series: tuple[str, ...]) -> RankingFeatures:
        """For the core, with items, users and series as rows that were looked up: one row is as good as another."""
        return RankingFeatures(
            items=(Categorical(name="item", num_ids=1),),
            action_types=self.names,
            intensities=self.intensities,
            action_contexts=self.contexts,
            users=tuple(Categorical(name=key, num_ids=1) for key in users),
            series=tuple(Categorical(name=key, num_ids=1) for key in series),
            form=self.form,
            learned_no_action=self.learned_no_action,
        )

    @property
    def number_keys(self) -> tuple[str, ...]:
        """Whole numbers, one for each event."""
        return (self.types, *(context.name for context in self.contexts))

    @property
    def measure_keys(self) -> tuple[str, ...]:
        """Floats, one for each event."""
        return tuple(intensity.name for intensity in self.intensities)

    def bounds(self) -> dict[str, tuple[int, int]]:
        """Lowest and highest value of each whole number."""
        return {self.types: (-1, 2 ** len(self.names) - 1)} | {c.name: (0, c.num_ids - 1) for c in self.contexts}


def of_candidates(key: str) -> str:
    """The column of the candidates' own action."""
    return f"{_OF_CANDIDATES}{key}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSchema:
    """The keys of a batch; the same names are the columns of a parquet file.

    Ids lie in one KeyedJaggedTensor, whole numbers that are never looked up (times) in a second one of int64: as float
    weights of the first, seconds would be rounded to 64 or 128. Measures of actions lie in a third one of float32.

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
        series: slowly changing ids of the user, one for each event: each run of equal values is one token among the
            events, at the time of its first (ranking with ``actions``).
        actions: what was done at the events (ranking); ``None`` for histories of ``item`` and ``side`` alone.
        user: a number for each row that is the same in all rows of a user: GAUC is over users, not rows.
        unknown_item: id 0 of the item table is an unknown item; without, it is padding and refused.
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
    series: tuple[str, ...] = ()
    actions: ActionColumns | None = None
    user: str | None = None
    unknown_item: bool = False
    tables: tuple[Table, ...] = field(kw_only=True)

    def __post_init__(self) -> None:
        for name in ("side", "contextual", "candidate_side", "series", "tables"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.candidate is None and (self.candidate_side or self.candidate_time):
            raise ValueError("candidate: candidate_side and candidate_time need the key of the candidates, got None")
        if self.series and (self.actions is None or self.time is None):
            raise ValueError("series: they stand among the events by time, with their actions; give time and actions")
        keys = [*self.id_keys, *self.number_keys, *self.measure_keys]
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
            raise ValueError(f"schema: unknown keys {unknown}{nearest(unknown, known)}; known: {sorted(known)}")
        if not plain.get("tables"):
            raise ValueError("schema.tables: expected a list of {name, num_embeddings, features}, got nothing")
        try:
            tables = tuple(Table(**table) for table in plain["tables"])
        except TypeError as error:
            raise ValueError(f"schema.tables: expected entries {{name, num_embeddings, features}}: {error}") from None
        actions = plain.get("actions")
        if actions is not None:
            actions = ActionColumns.from_dict(actions)
        return cls(**{**plain, "tables": tables, "actions": actions})

    @property
    def id_keys(self) -> tuple[str, ...]:
        """Keys that are looked up in tables, in a fixed order."""
        single = (self.item, *self.side, *self.series, *self.contextual)
        scored = () if self.candidate is None else (self.candidate, *self.candidate_side)
        return single + scored + (() if self.negative is None else (self.negative,))

    @property
    def number_keys(self) -> tuple[str, ...]:
        """Keys of exact int64 numbers, in a fixed order."""
        own = () if self.actions is None else self.actions.number_keys
        single = (self.time, self.candidate_time, self.request_time, self.user)
        keys = (*(key for key in single if key is not None), *own)
        return (*keys, *map(of_candidates, own)) if self.reads_candidate_actions else keys

    @property
    def measure_keys(self) -> tuple[str, ...]:
        """Keys of float32 numbers, in a fixed order."""
        own = () if self.actions is None else self.actions.measure_keys
        return (*own, *map(of_candidates, own)) if self.reads_candidate_actions else own

    @property
    def reads_candidate_actions(self) -> bool:
        """Whether training takes the candidates' own actions, each behind the row that predicts it."""
        return self.actions is not None and self.actions.form is TokenForm.INTERLEAVED

    @property
    def history(self) -> tuple[str, ...]:
        return (self.item, *self.side)

    @property
    def along_history(self) -> tuple[str, ...]:
        """All keys with one value for each event of the history; the item's is the first."""
        own = () if self.actions is None else (*self.actions.number_keys, *self.actions.measure_keys)
        return (*self.history, *self.series, *(() if self.time is None else (self.time,)), *own)

    @property
    def along_candidates(self) -> tuple[str, ...]:
        """All keys with one value for each candidate, their own actions apart; the candidate's is the first."""
        return (*self.candidates, *(() if self.candidate_time is None else (self.candidate_time,)))

    def lowest_id(self, key: str) -> int:
        """The lowest id that may stand under ``key``."""
        return int(self.table_of(key) is self.table_of(self.item) and not self.unknown_item)

    @property
    def candidates(self) -> tuple[str, ...]:
        return () if self.candidate is None else (self.candidate, *self.candidate_side)

    def table_of(self, key: str) -> Table:
        """The table that serves ``key``."""
        return next(table for table in self.tables if key in table.features)

    def embedding_configs(self, embedding_dim: int, data_type: DataType = DataType.FP32) -> list[EmbeddingConfig]:
        """TorchRec's description of the tables, all of `table_width`."""
        return [
            EmbeddingConfig(
                name=table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=table_width(embedding_dim),
                feature_names=list(table.features),
                data_type=data_type,
                init_fn=_draw,
            )
            for table in self.tables
        ]


def table_width(embedding_dim: int) -> int:
    """Width of the tables: FBGEMM's rows hold multiples of four numbers, of which the model reads the first ones."""
    return -(-embedding_dim // 4) * 4


def _draw(table: torch.Tensor) -> None:
    torch.nn.init.trunc_normal_(table, std=_INIT_STD)


def nearest(unknown: Iterable[object], known: Iterable[str]) -> str:
    """What a message says after keys that nobody reads: the known ones they look like, or nothing."""
    known = list(known)
    near = [name for key in unknown for name in close_names(key, known, 2)]
    return f" (did you mean {' or '.join(dict.fromkeys(near))}?)" if near else ""
