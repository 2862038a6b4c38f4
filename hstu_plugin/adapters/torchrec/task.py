"""The module that a training's options describe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hstu_plugin.adapters.torchrec.options import NegativePool, Precision, TaskName, TrainOptions
from hstu_plugin.adapters.torchrec.ranking import HSTURankingModel, HSTURankingTask
from hstu_plugin.adapters.torchrec.retrieval import HSTURetrievalModel, HSTURetrievalTask

_META = torch.device("meta")


def make_task(options: TrainOptions) -> torch.nn.Module:
    """The module that a rank shards and trains, on the device "meta".

    Dense weights are drawn from the seed, the tables by `draw_tables`.
    """
    torch.manual_seed(options.run.seed)
    autocast = torch.bfloat16 if options.run.precision is Precision.BF16 else None
    if options.task is TaskName.RANKING:
        assert options.ranking is not None
        more: Mapping[str, Any] = {"mixture": options.mixture, "head_users": options.head_users}
        ranker = HSTURankingModel(options.model, options.schema, options.ranking, device=_META, **more)
        if options.label_means:
            ranker.head.core.head.start_from(torch.tensor(options.label_means))
        return HSTURankingTask(ranker, autocast=autocast)
    whole = options.negative_pool is NegativePool.TABLE
    model = HSTURetrievalModel(options.model, options.schema, options.retrieval, whole_table=whole, device=_META)
    return HSTURetrievalTask(model, autocast=autocast)
