"""What the planner may choose from."""

from __future__ import annotations

import pytest
import torch

from hstu_plugin.adapters.torchrec.fused import fused_params, resolve_table_optimizer
from hstu_plugin.adapters.torchrec.options import OptimOptions, Precision, TableOptimizer
from hstu_plugin.adapters.torchrec.sharding import _allowed, shard_model

from .cases import RETRIEVAL

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_no_rank_without_rows_on_cpus() -> None:
    # Five rows over four ranks: two, two, one, none.
    allowed = _allowed(RETRIEVAL, {}, 4, CPU)
    assert set(allowed) == {"kind"} and not any("row_wise" in kind for kind in allowed["kind"])
    assert "table_wise" in allowed["kind"]
    assert _allowed(RETRIEVAL, {}, 2, CPU) == {} == _allowed(RETRIEVAL, {}, 4, CUDA)
    with pytest.raises(ValueError, match="table 'kind' has 5 rows, too few for row_wise over 4 ranks"):
        _allowed(RETRIEVAL, {"kind": ("row_wise",)}, 4, CPU)


def test_bf16_messages_are_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"run\.messages: expected fp32 on a CPU, got bf16; gloo carries no bf16"):
        shard_model(
            torch.nn.Identity(),
            RETRIEVAL,
            device=CPU,
            fused_params={},
            choices={},
            local_world_size=1,
            batch_size=1,
            messages=Precision.BF16,
        )


def test_table_optimisers_by_device() -> None:
    assert resolve_table_optimizer(TableOptimizer.AUTO, CUDA) is TableOptimizer.ROWWISE_ADAMW
    assert resolve_table_optimizer(TableOptimizer.AUTO, CPU) is TableOptimizer.ROWWISE_ADAGRAD
    assert resolve_table_optimizer(TableOptimizer.ROWWISE_ADAMW, CUDA) is TableOptimizer.ROWWISE_ADAMW
    with pytest.raises(ValueError, match=r"on CUDA only.*rowwise_adagrad"):
        resolve_table_optimizer(TableOptimizer.ROWWISE_ADAMW, CPU)


def test_numbers_reach_the_kernels() -> None:
    options = OptimOptions(tables="rowwise_adamw", table_lr=0.5, table_weight_decay=0.1, table_betas=(0.8, 0.9))
    params = fused_params(options, CUDA)
    assert (params["learning_rate"], params["beta1"], params["beta2"], params["weight_decay"]) == (0.5, 0.8, 0.9, 0.1)
    for kind in ("sgd", "adagrad"):
        with pytest.raises(ValueError, match="has none"):
            fused_params(OptimOptions(tables=kind, table_weight_decay=0.1), CPU)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fused_rowwise_adagrad_is_ours(decay: float) -> None:
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    from hstu_plugin.optim import RowwiseAdagrad

    options = OptimOptions(tables="rowwise_adagrad", table_lr=0.3, table_weight_decay=decay, table_eps=1e-3)
    fused = SplitTableBatchedEmbeddingBagsCodegen(
        [(6, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)], pooling_mode=PoolingMode.NONE, **fused_params(options, CPU)
    )
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    fused.split_embedding_weights()[0].copy_(start)
    table = torch.nn.Embedding.from_pretrained(start.clone(), freeze=False, sparse=True)
    ours = RowwiseAdagrad(table.parameters(), lr=0.3, weight_decay=decay, eps=1e-3)
    for ids in (torch.tensor([1, 3, 3]), torch.tensor([3, 5])):
        slope = torch.randn(ids.numel(), 4, generator=torch.Generator().manual_seed(int(ids.sum())))
        (fused(ids, torch.tensor([0, ids.numel()])) * slope).sum().backward()
        ours.zero_grad()
        (table(ids) * slope).sum().backward()
        ours.step()
    torch.testing.assert_close(fused.split_embedding_weights()[0], table.weight.detach())
    assert not torch.equal(table.weight[3], start[3]) and torch.equal(table.weight[0], start[0])
