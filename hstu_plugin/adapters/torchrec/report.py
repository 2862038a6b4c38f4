"""What a training tells: lines, progress, TensorBoard, and a record of its result. Rank 0 speaks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hstu_plugin._versions import runtime_versions, source_commit
from hstu_plugin.adapters.torchrec.data import SkippedData
from hstu_plugin.adapters.torchrec.options import TrainOptions
from hstu_plugin.adapters.torchrec.options_file import to_dict
from hstu_plugin.records import machine, plain, write_json


class Report:
    """Progress of one training.

    ``result.json`` and ``losses.jsonl`` lie in the output folder, TensorBoard's files in ``tensorboard/``.
    """

    def __init__(self, options: TrainOptions, *, rank: int, world_size: int) -> None:
        self.options = to_dict(options)
        self.folder = Path(options.run.output_dir)
        self.speaks, self.world_size = rank == 0, world_size
        self._seconds, self._rows, self._steps = 0.0, torch.zeros((), dtype=torch.int64), 0
        self._board: Any = None
        self._bar: Any = None
        self._metrics: list[dict[str, Any]] = []
        if self.speaks:
            self.folder.mkdir(parents=True, exist_ok=True)
            if options.run.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self.folder / "tensorboard"))
            # A bar for people; a log file gets lines.
            self._bar = tqdm(unit="step", disable=not sys.stderr.isatty())

    def say(self, line: str) -> None:
        """Print a line, once for all ranks."""
        if self.speaks:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def stepped(self, step: int, epoch: int, loss: torch.Tensor, rows: torch.Tensor, seconds: float) -> None:
        """Count a step; reads no device."""
        self._seconds, self._steps = self._seconds + seconds, self._steps + 1
        if self.speaks:
            self._rows = self._rows.to(rows.device) + rows
            self._bar.update(1)
            self._bar.set_postfix(epoch=epoch, step=step, refresh=False)

    def log(self, step: int, loss: float) -> None:
        """The global batch's loss, and the speed since the last line."""
        if not self.speaks:
            return
        seconds, rows = max(self._seconds, 1e-9), int(self._rows)
        self.say(
            f"step {step}: loss {loss:.5f}, {self._steps / seconds:.2f} steps/s, {rows / seconds:.0f} rows/s on rank 0"
        )
        with open(self.folder / "losses.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "loss": loss}) + "\n")
        if self._board is not None:
            self._board.add_scalar("train/loss", loss, step)
            self._board.add_scalar("train/steps_per_second", self._steps / seconds, step)
        self._seconds, self._rows, self._steps = 0.0, torch.zeros((), dtype=torch.int64), 0

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of an evaluation."""
        self._metrics.append({"step": step, **metrics})
        self.say(f"step {step}: " + ", ".join(f"{name} {value:.5f}" for name, value in metrics.items()))
        if self.speaks and self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(f"eval/{name}", value, step)

    def close(self, result: dict[str, Any], skipped: SkippedData) -> None:
        """Write ``result.json``."""
        if not self.speaks:
            return
        if skipped.rows or skipped.reasons:
            self.say(f"skipped {skipped.rows} rows that could not be read:")
            for reason in skipped.reasons:
                self.say(f"  {reason}")
        record = {
            **result,
            "evaluations": self._metrics,
            "skipped": {"rows": skipped.rows, "reasons": skipped.reasons},
            "world_size": self.world_size,
            "options": self.options,
            "commit": source_commit(),
            "versions": runtime_versions(),
            "machine": machine(),
        }
        write_json(self.folder / "result.json", plain(record))
        self._bar.close()
        if self._board is not None:
            self._board.close()
