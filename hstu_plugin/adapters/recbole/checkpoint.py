"""Checkpoint files: written whole or not at all, read without executing what a stranger put into them.

RecBole pickles its Config object. Allowing that class to torch's safe reader would not be safe: a pickle may call
what it is allowed to name, and calling ``Config`` evaluates strings as Python. Our files name one function,
`restore_config`, which takes plain values.
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from hstu_plugin.records import write_checkpoint as write_checkpoint

FORMAT = 1
# Enumerations in a RecBole configuration, kept by the names of their members.
_ENUMS = {"MODEL_TYPE": "ModelType", "MODEL_INPUT_TYPE": "InputType", "eval_type": "EvaluatorType"}
# Caches on the machine that trained; RecBole unpickles what they name.
_LOCAL = ("dataset_save_path", "dataloaders_save_path")
_GPU_BACKENDS = ("triton",)
# Model names; they become part of a module name.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_NEEDED = ("config", "epoch", "state_dict", "optimizer", "cur_step", "best_valid_score")


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and what to do."""


class PortableConfig:
    """A RecBole configuration as plain values; unpickles as a RecBole ``Config``."""

    def __init__(self, config: Any) -> None:
        values = {key: value for key, value in config.final_config_dict.items() if key not in _LOCAL}
        for key in _ENUMS:
            if isinstance(values.get(key), Enum):
                values[key] = values[key].name
        values["device"] = str(values.get("device", "cpu"))
        self.values = {key: plain for key, value in values.items() if (plain := _plain(value)) is not _DROPPED}

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[dict[str, Any]]]:
        return restore_config, (self.values,)


def restore_config(values: dict[str, Any]) -> Any:
    """A RecBole ``Config`` with these final values, made without reading files, ``sys.argv`` or evaluating strings.

    Raises:
        CheckpointError: the values are not those of a configuration.
    """
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise CheckpointError("the checkpoint's configuration is not a dictionary of named values")
    if any(_plain(value) is _DROPPED for value in values.values()) or not _NAME.fullmatch(str(values.get("model", ""))):
        raise CheckpointError("the checkpoint's configuration holds other things than plain values")
    compat = importlib.import_module("hstu_plugin.adapters.recbole.compat")
    compat.require_recbole()
    config_class = importlib.import_module("recbole.config").Config
    utils = importlib.import_module("recbole.utils")
    final = {key: value for key, value in values.items() if key not in _LOCAL}
    final |= dict.fromkeys(_LOCAL)
    for key, name in _ENUMS.items():
        if isinstance(final.get(key), str):
            final[key] = getattr(utils, name)[final[key]]
    on_cuda = str(final.get("device", "cpu")).startswith("cuda") and torch.cuda.is_available()
    final["device"] = torch.device("cuda" if on_cuda else "cpu")
    if not on_cuda and final.get("backend") in _GPU_BACKENDS:
        # Like the device, it says where the training ran; the weights are the same for every backend.
        final["backend"] = "auto"
    config = config_class.__new__(config_class)
    # NumPy names that RecBole sets whenever a Config is made.
    config.compatibility_settings()
    config._init_parameters_category()
    config.yaml_loader = config._build_yaml_loader()
    config.model, config.dataset = final["model"], final.get("dataset")
    try:
        config.model_class = utils.get_model(config.model)
    except (ImportError, ValueError, AttributeError):
        # Trained from a class that only its owner can name; `hstu_plugin.adapters.recbole.load` takes it.
        config.model_class = None
    config.file_config_dict, config.variable_config_dict, config.cmd_config_dict = {}, {}, {}
    config.internal_config_dict, config.external_config_dict = dict(final), {}
    if config.dataset == "ml-100k":
        # Bundled with RecBole, wherever it is installed here.
        package = Path(importlib.import_module("recbole").__file__ or "").parent
        final["data_path"] = str(package / "dataset_example" / "ml-100k")
    config.final_config_dict = final
    return config


def allow_checkpoints() -> None:
    """Let ``torch.load`` with ``weights_only=True``, its default, read our files; for the whole process."""
    torch.serialization.add_safe_globals([restore_config])


def read_checkpoint(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state in ``path``, without executing anything from it.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is none of ours.
    """
    allow_checkpoints()
    if not os.path.isfile(path):
        raise CheckpointError(f"checkpoint {os.fspath(path)!r}: there is no such file")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {os.fspath(path)!r}: refused, as reading it would execute code from the file "
            f"({_first_line(error)}). Files written by stock RecBole are of this kind; train the model again "
            "through hstu-recbole, which writes safe ones"
        ) from error
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {os.fspath(path)!r}: {error}") from error
    except Exception as error:  # torch reports damage through many types
        raise CheckpointError(
            f"checkpoint {os.fspath(path)!r}: the file is damaged or cut off "
            f"({type(error).__name__}: {_first_line(error)}); use another checkpoint of the run, or train again"
        ) from error
    missing = [key for key in _NEEDED if key not in state] if isinstance(state, dict) else list(_NEEDED)
    if missing:
        raise CheckpointError(
            f"checkpoint {os.fspath(path)!r}: expected the state of a training, but there is no {', '.join(missing)}"
        )
    return dict(state)


def last_path(best: str | os.PathLike[str]) -> Path:
    """Where a run with its best model in ``best`` keeps the state from which it can go on."""
    path = Path(best)
    return path.with_name(f"{path.stem}-last{path.suffix}")


def best_path(file: str | os.PathLike[str]) -> Path:
    """The best model's file for either file of a run."""
    path = Path(file)
    return path.with_name(path.stem.removesuffix("-last") + path.suffix)


_DROPPED = object()


def _plain(value: Any) -> Any:
    """``value`` if it consists of plain Python values, else ``_DROPPED``; numbers of NumPy become Python's."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, bool | int | float | str) and not isinstance(value, Enum):
        return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return _DROPPED if any(item is _DROPPED for item in items) else type(value)(items)
    if isinstance(value, dict):
        pairs = {_plain(key): _plain(item) for key, item in value.items()}
        return _DROPPED if _DROPPED in pairs or any(item is _DROPPED for item in pairs.values()) else pairs
    if type(value).__module__ == "numpy" and hasattr(value, "item"):
        return _plain(value.item()) if getattr(value, "ndim", 1) == 0 else _DROPPED
    return _DROPPED


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200]
