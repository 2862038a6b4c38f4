"""A ranking data set as the trainer's data: one row a window, as the ranking door cuts, splits and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from hstu_plugin.adapters.conversion.files import Dataset, jagged, table_optimizer, write_dataset
from hstu_plugin.adapters.ranking.dataset import ROLES, RankingData, load
from hstu_plugin.adapters.ranking.schema import read_schema
from hstu_plugin.adapters.ranking.settings import ModelName, RankSettings, Recipe
from hstu_plugin.adapters.ranking.trainer import split_windows
from hstu_plugin.adapters.torchrec.parquet import Array
from hstu_plugin.adapters.torchrec.schema import of_candidates
from hstu_plugin.ranking_config import Categorical, TokenForm
from hstu_plugin.ranking_windows import Windows
from hstu_plugin.records import plain

_MODELS = (ModelName.HSTU, ModelName.ULTRA_HSTU)


def convert_ranking(recipe: Recipe, settings: RankSettings, directory: Path, out: Path) -> Dataset:
    """Write ``train``, ``valid`` and ``test`` folders and ``config.yaml`` below ``out``.

    Args:
        recipe: of the ranking door. settings: of one of its transducers. directory: of the schema's files.
        out: folder.

    Raises:
        DataError, SchemaError: the data cannot be used. ValueError: the model is none of this door.
    """
    if settings.model not in _MODELS:
        raise ValueError(f"model: expected one of {', '.join(_MODELS)}, got {settings.model}")
    data = load(read_schema(recipe.schema), directory)
    columns = _Columns(data, settings)
    windows = {split: split_windows(data.log, settings, split, training=split == "train") for split in ROLES}
    windows["train"] = windows["train"].take(drawn_order(len(windows["train"])))
    parts = {split: columns.table(own, split) for split, own in windows.items()}
    return write_dataset(out, parts, columns.config(out), {}, name=f"{recipe.name}, {settings.model}")


def drawn_order(windows: int) -> Tensor:
    """The order of the rows of training: readers go through files in pieces, which shall not be those of few users."""
    return torch.randperm(windows, generator=torch.Generator().manual_seed(0))


class _Columns:
    """The columns of the data set under the trainer's names."""

    def __init__(self, data: RankingData, settings: RankSettings) -> None:
        self.data, self.settings = data, settings
        features, events = data.features, data.log.events
        assert events.timestamps is not None
        others = features.items[1:]
        self.items = ("item_id", *(f"item_{feature.name}" for feature in others))
        self.users = tuple(f"user_{feature.name}" for feature in features.users)
        self.series = tuple(f"series_{feature.name}" for feature in features.series)
        self.contexts = tuple(f"context_{feature.name}" for feature in features.action_contexts)
        self.measures = tuple(f"measure_{feature.name}" for feature in features.intensities)
        self.interleaved = settings.token_form is TokenForm.INTERLEAVED
        ids = events.items.numpy()
        self.shown = {key: ids[:, column] for column, key in enumerate(self.items)}
        self.actions: dict[str, Array] = {"action_types": events.action_types.numpy()}
        self.actions |= {key: events.action_contexts[:, c].numpy() for c, key in enumerate(self.contexts)}
        self.actions |= {key: events.intensities[:, c].numpy() for c, key in enumerate(self.measures)}
        self.slow = {key: events.series[:, c].numpy() for c, key in enumerate(self.series)}
        self.times = events.timestamps.numpy()
        self.tasks = {task.name: data.log.labels[:, k].numpy() for k, task in enumerate(data.tasks)}

    def table(self, windows: Windows, split: str) -> pa.Table:
        """One row for each window."""
        begin, middle, first, end, user = (
            getattr(windows, name).numpy() for name in ("begin", "history_end", "first", "end", "user")
        )
        history = {**self.shown, "time": self.times, **self.slow, **self.actions}
        candidates = {_candidate(key): column for key, column in self.shown.items()} | {"candidate_time": self.times}
        if self.interleaved and split == "train":
            candidates |= {of_candidates(key): column for key, column in self.actions.items()}
        taken = self.data.log.users.numpy()[user]
        found: dict[str, Any] = {key: jagged(column, begin, middle) for key, column in history.items()}
        found |= {key: jagged(column, first, end) for key, column in candidates.items()}
        found |= {key: pa.array(taken[:, column]) for column, key in enumerate(self.users)}
        found["user"] = pa.array(user)
        twice = sorted(set(found) & set(self.tasks))
        if twice:
            raise ValueError(f"tasks: expected other names than {twice}, which are columns of the data set")
        return pa.table(found | {name: jagged(column, first, end) for name, column in self.tasks.items()})

    def config(self, out: Path) -> dict[str, Any]:
        """The trainer's configuration of the same training."""
        settings, data, features = self.settings, self.data, self.data.features
        model = settings.hstu_config(num_features=len(features.users), num_series=len(features.series))
        train = data.log.labels[data.log.roles == ROLES["train"]]
        rate = settings.table_learning_rate or settings.learning_rate
        decay = settings.weight_decay if settings.table_weight_decay is None else settings.table_weight_decay
        shared = zip(self.items, features.items, strict=True)
        tables = [_table(key, feature, (key, _candidate(key))) for key, feature in shared]
        for keys, of in ((self.users, features.users), (self.series, features.series)):
            tables += [_table(key, feature, (key,)) for key, feature in zip(keys, of, strict=True)]
        rows = sum(table["num_embeddings"] for table in tables)
        named = {
            "intensities": zip(self.measures, features.intensities, strict=True),
            "contexts": zip(self.contexts, features.action_contexts, strict=True),
        }
        actions: Mapping[str, Any] = {
            "types": "action_types",
            "names": list(features.action_types),
            **{role: [plain(replace(feature, name=key)) for key, feature in some] for role, some in named.items()},  # type: ignore[type-var]
            "form": settings.token_form.value,
            "learned_no_action": settings.learned_no_action,
        }
        return {
            "task": "ranking",
            "schema": {
                "item": "item_id",
                "side": list(self.items[1:]),
                "contextual": list(self.users),
                "candidate": "candidate",
                "candidate_side": [_candidate(key) for key in self.items[1:]],
                "candidate_time": "candidate_time",
                "series": list(self.series),
                "actions": actions,
                "user": "user",
                "unknown_item": True,
                "tables": tables,
            },
            "model": plain(model),
            "ranking": {
                "tasks": [plain(task) for task in data.tasks],
                "head_dims": list(settings.head_dims),
                "head_dropout": settings.head_dropout,
            },
            "head_users": settings.head_users and bool(self.users),
            "label_means": [float(mean) for mean in train.nanmean(0)],
            "data": {
                "train": str(out.resolve() / "train"),
                "eval": str(out.resolve() / "test"),
                "batch_size": settings.batch_size,
                "max_history": max(1, settings.max_history),
                "bucket_steps": 1,
                "id_dropout": self._id_dropout(),
            },
            "optim": {
                "dense_lr": settings.learning_rate,
                "dense_weight_decay": settings.weight_decay,
                "dense_betas": list(settings.betas),
                # As the ranking door's AdamW.
                "decay_vectors": True,
                "clip_norm": settings.clip_norm or 0.0,
                "tables": table_optimizer(rows, model.embedding_dim),
                "table_lr": rate,
                "table_weight_decay": decay,
                "table_betas": list(settings.betas),
                "warmup_steps": settings.warmup_steps,
                "lr_schedule": settings.lr_schedule.value,
            },
            "run": {"output_dir": str(out.resolve() / "run"), "epochs": settings.epochs},
        }

    def _id_dropout(self) -> dict[str, float]:
        """The rates by the names of the tables."""
        features = self.data.features
        tables = {feature.name: key for feature, key in zip(features.items, self.items, strict=True)}
        tables |= {feature.name: key for feature, key in zip(features.users, self.users, strict=True)}
        return {tables[name]: rate for name, rate in self.settings.id_dropout.items() if rate and name in tables}


def _candidate(key: str) -> str:
    return "candidate" if key == "item_id" else of_candidates(key)


def _table(name: str, feature: Categorical, features: tuple[str, ...]) -> dict[str, Any]:
    # A feature that training never saw has one id; tables have two rows at least.
    return {"name": name, "num_embeddings": max(2, feature.num_ids), "features": list(features)}
