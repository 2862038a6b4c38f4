"""Put our models, trainer and data sets where RecBole looks for them, and our defaults below the user's config."""

from __future__ import annotations

import functools
import importlib
from importlib.resources import files
from typing import Any

import yaml

from hstu_plugin import _hook
from hstu_plugin.adapters.recbole import compat, options
from hstu_plugin.adapters.recbole.settings import DEFAULTS_FILES

_WRAPPED = "_hstu_plugin_defaults"


def register() -> dict[str, type[Any]]:
    """Make RecBole's look-ups by name succeed; idempotent.

    Returns:
        our model classes by RecBole name.

    Raises:
        ImportError: RecBole is missing or does not fit its surroundings.
    """
    compat.require_recbole()
    trainer_room = importlib.import_module("recbole.trainer")
    dataset_room = importlib.import_module("recbole.data.dataset")
    arguments = importlib.import_module("recbole.utils.argument_list")
    model = importlib.import_module("hstu_plugin.adapters.recbole.model")
    dataset = importlib.import_module("hstu_plugin.adapters.recbole.dataset")
    trainer = importlib.import_module("hstu_plugin.adapters.recbole.trainer")
    models = {}
    for name in _hook.MODELS:
        models[name] = getattr(model, name)
    for name in (*_hook.MODELS, *_hook.ALIASES):
        setattr(trainer_room, f"{name}Trainer", trainer.HSTUTrainer)
        setattr(dataset_room, f"{name}Dataset", dataset.HSTUDataset)
    # RecBole compares these keys before it takes a data set from its own cache.
    for key in ("train_examples", "train_windows", "timestamp_unit", "action_field"):
        if key not in arguments.dataset_arguments:
            arguments.dataset_arguments.append(key)
    _wrap_config()
    return models


def our_name(model_class: type[Any]) -> str | None:
    """RecBole name of the model of ours that a class is or derives from; ``None`` for others."""
    ours = (c.__name__ for c in model_class.__mro__ if c.__module__.startswith("hstu_plugin."))
    return next((name for name in ours if name in _hook.MODELS), None)


def _wrap_config() -> None:
    config_class = importlib.import_module("recbole.config.configurator").Config
    original = config_class._load_internal_config_dict
    if getattr(original, _WRAPPED, False):
        return

    @functools.wraps(original)
    def load_internal(config: Any, model: str, model_class: Any, dataset: str) -> None:
        original(config, model, model_class, dataset)
        name = our_name(model_class)
        if name is not None:
            _add_defaults(config, name)

    setattr(load_internal, _WRAPPED, True)
    config_class._load_internal_config_dict = load_internal


def _add_defaults(config: Any, name: str) -> None:
    """After RecBole's own defaults (its data set files set ``normalize_all``), before the user's values."""
    internal, external = config.internal_config_dict, config.external_config_dict
    refuse_multi_gpu({**internal, **external})
    arguments = (key for keys in config.parameters.values() for key in keys)
    known = options.known_keys(internal, arguments)
    sources = {
        "the config file": config.file_config_dict,
        "the config dictionary": config.variable_config_dict,
        "the command line": config.cmd_config_dict,
    }
    options.refuse_unknown(sources, known)
    internal.update(options.default_values())
    text = (files("recbole_configs") / f"{DEFAULTS_FILES[name.upper()]}.yaml").read_text(encoding="utf-8")
    internal.update(yaml.load(text, Loader=config.yaml_loader))
    internal["load_col"] = with_time_column(internal, external)


def with_time_column(internal: dict[str, Any], external: dict[str, Any]) -> Any:
    """``load_col`` as given, or RecBole's default with the user, item and time columns in it.

    RecBole's own default loads no time, without which nothing can be put in order.
    """
    if "load_col" in external or not isinstance(internal.get("load_col"), dict):
        return external.get("load_col", internal.get("load_col"))
    final = {**internal, **external}
    columns = internal["load_col"].get("inter")
    if not isinstance(columns, list):
        return internal["load_col"]
    asked = [final.get(key) for key in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")]
    return {**internal["load_col"], "inter": [*columns, *(name for name in asked if name and name not in columns)]}


def refuse_multi_gpu(values: Any) -> None:
    """Raise for RecBole's own multi-GPU mode, before it starts its processes' work.

    Raises:
        ValueError: always when RecBole was started with ``nproc`` above 1.
    """
    if values.get("local_rank") is None or values.get("single_spec") is True:
        return
    raise ValueError(
        "RecBole's multi-GPU mode (nproc > 1) is refused for this model: its evaluation weights each process by the "
        "number of parts of a batch instead of the number of users, and its sampler repeats users to fill the last "
        "batch, so the metrics it reports are wrong. Run one process (leave out nproc and world_size), or train on "
        "several GPUs through our TorchX component."
    )
