"""Settings of a training out of a YAML file or plain values, and back; the defaults stand in `options`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from hstu_kernels import AttentionMask
from hstu_plugin.adapters.torchrec.channel import Channel
from hstu_plugin.adapters.torchrec.options import (
    DataOptions,
    NegativePool,
    OptimOptions,
    RunOptions,
    TaskName,
    TrainOptions,
)
from hstu_plugin.adapters.torchrec.schema import FeatureSchema, nearest
from hstu_plugin.config import HSTUConfig, RetrievalConfig
from hstu_plugin.ranking_config import RankingConfig, TaskConfig
from hstu_plugin.records import plain as plain_values
from hstu_plugin.ultra.load_balance import LoadBalanceConfig
from hstu_plugin.ultra.stochastic_length import StochasticLengthConfig


def load_options(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainOptions:
    """Read a YAML file.

    Args:
        path: of the file. overrides: ``{"run.max_steps": 10}``, values that replace the file's.

    Raises:
        ValueError: a section or key is unknown, missing or has a wrong value; names it and the file.
        FileNotFoundError: there is no such file.
    """
    try:
        plain = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(plain, dict):
        raise ValueError(f"{path}: expected sections, got {type(plain).__name__}")
    for name, value in (overrides or {}).items():
        section, _, key = name.partition(".")
        if not key:
            plain[section] = value
        else:
            plain[section] = {**(plain.get(section) or {}), key: value}
    try:
        return options_from_dict(plain)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def options_from_dict(plain: Mapping[str, Any]) -> TrainOptions:
    """From plain values, as of a YAML file; ``to_dict`` is the way back.

    Raises:
        ValueError: a section or key is unknown or missing.
    """
    known = {f.name for f in dataclasses.fields(TrainOptions)}
    unknown = sorted(set(plain) - known)
    if unknown:
        raise ValueError(f"unknown sections {unknown}{nearest(unknown, known)}; known: {sorted(known)}")
    missing = sorted({"task", "schema", "data", "run"} - set(plain))
    if missing:
        raise ValueError(f"missing sections {missing}")
    if plain["task"] not in list(TaskName):
        raise ValueError(f"task: expected one of {', '.join(TaskName)}, got {plain['task']!r}")
    model = dict(plain.get("model") or {})
    made: dict[str, Any] = {
        "task": TaskName(plain["task"]),
        "schema": FeatureSchema.from_dict(plain["schema"]),
        "model": _model("model", model),
        "data": _section(DataOptions, "data", plain["data"]),
        "run": _section(RunOptions, "run", plain["run"]),
        "optim": _section(OptimOptions, "optim", plain.get("optim")),
        "negative_pool": _choice(NegativePool, "negative_pool", plain.get("negative_pool", NegativePool.SHARED)),
        "label_means": tuple(plain.get("label_means") or ()),
        "head_users": bool(plain.get("head_users", False)),
        "mixture": {name: _channel(name, one, model) for name, one in (plain.get("mixture") or {}).items()},
        "sharding": {name: tuple(types) for name, types in (plain.get("sharding") or {}).items()},
    }
    if plain.get("retrieval"):
        made["retrieval"] = _section(RetrievalConfig, "retrieval", plain["retrieval"])
    if plain.get("ranking"):
        ranking = dict(plain["ranking"])
        ranking["tasks"] = [_section(TaskConfig, "ranking.tasks", task) for task in ranking.get("tasks") or ()]
        made["ranking"] = _section(RankingConfig, "ranking", ranking)
    for name, cls in (("stochastic_length", StochasticLengthConfig), ("load_balance", LoadBalanceConfig)):
        if plain.get(name) is not None:
            made[name] = _section(cls, name, plain[name])
    return TrainOptions(**made)


def to_dict(options: TrainOptions) -> dict[str, Any]:
    """Plain values, all defaults written out."""
    written: dict[str, Any] = plain_values(options)
    return {name: value for name, value in written.items() if value is not None}


def _model(name: str, plain: Mapping[str, Any]) -> HSTUConfig:
    values = dict(plain)
    if "mask" in values:
        values["mask"] = _section(AttentionMask, f"{name}.mask", values["mask"])
    config: HSTUConfig = _section(HSTUConfig, name, values)
    return config


def _channel(name: str, plain: Any, model: Mapping[str, Any]) -> Channel:
    """A channel's own settings above those of ``model``; or, as `to_dict` writes it, the whole ``config``."""
    given = dict(plain or {})
    unknown = sorted(set(given) - {"actions", "model", "config"})
    if unknown:
        near = nearest(unknown, ("actions", "model"))
        raise ValueError(f"mixture.{name}: unknown keys {unknown}{near}; known: ['actions', 'model']")
    values = given["config"] if "config" in given else {**model, **(given.get("model") or {})}
    return Channel(config=_model(f"mixture.{name}.model", values), actions=tuple(given.get("actions") or ()))


def _choice(cls: type[StrEnum], name: str, value: Any) -> Any:
    if value not in list(cls):
        raise ValueError(f"{name}: expected one of {', '.join(cls)}, got {value!r}")
    return cls(value)


def _section(cls: type[Any], name: str, plain: Any) -> Any:
    plain = {} if plain is None else plain
    if not isinstance(plain, Mapping):
        raise ValueError(f"{name}: expected a section of keys, got {plain!r}")
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(plain) - set(known))
    if unknown:
        raise ValueError(f"{name}: unknown keys {unknown}{nearest(unknown, known)}; known: {known}")
    needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    missing = [key for key in needed if key not in plain]
    if missing:
        raise ValueError(f"{name}: missing keys {missing}")
    return cls(**plain)
