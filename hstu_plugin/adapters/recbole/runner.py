"""Train and load RecBole models in one process, without RecBole's quick start and its ray."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu_plugin.adapters.recbole.checkpoint import CheckpointError, read_checkpoint
from hstu_plugin.adapters.recbole.model import HSTU
from hstu_plugin.adapters.recbole.prepare import (
    load_exact_time,
    make_config,
    make_data,
    make_model,
    make_trainer,
    quiet_recbole,
    run_log,
    seed_all,
)
from hstu_plugin.adapters.recbole.register import register
from hstu_plugin.adapters.recbole.resume import resume_run
from hstu_plugin.adapters.recbole.trainer import EpochRecord


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A finished training.

    Attributes:
        config, dataset, model, trainer, train_data, valid_data, test_data: RecBole's objects; the model has the weights
            that were tested: the best epoch's when checkpoints are saved, else the last epoch's.
        best_valid_score, best_valid_result: ``None`` without validation data.
        test_result: metric by name; empty without test data.
        history: a record for each epoch (`SafeTrainer.history`), those before a resume included.
        train_seconds: in training epochs, without validation, those before a resume included.
        total_seconds: of this call.
        model_file: the best model's checkpoint, ``None`` when nothing was saved.
    """

    config: Any
    dataset: Any
    model: Any
    trainer: Any
    train_data: Any
    valid_data: Any
    test_data: Any
    best_valid_score: float | None
    best_valid_result: dict[str, float] | None
    test_result: dict[str, float]
    history: list[EpochRecord]
    train_seconds: float
    total_seconds: float
    model_file: Path | None


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A trained model with its data, ready to predict.

    Attributes:
        config, dataset, model, train_data, valid_data, test_data: RecBole's objects; the model is in evaluation mode.
        epoch: of the weights, counted from 0.
        best_valid_score, best_valid_result: ``None`` without validation data.
        history: a record for each epoch up to the checkpoint.
    """

    config: Any
    dataset: Any
    model: Any
    train_data: Any
    valid_data: Any
    test_data: Any
    epoch: int
    best_valid_score: float | None
    best_valid_result: dict[str, float] | None
    history: list[EpochRecord]

    def evaluate(self, split: str = "test", *, show_progress: bool = False) -> dict[str, float]:
        """Metrics on ``"test"`` or ``"valid"``, as the training computed them; empty where the split is."""
        if split not in ("test", "valid"):
            raise ValueError(f"split: expected 'test' or 'valid', got {split!r}")
        trainer = make_trainer(self.config, self.model)
        trainer.eval_collector.data_collect(self.train_data)
        data = self.test_data if split == "test" else self.valid_data
        with quiet_recbole():
            result = trainer.evaluate(data, load_best_model=False, show_progress=show_progress)
        return _floats(result)


def run(
    model: str | type[Any] | None = None,
    dataset: str | None = None,
    config_file_list: Sequence[str | os.PathLike[str]] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    *,
    saved: bool = True,
    resume: str | os.PathLike[str] | None = None,
    exact_time: bool = True,
    show_progress: bool | None = None,
    argv: Sequence[str] = (),
) -> RunResult:
    """Train and test a RecBole model, ours or a stock one.

    Args:
        model: name, or a RecBole model class; may stand in the config instead.
        dataset: name; may stand in the config instead.
        config_file_list: RecBole YAML files, later ones win.
        config_dict: wins over the files.
        saved: write checkpoints, and test the best epoch.
        resume: a checkpoint to go on from, or ``"auto"``: the newest in ``checkpoint_dir`` with this configuration, or
            a fresh start where there is none.
        exact_time: give stock sequential models the exact order of events, too (`ExactTimeDataset`).
        show_progress: overrides the config's.
        argv: ``--key=value`` overrides, as on RecBole's command line; win over all. ``sys.argv`` is never read.

    Raises:
        ValueError, FileNotFoundError: the configuration, the data or a checkpoint cannot be used.
    """
    began = time.perf_counter()
    register()
    with quiet_recbole():
        config = make_config(model, dataset, config_file_list, config_dict, argv)
        if exact_time:
            load_exact_time(config)
        seed_all(config)
        with run_log(config) as logger:
            logger.info(config)
            data, loaders = make_data(config)
            seed_all(config, config["local_rank"])
            network = make_model(config, loaders[0])
            logger.info(network)
            if isinstance(network, HSTU):
                logger.info(network.backend_note())
            trainer = make_trainer(config, network)
            if resume is not None:
                resume_run(trainer, config, resume)
            shown = config["show_progress"] if show_progress is None else show_progress
            train_data, valid_data, test_data = loaders
            score, valid_result = trainer.fit(train_data, valid_data, saved=saved, show_progress=shown)
            test_result = trainer.evaluate(test_data, load_best_model=saved, show_progress=shown)
            logger.info(f"best valid: {valid_result}")
            logger.info(f"test result: {test_result}")
    history = getattr(trainer, "history", [])
    return RunResult(
        config=config,
        dataset=data,
        model=network,
        trainer=trainer,
        train_data=train_data,
        valid_data=valid_data,
        test_data=test_data,
        best_valid_score=None if valid_result is None else float(score),
        best_valid_result=None if valid_result is None else _floats(valid_result),
        test_result=_floats(test_result),
        history=history,
        train_seconds=sum(record["train_seconds"] for record in history),
        total_seconds=time.perf_counter() - began,
        model_file=Path(trainer.saved_model_file) if saved else None,
    )


def load(model_file: str | os.PathLike[str], model: type[Any] | None = None) -> LoadedRun:
    """A model trained by `run`, with the data it was trained on, read again from its files.

    Args:
        model_file: checkpoint of the best epoch, or the last one.
        model: the class, where `run` got a class that RecBole does not know by name.

    Raises:
        CheckpointError: the file cannot be used, or the data set has changed since.
    """
    register()
    state = read_checkpoint(model_file)
    config = state["config"]
    if model is not None:
        config.model_class = model
    if config.model_class is None:
        raise CheckpointError(
            f"checkpoint {os.fspath(model_file)!r}: RecBole knows no model {config.model!r}; give its class as `model`"
        )
    with quiet_recbole():
        seed_all(config)
        data, loaders = make_data(config)
        network = make_model(config, loaders[0])
    try:
        network.load_state_dict(state["state_dict"])
    except RuntimeError as error:
        raise CheckpointError(
            f"checkpoint {os.fspath(model_file)!r}: its weights do not fit; the data set has changed since the "
            f"training. {error}"
        ) from error
    network.load_other_parameter(state.get("other_parameter"))
    network.eval()
    result = state.get("best_valid_result")
    return LoadedRun(
        config=config,
        dataset=data,
        model=network,
        train_data=loaders[0],
        valid_data=loaders[1],
        test_data=loaders[2],
        epoch=state["epoch"],
        best_valid_score=None if result is None else state["best_valid_score"],
        best_valid_result=result,
        history=list(state.get("history", [])),
    )


def _floats(result: Mapping[str, Any] | None) -> dict[str, float]:
    return {} if result is None else {str(key): float(value) for key, value in result.items()}
