"""Finding the checkpoint from which a stopped training goes on."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hstu_plugin.adapters.recbole.checkpoint import CheckpointError, read_checkpoint
from hstu_plugin.adapters.recbole.trainer import SafeTrainer, differences


def resume_run(trainer: Any, config: Any, resume: str | os.PathLike[str]) -> None:
    """Put ``trainer`` where a stopped run of the same configuration was: a file, or ``"auto"`` (see `run`).

    Raises:
        CheckpointError: the file named cannot be used.
        ValueError: the trainer keeps no state that would do.
    """
    if not isinstance(trainer, SafeTrainer):
        raise ValueError(f"resume: {type(trainer).__name__} trains in stages of its own and cannot be resumed")
    if os.fspath(resume) != "auto":
        trainer.resume_checkpoint(resume)
        return
    logger = logging.getLogger()
    folder = Path(config["checkpoint_dir"])
    found = sorted(folder.glob(f"{config['model']}-*.pth"), key=lambda file: file.stat().st_mtime, reverse=True)
    # Of one run, the latest state before the best one.
    best = [file for file in found if not file.stem.endswith("-last")]
    candidates = sorted(found, key=lambda file: (_place_of_run(file, found), file in best))
    for file in candidates:
        try:
            state = read_checkpoint(file)
            if differences(state["config"], config):
                continue
            trainer.resume_checkpoint(file)
        except CheckpointError as error:
            logger.warning(f"resume: passed over, {error}")
            continue
        return
    logger.info(f"resume: no checkpoint of this configuration in {str(folder)!r}; starting from the beginning")


def _place_of_run(file: Path, found: Sequence[Path]) -> int:
    """Place of the newest file of the run that ``file`` belongs to."""
    stem = file.stem.removesuffix("-last")
    return next(place for place, other in enumerate(found) if other.stem.removesuffix("-last") == stem)
