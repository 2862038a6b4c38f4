"""Training and evaluation of rankers on windows of a log, with checkpoints from which a stopped run goes on."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hstu_plugin.adapters.ranking.dataset import ROLES, RankingData
from hstu_plugin.adapters.ranking.metrics import task_metrics
from hstu_plugin.adapters.ranking.settings import RankSettings, plain_settings
from hstu_plugin.feature_tables import FeatureTables
from hstu_plugin.ranking_dropout import IdDropout
from hstu_plugin.ranking_losses import multi_task_loss
from hstu_plugin.ranking_model import WindowRanker
from hstu_plugin.ranking_windows import EventLog, Windows, cut_windows, window_batch
from hstu_plugin.records import plain, write_checkpoint
from hstu_plugin.schedule import LearningRateSchedule, rate_factor

FORMAT = 1
BEST, LAST = "best.pt", "last.pt"
Metrics = dict[str, dict[str, float | None]]


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and what to do."""


def pick_device(name: str) -> torch.device:
    """``auto`` takes a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: expected auto, cpu or cuda, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected cpu or auto, as torch sees no NVIDIA GPU here, got 'cuda'")
    return device


@dataclass(kw_only=True)
class Progress:
    """Where a training stands."""

    epoch: int = 0
    best_epoch: int | None = None
    best_score: float = math.inf
    best_valid: Metrics = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


class RankTrainer:
    """One model on one data set with one seed.

    Every epoch draws from generators seeded by seed and epoch, so a resumed run repeats exactly what an unbroken one
    does on the same machine.
    """

    def __init__(
        self,
        model: WindowRanker,
        data: RankingData,
        settings: RankSettings,
        *,
        seed: int,
        device: torch.device,
        directory: Path | None = None,
        show_progress: bool = False,
    ) -> None:
        self.model = model.to(device)
        self.data, self.settings, self.seed, self.device = data, settings, seed, device
        self.directory, self.show_progress = directory, show_progress
        log = data.log
        self.log = EventLog(log.events.to(device), log.users.to(device), log.labels.to(device), log.roles.to(device))
        self.progress = Progress()
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.drop_ids = IdDropout(data.features, settings.id_dropout)
        self.optimizer: torch.optim.Optimizer | None = None
        if self.trainable:
            self.optimizer = torch.optim.AdamW(
                _groups(model, settings), betas=(settings.betas[0], settings.betas[1]), fused=device.type == "cuda"
            )

    def windows(self, split: str, *, training: bool = False) -> Windows:
        """Windows of a split; those of training may hold other numbers of candidates."""
        return split_windows(self.data.log, self.settings, split, training=training)

    def fit(self) -> None:
        """Train until the validation no longer improves; the model then has the best epoch's weights."""
        if self.optimizer is None:
            self.progress.best_valid = self.evaluate("valid")
            self._save(BEST, {"model": self.model.state_dict()})
            return
        windows, progress = self.windows("train", training=True), self.progress
        while progress.epoch < self.settings.epochs and not self._impatient():
            epoch = progress.epoch + 1
            began = time.perf_counter()
            losses = self._epoch(windows, epoch)
            record: dict[str, Any] = {"epoch": epoch, "train_seconds": time.perf_counter() - began}
            names = [task.name for task in self.data.tasks]
            record["train_loss"] = dict(zip(names, losses.tolist(), strict=True))
            if not all(map(math.isfinite, record["train_loss"].values())):
                raise ValueError(
                    f"the loss of epoch {epoch} is not finite: {record['train_loss']}; lower learning_rate"
                )
            if epoch % self.settings.valid_every == 0 or epoch == self.settings.epochs:
                valid = self.evaluate("valid")
                record["valid"], record["valid_score"] = valid, valid_score(self.data, valid)
                if record["valid_score"] < progress.best_score:
                    progress.best_epoch, progress.best_score = epoch, record["valid_score"]
                    progress.best_valid = valid
                    self._save(BEST, {"model": self.model.state_dict()})
            progress.epoch = epoch
            progress.history.append(record)
            self._save(LAST, {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})
        if self.directory is not None and progress.best_epoch is not None:
            self.restore(read_checkpoint(self.directory / BEST, self.device), self.directory / BEST)

    def evaluate(self, split: str) -> Metrics:
        """Metrics by task on ``train``, ``valid`` or ``test``."""
        windows = self.windows(split)
        self.model.eval()
        predictions, labels, users = [], [], []
        with torch.inference_mode():
            size = self.settings.eval_batch_size or self.settings.batch_size
            for part in self._batches(torch.arange(len(windows)), windows, split, size):
                batch = window_batch(self.log, part, self.device)
                predictions.append(self.model.head.predictions(self.model(batch)).float())
                labels.append(batch.labels)
                users.append(torch.repeat_interleave(part.user, part.end - part.first))
        columns = [torch.cat(parts).cpu().numpy() for parts in (labels, predictions, users)]
        return task_metrics(self.data.tasks, *columns)

    def resume(self) -> bool:
        """Go on from the last epoch in the run's directory; False where there is none.

        Raises:
            CheckpointError: the file cannot be used, or belongs to other settings.
        """
        assert self.directory is not None
        path = self.directory / LAST
        if not path.is_file() or self.optimizer is None:
            return False
        state = read_checkpoint(path, self.device)
        for name, mine in self._identity().items():
            if state[name] != mine:
                raise CheckpointError(
                    f"{path}: it belongs to a run with {name} {_different(state[name], mine)}; "
                    "choose another --output-dir, or --force to start anew"
                )
        self.restore(state, path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        return True

    def restore(self, state: Mapping[str, Any], path: Path) -> None:
        """Take the weights of a checkpoint; ``path`` is for the message where they do not fit."""
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise CheckpointError(f"{path}: its weights do not fit; the data has changed since. {error}") from error

    def _epoch(self, windows: Windows, epoch: int) -> Tensor:
        """Mean loss of each task, ``[num_tasks]``."""
        assert self.optimizer is not None
        settings, model = self.settings, self.model
        torch.manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(windows))
        model.train()
        tasks = len(self.data.tasks)
        sums, counts = (torch.zeros(tasks, dtype=torch.float64, device=self.device) for _ in range(2))
        steps = math.ceil(len(windows) / settings.batch_size)
        step, total_steps = (epoch - 1) * steps, settings.epochs * steps
        for part in self._batches(order, windows, f"epoch {epoch}", settings.batch_size):
            batch = self.drop_ids(window_batch(self.log, part, self.device))
            loss, parts = multi_task_loss(model.training_scores(batch), batch.labels, model.head.ranking)
            factor = rate_factor(settings.lr_schedule, step, settings.warmup_steps, total_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = group["full_lr"] * factor
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if settings.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.trainable, settings.clip_norm)
            self.optimizer.step()
            known = batch.labels.isfinite().sum(0)
            sums += parts.double() * known
            counts += known
            step += 1
        return (sums / counts.clamp(min=1)).cpu()

    def _batches(self, order: Tensor, windows: Windows, title: str, size: int) -> Any:
        parts = torch.split(order, size)
        shown = tqdm(parts, desc=title, leave=False, disable=not self.show_progress, dynamic_ncols=True)
        return (windows.take(rows) for rows in shown)

    def _impatient(self) -> bool:
        progress = self.progress
        since = progress.epoch - (progress.best_epoch or 0)
        return progress.best_epoch is not None and since > self.settings.patience * self.settings.valid_every

    def _identity(self) -> dict[str, Any]:
        free = {"patience"}
        # A schedule runs over all epochs: with another number of them the same epoch is another one.
        if self.settings.lr_schedule is LearningRateSchedule.CONSTANT:
            free.add("epochs")
        settings = {k: v for k, v in plain(plain_settings(self.settings)).items() if k not in free}
        return {"settings": settings, "data": plain(self.data.facts), "seed": self.seed}

    def _save(self, name: str, state: Mapping[str, Any]) -> None:
        if self.directory is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        own = {"format": FORMAT, "epoch": self.progress.epoch, "progress": vars(self.progress), **self._identity()}
        write_checkpoint({**own, **state}, self.directory / name)


def _groups(model: nn.Module, settings: RankSettings) -> list[dict[str, Any]]:
    """The tables of features, and everything else."""
    inside = {id(p) for part in model.modules() if isinstance(part, FeatureTables) for p in part.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    rates = settings.learning_rate, settings.table_learning_rate or settings.learning_rate
    tables_decay = settings.table_weight_decay
    decays = settings.weight_decay, settings.weight_decay if tables_decay is None else tables_decay
    groups = []
    for tables, rate, decay in zip((False, True), rates, decays, strict=True):
        own = [p for p in trained if (id(p) in inside) == tables]
        if own:
            groups.append({"params": own, "lr": rate, "full_lr": rate, "weight_decay": decay})
    return groups


def split_windows(log: EventLog, settings: RankSettings, split: str, *, training: bool = False) -> Windows:
    """Windows of a split under the settings; those of training may hold other numbers of candidates."""
    wide = settings.train_candidates if training and settings.train_candidates else settings.max_candidates
    return cut_windows(
        log,
        ROLES[split],
        max_history=settings.max_history,
        max_candidates=wide,
        session_gap=None if training and settings.train_candidates else settings.session_gap,
    )


def valid_score(data: RankingData, metrics: Metrics) -> float:
    """Mean normalised entropy of the tasks that are trained; lower is better."""
    entropies = [metrics[task.name].get("ne") for task in data.tasks if task.weight > 0]
    known = [value for value in entropies if value is not None]
    return sum(known) / len(known) if known else math.inf


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A run's checkpoint, without executing anything from it.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is none of ours.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: refused, as reading it would execute code from the file") from error
    except Exception as error:  # torch reports damage through many types
        raise CheckpointError(f"{path}: damaged or cut off ({type(error).__name__}); train again") from error
    needed = ("format", "progress", "settings", "data", "seed", "model")
    if not isinstance(state, dict) or any(key not in state for key in needed):
        raise CheckpointError(f"{path}: expected a checkpoint of hstu-rank")
    if state["format"] != FORMAT:
        raise CheckpointError(f"{path}: written by another release (format {state['format']}, here {FORMAT})")
    return state


def _different(old: Any, new: Any) -> str:
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return f"{old!r}, not {new!r}"
    keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return "; ".join(f"{key} {old.get(key)!r}, not {new.get(key)!r}" for key in keys)
