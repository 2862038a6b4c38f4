"""FBGEMM's fused optimisers against the formulas in float64."""

from __future__ import annotations

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from hstu_plugin.adapters.torchrec.fused import fused_params, set_table_steps, table_steps
from hstu_plugin.adapters.torchrec.options import OptimOptions
from hstu_plugin.optim import RowwiseAdamW

ROWS, WIDTH = 9, 8
BETAS, RATE, EPS, DECAY = (0.8, 0.95), 0.05, 1e-3, 0.1
# Rows that come back, a row three times in a step, rows that never come.
STEPS = ([1, 3, 3, 3], [5, 3], [1, 1, 7], [3, 5, 7, 0], [0, 1])


def options(kind: str) -> OptimOptions:
    return OptimOptions(tables=kind, table_lr=RATE, table_weight_decay=DECAY, table_eps=EPS, table_betas=BETAS)


def slopes() -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [torch.randn(len(ids), WIDTH, generator=draw, dtype=torch.float64) for ids in STEPS]


def start() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()


def formula(rowwise: bool) -> Tensor:
    """AdamW of the rows that a step names; ``rowwise`` keeps the mean of their squares as one second moment."""
    w = start().double()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, (ids, slope) in enumerate(zip(STEPS, slopes(), strict=True), start=1):
        grad = torch.zeros_like(w).index_add(0, torch.tensor(ids), slope)
        for row in sorted(set(ids)):
            square = grad[row].square()
            m[row] = BETAS[0] * m[row] + (1 - BETAS[0]) * grad[row]
            v[row] = BETAS[1] * v[row] + (1 - BETAS[1]) * (square.mean() if rowwise else square)
            root = (v[row] / (1 - BETAS[1] ** t)).sqrt() + EPS
            w[row] = w[row] - RATE * (m[row] / (1 - BETAS[0] ** t) / root + DECAY * w[row])
    return w


def table(kind: str) -> SplitTableBatchedEmbeddingBagsCodegen:
    device = torch.device("cuda", 0)
    made = SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, WIDTH, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)],
        pooling_mode=PoolingMode.NONE,
        device=device,
        **fused_params(options(kind), device),
    )
    made.split_embedding_weights()[0].copy_(start())
    return made


def train(fused: SplitTableBatchedEmbeddingBagsCodegen, first: int = 0) -> None:
    for ids, slope in list(zip(STEPS, slopes(), strict=True))[first:]:
        found = fused(torch.tensor(ids).cuda(), torch.tensor([0, len(ids)]).cuda())
        (found * slope.float().cuda()).sum().backward()
    torch.cuda.synchronize()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FBGEMM fuses AdamW on CUDA alone: needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", ["rowwise_adamw", "adamw"])
def test_fused_adamw_is_the_formula(kind: str) -> None:
    fused = table(kind)
    train(fused)
    got = fused.split_embedding_weights()[0].cpu()
    torch.testing.assert_close(got.double(), formula(kind == "rowwise_adamw"), rtol=1e-5, atol=1e-6)
    # Rows that no step names neither move nor decay.
    assert torch.equal(got[[2, 4, 6, 8]], start()[[2, 4, 6, 8]])
    assert table_steps(fused) == len(STEPS)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FBGEMM fuses AdamW on CUDA alone: needs an NVIDIA GPU")
def test_bias_correction_goes_on_from_the_steps_that_were_saved() -> None:
    told, fresh = table("rowwise_adamw"), table("rowwise_adamw")
    set_table_steps(told, 3)
    for one in (told, fresh):
        train(one, first=3)
    assert table_steps(told) == len(STEPS)
    assert not torch.allclose(told.split_embedding_weights()[0], fresh.split_embedding_weights()[0], rtol=1e-3)


def test_the_formula_is_that_of_our_rowwise_adamw() -> None:
    # Holds the reference above to what was itself checked number by number, where there is no GPU.
    w = torch.nn.Parameter(start().double())
    ours = RowwiseAdamW([w], lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for ids, slope in zip(STEPS, slopes(), strict=True):
        w.grad = torch.sparse_coo_tensor(torch.tensor([ids]), slope, (ROWS, WIDTH))
        ours.step()
    torch.testing.assert_close(w.detach(), formula(rowwise=True), rtol=1e-12, atol=1e-12)


def test_fbgemm_has_no_fused_adamw_on_a_cpu() -> None:
    # The reason for our refusal: once this fails, the refusal can go.
    cuda = torch.device("cuda")
    with pytest.raises(AssertionError, match="Optimizer"):
        SplitTableBatchedEmbeddingBagsCodegen(
            [(ROWS, WIDTH, EmbeddingLocation.HOST, ComputeDevice.CPU)],
            pooling_mode=PoolingMode.NONE,
            **fused_params(options("rowwise_adamw"), cuda),
        )
