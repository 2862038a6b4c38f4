"""RecBole's trainer with safe, complete checkpoints, exact resume and a record of every epoch."""

from __future__ import annotations

import os
import random
import secrets
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.trainer.trainer import Trainer

from hstu_plugin.adapters.recbole.checkpoint import (
    FORMAT,
    CheckpointError,
    PortableConfig,
    best_path,
    last_path,
    read_checkpoint,
    write_checkpoint,
)
from hstu_plugin.adapters.recbole.options import run_options
from hstu_plugin.adapters.recbole.register import refuse_multi_gpu
from hstu_plugin.schedule import LearningRateSchedule, follow_schedule

EpochRecord = dict[str, Any]

# What may differ between a checkpoint and the run that goes on from it.
_FREE_KEYS = """
epochs stopping_step show_progress state checkpoint_dir checkpoint_every gpu_id use_gpu device data_path worker
log_wandb wandb_project save_dataset dataset_save_path save_dataloaders dataloaders_save_path config_files
eval_batch_size metric_decimal_place loss_decimal_place
"""


class SafeTrainer(Trainer):  # type: ignore[misc]
    """RecBole's ``Trainer`` with our checkpoints in place of RecBole's; base of `safe_trainer`'s classes.

    Besides the best epoch (``<name>.pth``, as RecBole) the latest state goes to ``<name>-last.pth``. Both hold all that
    training depends on, so that a resumed run gives the same numbers as one that was never stopped.

    Attributes:
        history: a record for each epoch: ``epoch, train_loss`` (RecBole's sum over batches), ``train_seconds``, and
            where it was validated ``valid_score, valid_result, valid_seconds``.
    """

    saved_model_file: str

    def __init__(self, config: Any, model: Any) -> None:
        refuse_multi_gpu(config.final_config_dict)
        super().__init__(config, model)
        self.history: list[EpochRecord] = []
        self.checkpoint_every = run_options(config.final_config_dict).checkpoint_every
        self.detect_anomaly = run_options(config.final_config_dict).detect_anomaly
        # RecBole names by the second, at which two runs of one sweep may well start.
        name = Path(self.saved_model_file)
        self.saved_model_file = str(name.with_name(f"{name.stem}-{secrets.token_hex(3)}{name.suffix}"))
        self._train_data: Any = None
        self._saved = False
        self._resumed: dict[str, Any] | None = None

    # RecBole's steps, with records

    def fit(
        self,
        train_data: Any,
        valid_data: Any = None,
        verbose: bool = True,
        saved: bool = True,
        show_progress: bool = False,
        callback_fn: Any = None,
    ) -> tuple[float, Any]:
        """As RecBole's; after `resume_checkpoint` from where it stopped, and not at all when it had finished."""
        self._train_data, self._saved = train_data, saved
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            _restore_random(resumed["random"], train_data)
            if self.start_epoch >= self.epochs or self.cur_step > self.stopping_step:
                self.logger.info(f"Nothing left to train: the checkpoint is of epoch {self.start_epoch - 1}.")
                self.eval_collector.data_collect(train_data)
                return self.best_valid_score, self.best_valid_result
        result: tuple[float, Any] = super().fit(train_data, valid_data, verbose, saved, show_progress, callback_fn)
        if self._saved and self.history:
            self._save_last(self.history[-1]["epoch"])
        return result

    def _train_epoch(self, train_data: Any, epoch_idx: int, loss_func: Any = None, show_progress: bool = False) -> Any:
        # Here the epoch before is complete, with its validation and the count for early stopping.
        if self._saved and epoch_idx > self.start_epoch and epoch_idx % self.checkpoint_every == 0:
            self._save_last(epoch_idx - 1)
        began = time.perf_counter()
        # One of RecBole's models switches autograd's anomaly detection on for the whole process when it is imported,
        # and RecBole imports all of them: every operation then keeps a stack trace and looks for NaN.
        with torch.autograd.set_detect_anomaly(self.detect_anomaly):
            losses = super()._train_epoch(train_data, epoch_idx, loss_func, show_progress)
        seconds = time.perf_counter() - began
        loss = sum(losses) if isinstance(losses, tuple) else losses
        self.history.append({"epoch": epoch_idx, "train_loss": float(loss or 0.0), "train_seconds": seconds})
        return losses

    def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> tuple[float, dict[str, float]]:
        began = time.perf_counter()
        score, result = super()._valid_epoch(valid_data, show_progress)
        score, result = float(score), _floats(result)
        seconds = time.perf_counter() - began
        self.history[-1] |= {"valid_score": score, "valid_result": result, "valid_seconds": seconds}
        return score, result

    def _check_nan(self, loss: torch.Tensor) -> None:
        if not torch.isfinite(loss):
            raise ValueError(
                f"the training loss is {loss.item()} in epoch {len(self.history)}: lower learning_rate "
                f"(now {self.learning_rate}), limit gradients with `clip_grad_norm: {{max_norm: 1.0}}`, or, with "
                "enable_amp, go back to full precision"
            )

    def evaluate(
        self, eval_data: Any, load_best_model: bool = True, model_file: Any = None, show_progress: bool = False
    ) -> Any:
        """As RecBole's, with the weights read safely."""
        if eval_data and load_best_model:
            file = model_file or self.saved_model_file
            state = read_checkpoint(file, self.device)
            self._load_weights(state, file)
            self.logger.info(f"Loading model structure and parameters from {file}")
        return super().evaluate(eval_data, load_best_model=False, show_progress=show_progress)

    # Checkpoints

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        file = kwargs.get("saved_model_file", self.saved_model_file)
        if self.history and self.history[-1]["epoch"] == epoch and "valid_result" in self.history[-1]:
            # RecBole calls this on an improvement, before it keeps the improved result itself.
            self.best_valid_result = self.history[-1]["valid_result"]
        write_checkpoint(self._state(epoch), file)
        if verbose:
            self.logger.info(f"Saving current: {file}")

    def _save_last(self, epoch: int) -> None:
        write_checkpoint(self._state(epoch), last_path(self.saved_model_file))

    def _state(self, epoch: int) -> dict[str, Any]:
        result = self.best_valid_result
        return {
            "format": FORMAT,
            "config": PortableConfig(self.config),
            "epoch": epoch,
            "cur_step": self.cur_step,
            "best_valid_score": float(self.best_valid_score),
            "best_valid_result": None if result is None else _floats(result),
            "train_loss_dict": {int(key): float(loss or 0.0) for key, loss in self.train_loss_dict.items()},
            "history": [dict(record) for record in self.history],
            "state_dict": self.model.state_dict(),
            "other_parameter": self.model.other_parameter(),
            "optimizer": self.optimizer.state_dict(),
            "random": _random_state(self._train_data),
        }

    def resume_checkpoint(self, resume_file: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint of either kind at the next `fit`.

        Raises:
            CheckpointError: the file cannot be used, or belongs to another configuration.
        """
        file = Path(resume_file)
        state = read_checkpoint(file, self.device)
        if "random" not in state:
            raise CheckpointError(
                f"checkpoint {str(file)!r}: it has the weights of a training, but not its whole state"
            )
        different = differences(state["config"], self.config)
        if different:
            raise CheckpointError(
                f"checkpoint {str(file)!r}: it belongs to another configuration: "
                + "; ".join(f"{key}: {old!r} there, {new!r} here" for key, (old, new) in different.items())
            )
        best = best_path(file)
        if best != file and not best.is_file() and np.isfinite(state["best_valid_score"]):
            raise CheckpointError(f"checkpoint {str(file)!r}: the best model of its run, {str(best)!r}, is missing")
        self._load_weights(state, file)
        self.optimizer.load_state_dict(state["optimizer"])
        self.saved_model_file = str(best)
        self.start_epoch = state["epoch"] + 1
        self.cur_step = state["cur_step"]
        self.best_valid_score = state["best_valid_score"]
        self.best_valid_result = state["best_valid_result"]
        self.train_loss_dict = dict(state["train_loss_dict"])
        self.history = [dict(record) for record in state["history"]]
        self._resumed = state
        self.logger.info(f"Checkpoint {file} loaded. Resume training from epoch {self.start_epoch}")

    def _load_weights(self, state: dict[str, Any], file: Any) -> None:
        try:
            self.model.load_state_dict(state["state_dict"])
        except RuntimeError as error:
            raise CheckpointError(
                f"checkpoint {os.fspath(file)!r}: its weights do not fit this model; the data set or the model's sizes "
                f"have changed since. {error}"
            ) from error
        self.model.load_other_parameter(state.get("other_parameter"))


class HSTUTrainer(SafeTrainer):
    """RecBole's trainer for our models: with their schedule of the learning rate and their betas."""

    def fit(
        self,
        train_data: Any,
        valid_data: Any = None,
        verbose: bool = True,
        saved: bool = True,
        show_progress: bool = False,
        callback_fn: Any = None,
    ) -> tuple[float, Any]:
        """As `SafeTrainer.fit`."""
        options = run_options(self.config.final_config_dict)
        if options.warmup_steps or options.lr_schedule is not LearningRateSchedule.CONSTANT:
            follow_schedule(
                self.optimizer,
                options.lr_schedule,
                learning_rate=self.learning_rate,
                warmup_steps=options.warmup_steps,
                first_step=self.start_epoch * len(train_data),
                total_steps=self.epochs * len(train_data),
            )
        return super().fit(train_data, valid_data, verbose, saved, show_progress, callback_fn)

    def _build_optimizer(self, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super()._build_optimizer(**kwargs)
        betas = run_options(self.config.final_config_dict).adam_betas
        if betas is not None:
            if "betas" not in optimizer.defaults:
                raise ValueError(f"adam_betas: only the learners adam and adamw have betas, got {self.learner!r}")
            for group in optimizer.param_groups:
                group["betas"] = betas
        return optimizer


def safe_trainer(trainer_class: type[Any]) -> type[Any]:
    """``trainer_class`` with our checkpoints, where it is a trainer whose checkpoints are RecBole's."""
    if issubclass(trainer_class, SafeTrainer) or not issubclass(trainer_class, Trainer):
        return trainer_class
    if trainer_class is Trainer:
        return SafeTrainer
    if trainer_class.fit is not Trainer.fit or trainer_class._save_checkpoint is not Trainer._save_checkpoint:
        return trainer_class
    return type(f"Safe{trainer_class.__name__}", (SafeTrainer, trainer_class), {})


def differences(there: Any, here: Any) -> dict[str, tuple[Any, Any]]:
    """Settings that training depends on and that differ between two RecBole configurations: old and new value."""
    old, new = PortableConfig(there).values, PortableConfig(here).values
    keys = sorted((old.keys() | new.keys()) - set(_FREE_KEYS.split()))
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def _floats(result: Any) -> dict[str, float]:
    return {str(key): float(value) for key, value in result.items()}


def _random_state(train_data: Any) -> dict[str, Any]:
    """All generators that training draws from, as plain values and byte tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    generator = getattr(train_data, "generator", None)
    return {
        "python": random.getstate(),
        "numpy": (
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "loader": None if generator is None else generator.get_state(),
    }


def _restore_random(state: dict[str, Any], train_data: Any) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
    if state["loader"] is not None and getattr(train_data, "generator", None) is not None:
        train_data.generator.set_state(state["loader"].cpu())
