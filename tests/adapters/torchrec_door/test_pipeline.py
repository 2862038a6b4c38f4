"""The models under TorchRec's pipelines, torch.compile and autocast, on one process."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import (
    PrefetchTrainPipelineSparseDist,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)

from hstu_plugin.adapters.torchrec import HSTURankingTask, HSTURetrievalTask
from hstu_plugin.adapters.torchrec.fused import fused_params
from hstu_plugin.adapters.torchrec.options import OptimOptions

from .cases import ranking_batch, ranking_model, retrieval_batch, retrieval_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "1")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=30))
        yield
        dist.destroy_process_group()


def sharded(task: nn.Module) -> DistributedModelParallel:
    sharder = EmbeddingCollectionSharder(fused_params=fused_params(OptimOptions(tables="sgd", table_lr=0.1), CPU))
    return DistributedModelParallel(task, device=CPU, sharders=[sharder])


def copy_tables(model: DistributedModelParallel, tables: dict[str, torch.Tensor]) -> None:
    for name, value in model.state_dict().items():
        if name in tables:
            value.local_shards()[0].tensor.copy_(tables[name])


@pytest.mark.parametrize("kind", ["retrieval", "ranking"])
@pytest.mark.parametrize("pipeline", [TrainPipelineBase, TrainPipelineSparseDist])
def test_pipelines_train_as_a_plain_loop(kind: str, pipeline: type) -> None:
    make, batch_of, task_of = {
        "retrieval": (retrieval_model, retrieval_batch, HSTURetrievalTask),
        "ranking": (ranking_model, ranking_batch, HSTURankingTask),
    }[kind]
    batches = [batch_of(seed=seed) for seed in range(4)]
    plain = task_of(make())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    wanted = []
    for batch in batches:
        optimizer.zero_grad()
        loss, _ = plain(batch)
        loss.backward()
        optimizer.step()
        wanted.append(loss.item())

    model = make()
    tables = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("embeddings.")}
    parallel = sharded(task_of(model))
    copy_tables(parallel, tables)
    dense = torch.optim.SGD([p for n, p in parallel.named_parameters() if n.startswith("head.")], lr=0.1)
    steps = pipeline(parallel, dense, CPU)
    feed = iter(batches)
    got = [steps.progress(feed)[0].item() for _ in batches]
    assert got == pytest.approx(wanted, rel=1e-5)
    assert wanted[0] != pytest.approx(wanted[-1], rel=1e-2)
    if pipeline is TrainPipelineSparseDist:
        # The lookups were taken out of the forward: the tracer saw through to them.
        assert len(steps._pipelined_modules) == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the pipeline's streams are CUDA's: needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", ["retrieval", "ranking"])
def test_the_sparse_pipeline_trains_as_plain_steps_on_a_gpu(kind: str) -> None:
    make, batch_of, task_of = {
        "retrieval": (retrieval_model, retrieval_batch, HSTURetrievalTask),
        "ranking": (ranking_model, ranking_batch, HSTURankingTask),
    }[kind]
    device, batches = torch.device("cuda", 0), [batch_of(seed=seed) for seed in range(4)]
    plain = task_of(make()).to(device)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    wanted = []
    for batch in batches:
        optimizer.zero_grad()
        loss, _ = plain(batch.to(device))
        loss.backward()
        optimizer.step()
        wanted.append(loss.item())

    model = make()
    tables = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("embeddings.")}
    sharder = EmbeddingCollectionSharder(fused_params=fused_params(OptimOptions(tables="sgd", table_lr=0.1), device))
    parallel = DistributedModelParallel(task_of(model.to(device)), device=device, sharders=[sharder])
    copy_tables(parallel, tables)
    dense = torch.optim.SGD([p for n, p in parallel.named_parameters() if n.startswith("head.")], lr=0.1)
    steps, feed = TrainPipelineSparseDist(parallel, dense, device), iter(batches)
    got = [steps.progress(feed)[0].item() for _ in batches]
    assert got == pytest.approx(wanted, rel=1e-3)
    assert wanted[0] != pytest.approx(wanted[-1], rel=1e-2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="TorchRec prefetches on CUDA streams: needs an NVIDIA GPU")
def test_the_prefetching_pipeline_trains_as_the_sparse_one() -> None:
    device, batches = torch.device("cuda", 0), [ranking_batch(seed=seed) for seed in range(4)]
    curves = []
    for pipeline in (TrainPipelineSparseDist, PrefetchTrainPipelineSparseDist):
        sharder = EmbeddingCollectionSharder(fused_params=fused_params(OptimOptions(tables="sgd"), device))
        model = ranking_model()
        tables = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("embeddings.")}
        parallel = DistributedModelParallel(HSTURankingTask(model.to(device)), device=device, sharders=[sharder])
        copy_tables(parallel, tables)
        dense = torch.optim.SGD([p for n, p in parallel.named_parameters() if n.startswith("head.")], lr=0.1)
        steps, feed = pipeline(parallel, dense, device), iter(batches)
        curves.append([steps.progress(feed)[0].item() for _ in batches])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["retrieval", "ranking"])
def test_the_dense_part_compiles(kind: str) -> None:
    model, batch = {
        "retrieval": (retrieval_model, retrieval_batch),
        "ranking": (ranking_model, ranking_batch),
    }[kind]
    model, batch = model().eval(), batch()
    wanted = model(batch.features, batch.numbers)
    # Without code generation: what is asked is whether the graphs are right.
    compiled = torch.compile(model.head, backend="aot_eager")
    vectors = model.embeddings(batch.features)
    torch.testing.assert_close(compiled(vectors, batch.numbers), wanted)


@pytest.mark.parametrize("kind", ["retrieval", "ranking"])
def test_autocast_stays_near_and_trains_in_float32(kind: str) -> None:
    make, batch, task_of = {
        "retrieval": (retrieval_model, retrieval_batch(), HSTURetrievalTask),
        "ranking": (ranking_model, ranking_batch(), HSTURankingTask),
    }[kind]
    exact, _ = task_of(make())(batch)
    task = task_of(make(), autocast=torch.bfloat16)
    near, _ = task(batch)
    assert near.dtype == torch.float32 and near != exact
    assert near.item() == pytest.approx(exact.item(), rel=0.05)
    near.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in task.parameters())
