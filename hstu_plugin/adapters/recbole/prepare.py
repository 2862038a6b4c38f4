"""What a run needs before its first epoch: RecBole's config without the process's arguments, log, data, trainer."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hstu_plugin.adapters.recbole import compat

compat.require_recbole()

# RecBole is looked for above, so that its absence is told with the command that repairs it.
from recbole.config import Config  # noqa: E402
from recbole.data import data_preparation  # noqa: E402
from recbole.data import dataset as dataset_room  # noqa: E402
from recbole.data.dataset import SequentialDataset  # noqa: E402
from recbole.evaluator.register import metrics_dict  # noqa: E402
from recbole.utils import EvaluatorType, ModelType, get_trainer, init_logger  # noqa: E402
from recbole.utils import init_seed as recbole_seed  # noqa: E402

from hstu_plugin import _hook  # noqa: E402
from hstu_plugin.adapters.input_errors import raised_by_us  # noqa: E402
from hstu_plugin.adapters.recbole.checked_settings import check_settings  # noqa: E402
from hstu_plugin.adapters.recbole.dataset import ExactTimeDataset, HSTUDataset  # noqa: E402
from hstu_plugin.adapters.recbole.register import our_name, with_time_column  # noqa: E402
from hstu_plugin.adapters.recbole.trainer import HSTUTrainer, safe_trainer  # noqa: E402

_HANDLER_NAME = "hstu-recbole-run"


def make_config(
    model: str | type[Any] | None,
    dataset: str | None,
    files: Sequence[str | os.PathLike[str]] | None,
    values: Mapping[str, Any] | None,
    argv: Sequence[str],
) -> Any:
    """RecBole's Config of exactly these arguments (see `run`); the process's own are left out.

    Raises:
        FileNotFoundError, ValueError: a setting that cannot be used; RecBole's own are checked here, too.
    """
    for file in files or ():
        if not os.path.isfile(file):
            raise FileNotFoundError(f"config_file_list: expected a YAML file, but there is no {os.fspath(file)!r}")
    for token in argv:
        if not token.startswith("--") or len(token[2:].split("=")) != 2:
            raise ValueError(f"argv: expected overrides of the form --key=value, got {token!r}")
    before = sys.argv
    # RecBole takes every --key=value of the process for configuration, a test runner's or launcher's as well.
    sys.argv = [before[0] if before else "", *argv]
    try:
        config = Config(
            model=model,
            dataset=dataset,
            config_file_list=[os.fspath(file) for file in files] if files else None,
            config_dict=dict(values) if values else None,
        )
    except ModuleNotFoundError as error:
        if error.name in ("lightgbm", "xgboost"):
            # The last place where RecBole looks for a model fails to import before RecBole can say what is wrong.
            ours = ", ".join(_hook.MODELS)
            asked = "of the name in the config" if model is None else f"named {model!r}"
            raise ValueError(f"model: RecBole has no model {asked}; ours are {ours}") from error
        raise
    except (TypeError, ValueError) as error:
        if raised_by_us(error):
            raise
        raise ValueError(f"RecBole refuses the settings: {error}") from error
    finally:
        sys.argv = before
    check_settings(config.final_config_dict, metrics_dict)
    return config


def load_exact_time(config: Any) -> None:
    """Mark a stock sequential model's config for exact time, and load the time column that RecBole leaves out."""
    if config["MODEL_TYPE"] == ModelType.SEQUENTIAL and _dataset_class(config) is SequentialDataset:
        config["load_col"] = with_time_column(config.final_config_dict, config.external_config_dict)
        config["exact_time"] = True


def _dataset_class(config: Any) -> type[Any]:
    """The data set class, ours or the one that RecBole takes for its models."""
    if our_name(config.model_class) is not None:
        return HSTUDataset
    by_type = {
        ModelType.SEQUENTIAL: "SequentialDataset",
        ModelType.KNOWLEDGE: "KnowledgeBasedDataset",
        ModelType.DECISIONTREE: "DecisionTreeDataset",
    }
    usual = getattr(dataset_room, by_type.get(config["MODEL_TYPE"], "Dataset"))
    chosen: type[Any] = getattr(dataset_room, f"{config['model']}Dataset", usual)
    return chosen


def make_data(config: Any) -> tuple[Any, tuple[Any, Any, Any]]:
    """Data set and the training, validation and test loaders, always from the atomic files.

    RecBole would unpickle caches that lie in ``checkpoint_dir``; a file that came with a stranger's model could be one.
    """
    for key in ("dataset_save_path", "dataloaders_save_path"):
        if config[key] is not None:
            raise ValueError(f"{key}: RecBole's caches are pickles and are not read here; remove the key")
    data = (ExactTimeDataset if config["exact_time"] else _dataset_class(config))(config)
    logging.getLogger().info(data)
    if config["eval_type"] is EvaluatorType.RANKING and max(config["topk"]) > data.item_num:
        raise ValueError(f"topk: cannot rank the best {max(config['topk'])} of {data.item_num - 1} items")
    # A path that cannot exist keeps RecBole from its default one.
    config["dataloaders_save_path"] = os.path.join(os.devnull, "none")
    try:
        loaders = data_preparation(config, data)
    finally:
        config["dataloaders_save_path"] = None
    return data, loaders


def make_model(config: Any, train_data: Any) -> Any:
    """The model on its device, for the data set behind the training loader."""
    return config.model_class(config, train_data._dataset).to(config["device"])


def make_trainer(config: Any, model: Any) -> Any:
    """Our trainer for our models, else RecBole's with our checkpoints."""
    if our_name(config.model_class) is not None:
        return HSTUTrainer(config, model)
    return safe_trainer(get_trainer(config["MODEL_TYPE"], config["model"]))(config, model)


def seed_all(config: Any, offset: int = 0) -> None:
    """Seed Python, NumPy and torch with the config's seed."""
    recbole_seed(config["seed"] + offset, config["reproducibility"])


@contextmanager
def run_log(config: Any) -> Iterator[logging.Logger]:
    """RecBole's log for this run alone; its file is closed at the end, and opened again by a later message.

    As everywhere in Python, a program that has set up its own log keeps it, and gets no other.

    Raises:
        PermissionError: RecBole's folders cannot be written.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        if handler.get_name() == _HANDLER_NAME:
            root.removeHandler(handler)
            handler.close()
    _make_folders(config)
    theirs, level = root.handlers[:], root.level
    # RecBole opens the file also where there is a log already, and then drops it unclosed: take hold of it.
    root.handlers.clear()
    try:
        init_logger(config)
    finally:
        ours = root.handlers[:]
        root.handlers[:] = theirs or ours
    if theirs:
        root.setLevel(level)
    for handler in ours:
        handler.set_name(_HANDLER_NAME)
    try:
        yield root
    finally:
        for handler in ours:
            if isinstance(handler, logging.FileHandler):
                handler.close()


def _make_folders(config: Any) -> None:
    for name in ("log", "log_tensorboard", config["checkpoint_dir"]):
        try:
            os.makedirs(name, exist_ok=True)
            writable = os.access(name, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            raise PermissionError(
                f"cannot write to {os.path.abspath(name)!r}: RecBole puts its log and TensorBoard files into the "
                "current folder and checkpoints into checkpoint_dir; change to a folder that you may write to"
            )


@contextmanager
def quiet_recbole() -> Iterator[None]:
    """Without the warnings about its own age that RecBole's code sets off."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=r"recbole\.")
        yield
