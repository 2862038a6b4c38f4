"""A log of interactions as the trainer's data: one row a user, leave-one-out, as the RecBole door splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from hstu_plugin.adapters.conversion.files import Dataset, jagged, table_optimizer, write_dataset
from hstu_plugin.adapters.recbole import options as recbole_options
from hstu_plugin.adapters.recbole.atomic import chronological, load
from hstu_plugin.adapters.recbole.settings import DEFAULTS_FILES, recipe_path
from hstu_plugin.adapters.torchrec.options import NegativePool
from hstu_plugin.adapters.torchrec.parquet import Array
from hstu_plugin.config import LossType, NegativeSource
from hstu_plugin.records import plain

# Rows that are held out, by RecBole's names of leave-one-out.
_HELD_OUT = {"valid_and_test": ("valid", "test"), "valid_only": ("valid",), "test_only": ("test",)}
# Up to so many items a step may look all of them up.
_WHOLE_TABLE = 200_000
# Keys of a RecBole configuration that say nothing to this door, or what it does anyway.
_SAME = {
    "group_by": "user",
    "order": "TO",
    "mode": "full",
}
_REFUSED = (
    "user_inter_num_interval",
    "item_inter_num_interval",
    "val_interval",
    "rm_dup_inter",
    "action_field",
    "clip_grad_norm",
)


@dataclass(frozen=True, slots=True)
class Rows:
    """Training or held-out rows: events ``[start, target)`` and the event ``target`` behind them; ``[n]`` each."""

    start: Array
    target: Array


def leave_one_out(
    counts: Array, *, window: int, held_out: tuple[str, ...], all_windows: bool = False
) -> dict[str, Rows]:
    """The rows of users with ``counts [U]`` events each, in order; users with fewer than two have none.

    The last events are held out, the test item behind the validation item, while one target stays for training.

    Args:
        window: events that a row keeps before its target.
        held_out: names of the splits, the latest last.
        all_windows: train all windows of a long history, each target once; otherwise its latest.
    """
    ends = np.cumsum(counts)
    keep = counts >= 2
    first, last = (ends - counts)[keep], ends[keep] - 1
    taken = np.minimum(len(held_out), last - first - 1)
    found = {}
    for place, name in enumerate(held_out):
        # RecBole takes from the end: a user with too few events for both has a test item and no validation item.
        back = len(held_out) - 1 - place
        has = taken > back
        target = last[has] - back
        found[name] = Rows(np.maximum(first[has], target - window), target)
    trained = last - taken
    windows = -((first - trained) // window) if all_windows else np.ones_like(trained)
    user = np.repeat(np.arange(len(windows)), windows)
    place = np.arange(len(user)) - np.repeat(np.cumsum(windows) - windows, windows)
    target = trained[user] - place * window
    found["train"] = Rows(np.maximum(first[user], target - window), target)
    return found


def convert_retrieval(
    source: Path, recipe: Mapping[str, Any], out: Path, *, name: str | None = None, columns: Mapping[str, Any]
) -> Dataset:
    """Write ``train``, ``valid`` or ``test`` folders, ``items.parquet`` and ``config.yaml`` below ``out``.

    Ids are numbers from 1 in the order of the items' first appearance in the file. A training row ends with its
    target, so that the trainer predicts every event of it but the first.

    Args:
        source: parquet, delimited text or a RecBole atomic file with user, item and time.
        recipe: keys of a RecBole configuration, such as those of ``recbole_configs``: model, loss, optimiser, split.
        out: folder. name: of the data set in messages. columns: arguments of `atomic.load`.

    Raises:
        DataError: the table cannot be used. ValueError: the recipe asks for what this door does differently.
    """
    split = _split(recipe)
    model = recbole_options.hstu_config(recipe)
    data = load(source, with_rating=False, **columns)
    tokens, first = np.unique(data.items.astype(str), return_index=True)
    tokens = tokens[np.argsort(first)]
    ordered = chronological(data)
    places = np.argsort(tokens)
    ids = places[np.searchsorted(tokens[places], ordered.items.astype(str))] + 1
    times = ordered.times // 1000
    users = ordered.users
    counts = np.diff(np.flatnonzero(np.concatenate([[True], users[1:] != users[:-1], [True]])))
    windows = recbole_options.data_options(recipe).train_windows
    rows = leave_one_out(
        counts,
        window=model.max_seq_len,
        held_out=_HELD_OUT[split],
        all_windows=windows is recbole_options.TrainWindows.ALL,
    )
    if not len(rows["train"].target):
        raise ValueError(f"{source}: no user has two events, so there is nothing to predict")
    tables = {
        part: pa.table(
            {
                "item_id": jagged(ids, own.start, own.target + (part == "train")),
                "time": jagged(times, own.start, own.target + (part == "train")),
                "held_out": pa.array(ids[own.target]),
                "asked_at": pa.array(times[own.target]),
            }
        )
        for part, own in rows.items()
    }
    tables["train"] = tables["train"].select(["item_id", "time"])
    config = _config(recipe, model, out, num_items=len(tokens), evaluated=_HELD_OUT[split][-1])
    vocabulary = pa.table({"item": pa.array(tokens.tolist()), "id": pa.array(np.arange(1, len(tokens) + 1))})
    return write_dataset(out, tables, config, {"items": vocabulary}, name=name or source.name.split(".")[0])


def _config(recipe: Mapping[str, Any], model: Any, out: Path, *, num_items: int, evaluated: str) -> dict[str, Any]:
    """The trainer's configuration of the same training."""
    run = recbole_options.run_options(recipe)
    retrieval = recbole_options.retrieval_config(recipe)
    learner = str(recipe.get("learner", "adamw")).lower()
    if learner not in ("adam", "adamw"):
        raise ValueError(f"learner: expected adam or adamw, got {learner!r}; the dense part is trained by AdamW")
    decay = float(recipe.get("weight_decay") or 0.0)
    if learner == "adam" and decay:
        raise ValueError("weight_decay: expected 0 with learner adam, whose decay is no AdamW's; take adamw")
    per_row = retrieval.loss is LossType.FULL_SOFTMAX or retrieval.negatives is NegativeSource.UNIFORM
    pool = NegativePool.TABLE if per_row and num_items <= _WHOLE_TABLE else NegativePool.SHARED
    if pool is NegativePool.SHARED and retrieval.loss is LossType.FULL_SOFTMAX:
        retrieval = replace(retrieval, loss=LossType.SAMPLED_SOFTMAX)
    rate = float(recipe.get("learning_rate", 1e-3))
    betas = list(run.adam_betas or (0.9, 0.999))
    topk = recipe.get("topk") or [10]
    length = recbole_options.stochastic_length_config(recipe)
    return {
        "task": "retrieval",
        "schema": {
            "candidate": "held_out",
            "request_time": "asked_at",
            "negative": "negative",
            "tables": [
                {"name": "item", "num_embeddings": num_items + 1, "features": ["item_id", "held_out", "negative"]}
            ],
        },
        "model": plain(model),
        "retrieval": plain(retrieval),
        "negative_pool": pool.value,
        "data": {
            "train": str(out.resolve() / "train"),
            "eval": str(out.resolve() / evaluated),
            "batch_size": int(recipe.get("train_batch_size", 128)),
            # A row's target is its last event.
            "max_history": model.max_seq_len + 1,
            # Batches of rows of any length, as RecBole's.
            "bucket_steps": 1,
        },
        "optim": {
            "dense_lr": rate,
            "dense_weight_decay": decay,
            "dense_betas": betas,
            "clip_norm": 0.0,
            "tables": table_optimizer(num_items + 1, model.embedding_dim),
            "table_lr": rate,
            "table_weight_decay": decay,
            "table_betas": betas,
            "warmup_steps": run.warmup_steps,
            "lr_schedule": run.lr_schedule.value,
        },
        "run": {
            "output_dir": str(out.resolve() / "run"),
            "epochs": int(recipe.get("epochs", 1)),
            "top_k": [int(k) for k in (topk if isinstance(topk, list | tuple) else [topk])],
            "filter_seen": run.filter_seen_items,
        },
        **({} if length is None else {"stochastic_length": plain(length)}),
    }


def _split(recipe: Mapping[str, Any]) -> str:
    """The name of leave-one-out; raises where the recipe asks for another protocol than this door has."""
    given = dict(recipe.get("eval_args") or {})
    split = (given.pop("split", None) or {"LS": "valid_and_test"}).get("LS")
    if split not in _HELD_OUT:
        raise ValueError(f"eval_args.split: expected {{LS: {' | '.join(_HELD_OUT)}}}, got {recipe['eval_args']!r}")
    for key, value in given.items():
        if value != _SAME.get(key):
            raise ValueError(f"eval_args.{key}: expected {_SAME.get(key)!r}, got {value!r}; evaluation ranks all items")
    for key in _REFUSED:
        if recipe.get(key) not in (None, "[0,inf)"):
            raise ValueError(f"{key}: this door does not have it, got {recipe[key]!r}; filter the table beforehand")
    return str(split)


def read_recipe(name: str) -> dict[str, Any]:
    """Keys of a RecBole recipe of the package, by name, or of a file, above the defaults of our models.

    Raises:
        SettingsError: there is no such recipe. ValueError: the file is no recipe of one of our models.
    """
    path = Path(name) if Path(name).is_file() else recipe_path(name)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from None
    model = str(given.get("model") or "HSTU") if isinstance(given, dict) else ""
    if model.upper() not in DEFAULTS_FILES:
        raise ValueError(f"{path}, model: expected {' or '.join(DEFAULTS_FILES)}, got {model!r}")
    text = (files("recbole_configs") / f"{DEFAULTS_FILES[model.upper()]}.yaml").read_text(encoding="utf-8")
    return {**recbole_options.default_values(), **yaml.safe_load(text), **given}
