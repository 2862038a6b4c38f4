"""Optimisers that FBGEMM fuses into the backward pass of the tables, and that of all other weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torch import nn
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from hstu_plugin.adapters.torchrec.options import OptimOptions, TableOptimizer
from hstu_plugin.feature_tables import FeatureTables
from hstu_plugin.optim import dense_adamw

_TYPES = {
    # v_r from the row's mean square, decoupled decay: the rowwise AdamW of ULTRA-HSTU.
    TableOptimizer.ROWWISE_ADAMW: EmbOptimType.PARTIAL_ROWWISE_ADAM,
    TableOptimizer.ADAMW: EmbOptimType.ADAM,
    TableOptimizer.ROWWISE_ADAGRAD: EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    TableOptimizer.ADAGRAD: EmbOptimType.EXACT_ADAGRAD,
    TableOptimizer.SGD: EmbOptimType.EXACT_SGD,
}


def resolve_table_optimizer(wanted: TableOptimizer, device: torch.device) -> TableOptimizer:
    """The optimiser that runs; an explicit request is never replaced.

    Raises:
        ValueError: FBGEMM has no fused form of it on this device; says what to take.
    """
    on_cuda = device.type == "cuda"
    if wanted is TableOptimizer.AUTO:
        return TableOptimizer.ROWWISE_ADAMW if on_cuda else TableOptimizer.ROWWISE_ADAGRAD
    if wanted in (TableOptimizer.ROWWISE_ADAMW, TableOptimizer.ADAMW) and not on_cuda:
        raise ValueError(
            f"optim.tables: FBGEMM fuses {wanted} on CUDA only; on a CPU take rowwise_adagrad for sharded tables, "
            "dense_adamw for small ones, or hstu_plugin.optim.RowwiseAdamW for an EmbeddingCollection that is not "
            "sharded"
        )
    return wanted


def fused_params(options: OptimOptions, device: torch.device) -> dict[str, Any]:
    """For ``EmbeddingCollectionSharder(fused_params=...)``; nothing for ``dense_adamw``, which nothing fuses.

    Raises:
        ValueError: FBGEMM has no such form on this device.
    """
    kind = resolve_table_optimizer(options.tables, device)
    if kind is TableOptimizer.DENSE_ADAMW:
        return {}
    params: dict[str, Any] = {"optimizer": _TYPES[kind], "learning_rate": options.table_lr}
    if kind is TableOptimizer.SGD:
        if options.table_weight_decay:
            raise ValueError("optim.table_weight_decay: FBGEMM's fused SGD has none; expected 0")
        return params
    params["eps"] = options.table_eps
    if kind is TableOptimizer.ADAGRAD:
        if options.table_weight_decay:
            raise ValueError("optim.table_weight_decay: FBGEMM's fused adagrad has none; expected 0")
        return params
    params["weight_decay"] = options.table_weight_decay
    if kind in (TableOptimizer.ROWWISE_ADAMW, TableOptimizer.ADAMW):
        params["beta1"], params["beta2"] = options.table_betas
    elif options.table_weight_decay:
        params["weight_decay_mode"] = WeightDecayMode.DECOUPLE
    return params


def make_dense_optimizer(model: nn.Module, options: OptimOptions) -> KeyedOptimizerWrapper:
    """AdamW of all weights that FBGEMM's optimisers do not hold; each group knows its ``full_lr``.

    Tables that every rank has a copy of take the tables' numbers where those are of AdamW. With ``dense_adamw`` the
    tables of actions take them, too, as in `hstu_plugin.adapters.ranking.trainer`.
    """
    weights = dict(in_backward_optimizer_filter(model.named_parameters()))
    tables: list[nn.Parameter] = []
    if options.tables not in (TableOptimizer.ROWWISE_ADAGRAD, TableOptimizer.ADAGRAD, TableOptimizer.SGD):
        tables += [weight for name, weight in weights.items() if name.startswith("embeddings.")]
    if options.tables is TableOptimizer.DENSE_ADAMW:
        tables += [p for part in model.modules() if isinstance(part, FeatureTables) for p in part.parameters()]
    numbers = {
        "lr": options.table_lr,
        "weight_decay": options.table_weight_decay,
        "betas": options.table_betas,
        "eps": options.table_eps,
    }
    make = partial(
        dense_adamw,
        lr=options.dense_lr,
        weight_decay=options.dense_weight_decay,
        betas=options.dense_betas,
        decay_vectors=options.decay_vectors,
        tables=tables,
        table_options=numbers,
    )
    optimizer = KeyedOptimizerWrapper(weights, make)
    for group in optimizer.param_groups:
        group["full_lr"] = group["lr"]
    return optimizer


def table_steps(module: nn.Module) -> int:
    """The steps that fused Adam has counted; FBGEMM keeps the number outside its state dict. 0 without tables here."""
    return max((int(part.iter[0]) for part in _fused(module)), default=0)


def set_table_steps(module: nn.Module, steps: int) -> None:
    """Let the bias correction of fused Adam go on from ``steps``."""
    for part in _fused(module):
        part.iter[0] = steps


def _fused(module: nn.Module) -> list[SplitTableBatchedEmbeddingBagsCodegen]:
    return [part for part in module.modules() if isinstance(part, SplitTableBatchedEmbeddingBagsCodegen)]
