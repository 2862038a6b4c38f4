"""TorchRec's pipelines for a sharded model and for one whose tables every rank holds, and evaluations between steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist

Pipeline: TypeAlias = TrainPipelineBase[Any, Any] | TrainPipelineSparseDist[Any, Any]


def make_pipeline(
    model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, *, replicated: bool
) -> Pipeline:
    """The pipeline of a training.

    Args:
        replicated: every rank holds all tables, so that no ids travel between ranks.
    """
    if replicated:
        return TrainPipelineBase(model, optimizer, device)
    return TrainPipelineSparseDist(model, optimizer, device, execute_all_batches=True)


def detach(pipeline: Pipeline) -> None:
    """Give the tables their own forward back."""
    if isinstance(pipeline, TrainPipelineSparseDist):
        pipeline.detach()


@contextmanager
def paused(pipeline: Pipeline) -> Iterator[None]:
    """The tables have their own forward inside, for an evaluation between two steps."""
    if not isinstance(pipeline, TrainPipelineSparseDist):
        yield
        return
    pipeline.detach()
    yield
    pipeline.attach()
    if pipeline.contexts:
        # Attaching sends the ids of the next batch anew, and leaves it to us to receive them.
        pipeline.wait_sparse_data_dist(pipeline.contexts[0])
