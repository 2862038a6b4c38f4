"""A TorchRec two-tower retrieval, and the same script with HSTU as its user tower.

The classic tower sums the vectors of the user's items through an MLP. HSTU reads them in their order, with their times.
What changes is marked ``HSTU:``; batches, tables, sharding, optimisers and the training pipeline stay.

    python examples/torchrec_two_tower.py --tower mlp
    python examples/torchrec_two_tower.py --tower hstu
    torchrun --nproc-per-node 2 examples/torchrec_two_tower.py --tower hstu
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel, get_default_sharders
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim import RowWiseAdagrad

from hstu_plugin.adapters.torchrec import FeatureSchema, KJTToSequence, SequenceBatch, Table, keyed_jagged  # HSTU:
from hstu_plugin.adapters.torchrec.sequence import awaited
from hstu_plugin.adapters.torchrec.train import join_group
from hstu_plugin.config import HSTUConfig, RetrievalConfig  # HSTU:
from hstu_plugin.retrieval import HSTURetrieval  # HSTU:

ITEMS, DIM, LONGEST = 200, 32, 20
SCHEMA = FeatureSchema(  # HSTU: which keys are the history and its times
    candidate="next_id",
    tables=(Table(name="item", num_embeddings=ITEMS, features=("item_id", "next_id")),),
)


class SumTower(nn.Module):
    """``[B, D]`` from the sum of the user's item vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(DIM, 64), nn.ReLU(), nn.Linear(64, DIM))

    def forward(self, vectors: dict, times: KeyedJaggedTensor) -> Tensor:
        history = awaited(vectors)["item_id"]
        lengths = history.lengths()
        users = torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)
        return self.mlp(history.values().new_zeros(lengths.numel(), DIM).index_add(0, users, history.values()))


class HSTUTower(nn.Module):  # HSTU: the new user tower
    """``[B, D]`` from the user's events in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence = KJTToSequence(SCHEMA, with_candidates=False)
        self.hstu = HSTURetrieval(HSTUConfig(embedding_dim=DIM, max_seq_len=LONGEST), RetrievalConfig())

    def forward(self, vectors: dict, times: KeyedJaggedTensor) -> Tensor:
        return self.hstu(self.sequence(vectors, times))


class TwoTower(nn.Module):
    """User tower against item vectors, the batch's other items as negatives."""

    def __init__(self, user_tower: nn.Module) -> None:
        super().__init__()
        table = EmbeddingConfig(
            name="item", num_embeddings=ITEMS, embedding_dim=DIM, feature_names=["item_id", "next_id"]
        )
        self.embeddings = EmbeddingCollection(tables=[table], device=torch.device("meta"))
        self.user_tower = user_tower
        self.scorer = Scorer()

    def forward(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        vectors = self.embeddings(batch.features)
        loss = self.scorer(self.user_tower(vectors, batch.numbers), vectors)
        return loss, loss.detach()


class Scorer(nn.Module):
    """In-batch softmax over cosine similarities."""

    def forward(self, users: Tensor, vectors: dict) -> Tensor:
        items = awaited(vectors)["next_id"].values()
        logits = F.normalize(users) @ F.normalize(items).T / 0.1
        return F.cross_entropy(logits, torch.arange(users.shape[0], device=users.device))


def batches(count: int, seed: int) -> Iterator[SequenceBatch]:
    """Users who walk through the items with a stride of their own: the next item follows from the last two."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        rows = []
        for _ in range(64):
            length = int(torch.randint(2, LONGEST, (), generator=draw))
            start, stride = (int(torch.randint(0, high, (), generator=draw)) for high in (ITEMS - 1, 4))
            rows.append(1 + (start + (stride + 1) * torch.arange(length + 1)) % (ITEMS - 1))
        ids = keyed_jagged({"item_id": [row[:-1] for row in rows], "next_id": [row[-1:] for row in rows]})
        times = keyed_jagged({"time": [1_700_000_000 + 60 * torch.arange(len(row) - 1) for row in rows]})
        yield SequenceBatch(ids, times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tower", choices=("mlp", "hstu"), default="hstu")
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args()
    device, _ = join_group(timeout_s=60)
    torch.manual_seed(0)
    tower = HSTUTower() if given.tower == "hstu" else SumTower()  # HSTU: was SumTower()
    two_tower = TwoTower(tower)
    _apply_optimizer_in_backward(RowWiseAdagrad, two_tower.embeddings.parameters(), {"lr": 0.1})
    model = DistributedModelParallel(two_tower, device=device, sharders=get_default_sharders())
    dense = torch.optim.Adam([p for name, p in model.named_parameters() if name.startswith("user_tower")], lr=1e-2)
    pipeline = TrainPipelineSparseDist(model, dense, device, execute_all_batches=True)
    feed = batches(given.steps, seed=torch.distributed.get_rank())
    losses = [float(pipeline.progress(feed)) for _ in range(given.steps)]
    if torch.distributed.get_rank() == 0:
        print(f"{given.tower}: loss {losses[0]:.3f} at first, {sum(losses[-20:]) / 20:.3f} at last")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
