"""The training of one rank: build, resume, step, evaluate, save, stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer

from hstu_plugin.adapters.torchrec.batch import SequenceBatch
from hstu_plugin.adapters.torchrec.checkpoint import CheckpointError, Checkpoints
from hstu_plugin.adapters.torchrec.data import (
    HistorySampler,
    RankBatches,
    SkippedData,
    data_identity,
    plan_stream,
)
from hstu_plugin.adapters.torchrec.evaluate import evaluate_ranking, evaluate_retrieval
from hstu_plugin.adapters.torchrec.fused import fused_params, make_dense_optimizer, set_table_steps, table_steps
from hstu_plugin.adapters.torchrec.metrics import RankingMetrics, RetrievalMetrics
from hstu_plugin.adapters.torchrec.options import Resume, TableOptimizer, TaskName, TrainOptions
from hstu_plugin.adapters.torchrec.pipeline import Pipeline, detach, make_pipeline, paused
from hstu_plugin.adapters.torchrec.report import Report
from hstu_plugin.adapters.torchrec.samplers import make_sampler
from hstu_plugin.adapters.torchrec.sharding import describe_plan, draw_tables, shard_model
from hstu_plugin.adapters.torchrec.task import make_task
from hstu_plugin.schedule import rate_factor


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; training stops before such weights are saved."""


class Trainer:
    """One rank's part of a training; every method is called by all ranks alike.

    The default process group must exist. What decides a run is in ``options``: the number of ranks changes its speed.

    Args:
        options: of the run. device: of this rank. local_world_size: ranks of one host.
        stop: asked at every step; a rank that answers True makes all ranks save and stop.
    """

    def __init__(
        self,
        options: TrainOptions,
        *,
        device: torch.device,
        local_world_size: int = 1,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.options, self.device, self.stop = options, device, stop
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        patience = timedelta(seconds=options.run.timeout_s)
        self.group = dist.new_group(backend="gloo", timeout=patience)
        self.skipped = SkippedData()
        self.report = Report(options, rank=self.rank, world_size=self.world_size)
        self.sampler: HistorySampler | None = make_sampler(options)
        self._source: RankBatches | None = None
        self.plan = self._plan_data(training=True)
        self.replicated = options.optim.tables is TableOptimizer.DENSE_ADAMW
        self.model = shard_model(
            make_task(options),
            options.schema,
            device=device,
            fused_params=fused_params(options.optim, device),
            choices=options.sharding,
            replicated=self.replicated,
            local_world_size=local_world_size,
            batch_size=options.data.batch_size // self.world_size,
            messages=options.run.messages,
        )
        draw_tables(self.model, options.run.seed)
        self.report.say(describe_plan(self.model.plan, options.schema, options.model.embedding_dim))
        optim = options.optim
        self.dense = make_dense_optimizer(self.model, optim)
        clipped = (
            GradientClippingOptimizer(self.dense, clipping=GradientClipping.NORM, max_gradient=optim.clip_norm)
            if optim.clip_norm
            else self.dense
        )
        self.optimizer = CombinedOptimizer([self.model.fused_optimizer, clipped])
        self.checkpoints = Checkpoints(
            Path(options.run.output_dir) / "checkpoints",
            keep=options.run.keep_checkpoints,
            group=dist.new_group(backend="gloo", timeout=patience),
        )
        self.step, self.epoch, self.epoch_step = 0, 0, 0
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._resume()

    def train(self) -> dict[str, Any]:
        """To the end, or until asked to stop.

        Returns:
            ``{"finished": bool, "step": int, "metrics": {...}}``; metrics of the last evaluation when finished.

        Raises:
            NonFiniteLoss: the loss is not a finite number.
        """
        options = self.options.run
        finished, metrics = True, {}
        # One pipeline for all epochs: it looks two batches ahead, and takes a while to fill.
        pipeline = make_pipeline(self.model, self.optimizer, self.device, replicated=self.replicated)
        batches = self._batches()
        while self.epoch < options.epochs and not self._enough():
            finished = self._train_epoch(pipeline, batches)
            if not finished:
                break
        detach(pipeline)
        self._check_finite()
        self._save()
        if finished and self.options.data.eval is not None:
            metrics = self.evaluate()
        self.checkpoints.close()
        result = {"finished": finished, "step": self.step, "epoch": self.epoch, "metrics": metrics}
        self.report.close(result, self._total_skipped())
        return result

    def evaluate(self) -> dict[str, float]:
        """Metrics over the evaluation files, the same on all ranks and for any number of them."""
        options = self.options
        plan = self._plan_data(training=False)
        batches = RankBatches(
            options, plan, rank=self.rank, world_size=self.world_size, training=False, skipped=self.skipped
        ).epoch(0)
        if options.task is TaskName.RANKING:
            assert options.ranking is not None
            metrics = evaluate_ranking(self.model, batches, RankingMetrics(options.ranking), self.device, self.group)
        else:
            measures = RetrievalMetrics(options.run.top_k)
            metrics = evaluate_retrieval(
                self.model,
                batches,
                measures,
                options.schema,
                self.device,
                self.group,
                filter_seen=options.run.filter_seen,
            )
        self.report.evaluated(self.step, metrics)
        return metrics

    def _train_epoch(self, pipeline: Pipeline, batches: Iterator[SequenceBatch]) -> bool:
        """The rest of the epoch; False when asked to stop."""
        options = self.options.run
        while self.epoch_step < self.plan.steps_an_epoch and not self._enough():
            self._set_rates()
            # Dropout of a step follows from its number, so that a resumed run draws the same.
            torch.manual_seed(hash((options.seed, self.step, self.rank)) & 0x7FFFFFFF)
            begin = time.perf_counter()
            loss, rows = pipeline.progress(batches)
            self._finite &= torch.isfinite(loss)
            self.step, self.epoch_step = self.step + 1, self.epoch_step + 1
            self.report.stepped(self.step, self.epoch, loss, rows, time.perf_counter() - begin)
            if self.step % options.log_every == 0:
                self._check_finite()
                self.report.log(self.step, self._mean_loss(loss))
            if self._asked_to_stop():
                return False
            if options.checkpoint_every and self.step % options.checkpoint_every == 0:
                self._check_finite()
                self._save()
            if options.eval_every and self.step % options.eval_every == 0 and self.options.data.eval is not None:
                with paused(pipeline):
                    self.evaluate()
        if self.epoch_step >= self.plan.steps_an_epoch:
            self.epoch, self.epoch_step = self.epoch + 1, 0
        return True

    def _batches(self) -> Iterator[SequenceBatch]:
        self._source = RankBatches(
            self.options,
            self.plan,
            rank=self.rank,
            world_size=self.world_size,
            training=True,
            sampler=self.sampler,
            skipped=self.skipped,
        )
        return self._source.epochs(range(self.epoch, self.options.run.epochs), self.epoch_step)

    def _enough(self) -> bool:
        return 0 < self.options.run.max_steps <= self.step

    def _asked_to_stop(self) -> bool:
        asked = torch.tensor([int(self.stop())])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.group)
        return bool(asked)

    def _mean_loss(self, loss: torch.Tensor) -> float:
        """Of the global batch: the ranks' losses are weighted such that their mean is it."""
        total = loss.detach().float().cpu()
        dist.all_reduce(total, group=self.group)
        return float(total) / self.world_size

    def _check_finite(self) -> None:
        bad = torch.tensor([int(not self._finite)])
        dist.all_reduce(bad, group=self.group)
        if int(bad):
            raise NonFiniteLoss(
                f"the loss is not finite at or before step {self.step} (epoch {self.epoch}); no checkpoint was written "
                "since it was. Lower optim.dense_lr or optim.table_lr, or use run.precision: fp32"
            )

    def _set_rates(self) -> None:
        optim = self.options.optim
        total = self.options.run.epochs * self.plan.steps_an_epoch
        factor = rate_factor(optim.lr_schedule, self.step, optim.warmup_steps, total)
        for group in self.dense.param_groups:
            group["lr"] = group["full_lr"] * factor
        for group in self.model.fused_optimizer.param_groups:
            group["lr"] = optim.table_lr * factor

    def _plan_data(self, *, training: bool) -> Any:
        """Rank 0 reads the footers; all ranks go by what it saw. Its error is every rank's."""
        shared: list[Any] = [None]
        if self.rank == 0:
            try:
                shared = [plan_stream(self.options, training=training)]
            except Exception as error:
                shared = [error]
        dist.broadcast_object_list(shared, src=0, group=self.group)
        if isinstance(shared[0], Exception):
            raise shared[0]
        plan, messages = shared[0]
        if self.rank == 0:
            self.skipped.reasons.extend(messages)
        return plan

    def _total_skipped(self) -> SkippedData:
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, (self.skipped.rows, self.skipped.reasons), group=self.group)
        return SkippedData(sum(rows for rows, _ in found), sorted({why for _, some in found for why in some}))

    def _tensors(self) -> dict[str, Any]:
        """Everything that a checkpoint holds, by name: weights and the states of both optimisers."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, states in self.optimizer.state_dict()["state"].items():
            for key, value in states.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def _save(self) -> None:
        info = {
            "step": self.step,
            "epoch": self.epoch,
            "epoch_step": self.epoch_step,
            "data": data_identity(self.plan, self.options.data),
            "world_size": self.world_size,
            "table_steps": table_steps(self.model),
            # Not as it is now: it has drawn for the batches ahead, which a resumed run draws again.
            "sampler": None if self._source is None else self._source.sampler_state(self.epoch, self.epoch_step),
            "options": self.report.options,
        }
        self.checkpoints.save(self.step, self._tensors(), info)

    def _resume(self) -> None:
        mode = self.options.run.resume
        path = self.checkpoints.newest(self.report.say)
        if path is None:
            if mode is Resume.MUST:
                raise CheckpointError(
                    f"run.resume: must, but there is no usable checkpoint in {self.checkpoints.folder}"
                )
            return
        if mode is Resume.NEVER:
            raise CheckpointError(f"run.resume: never, but {path} exists; choose another run.output_dir")
        self.dense.init_state()
        tensors = self._tensors()
        info = self.checkpoints.load(path, tensors)
        here = data_identity(self.plan, self.options.data)
        changed = {key: (info["data"].get(key), here[key]) for key in here if info["data"].get(key) != here[key]}
        if changed:
            raise CheckpointError(f"{path}: its position means other rows now; (then, now): {changed}")
        self.model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
        set_table_steps(self.model, info["table_steps"])
        if self.sampler is not None and info["sampler"] is not None:
            self.sampler.load_state_dict(info["sampler"])
        self.step, self.epoch, self.epoch_step = info["step"], info["epoch"], info["epoch_step"]
        self.report.say(f"resumed from {path}: step {self.step}, saved by {info['world_size']} ranks")
