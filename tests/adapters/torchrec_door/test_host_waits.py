"""What a step knows on the host it does not ask the device for: fake tensors raise whenever they are asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from hstu_plugin.adapters.torchrec import HSTURankingTask, HSTURetrievalTask, SequenceBatch

from .cases import ranking_batch, ranking_model, retrieval_batch, retrieval_model

CPU = torch.device("cpu")
KINDS = {
    "retrieval": (retrieval_model, retrieval_batch, HSTURetrievalTask),
    "ranking": (ranking_model, ranking_batch, HSTURankingTask),
}


def looked_up(features: KeyedJaggedTensor, width: int) -> dict[str, JaggedTensor]:
    """What a sharded collection returns: vectors, and lengths that only the device knows."""
    return {
        key: JaggedTensor(
            values=torch.empty(own.values().numel(), width),
            lengths=torch.empty(own.lengths().numel(), dtype=torch.int64),
        )
        for key, own in features.to_dict().items()
    }


@pytest.fixture(autouse=True)
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a GPU lengths are compared by an assertion of the device, which makes nobody wait.
    monkeypatch.setattr("hstu_plugin.adapters.torchrec.sequence.match_lengths", lambda *given: None)


def prepared(kind: str, batch: SequenceBatch) -> torch.Size:
    """The shape of the rows that the transducer is given, or of those that predict, with a plan for the attention."""
    make, _, task_of = KINDS[kind]
    task = task_of(make())
    # Counted on the host before it travels: inside the mode every tensor is a device's.
    batch, total = batch.to(CPU), batch.features["item_id"].values().numel()
    with FakeTensorMode(allow_non_fake_inputs=True):
        vectors = looked_up(batch.features, 8)
        head = task.head
        seq = head.sequence(vectors, batch.numbers, batch.counts)
        seq.layout.check_rows("total_rows", seq.values.shape[0])
        if kind == "ranking":
            return seq.values.shape
        known = None if batch.counts is None else batch.counts["item_id"]
        asks, predicted = head._asking(seq, vectors["item_id"].lengths(), total, known)
        assert asks.shape == predicted.shape
        return predicted.shape


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_batch_on_its_way_through_a_pipeline_is_prepared_without_asking(kind: str) -> None:
    batch = KINDS[kind][1]()
    lengths = batch.features["item_id"].lengths()
    if kind == "retrieval":
        assert prepared(kind, batch) == (int((lengths - 1).clamp(min=0).sum()),)
        return
    rows = int((lengths + batch.features["candidate"].lengths()).sum()) + 2 * lengths.numel()
    assert prepared(kind, batch) == (rows, 8)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_device_is_asked_where_the_counts_are_unknown(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise the test above could not fail.
    monkeypatch.setattr("hstu_plugin.adapters.torchrec.batch.host_counts", lambda features: None)
    with pytest.raises(Exception, match=r"_local_scalar_dense|item"):
        prepared(kind, KINDS[kind][1]())


@pytest.mark.parametrize("kind", list(KINDS))
def test_counts_change_no_number(kind: str) -> None:
    make, batch_of, task_of = KINDS[kind]
    batch = batch_of()
    moved = batch.to(CPU)
    assert batch.counts is None and moved.counts is not None
    assert moved.counts["item_id"] == (3, 0, 7, 1)
    assert moved.to(CPU).counts is moved.counts
    plain, known = (task_of(make())(one)[0] for one in (batch, moved))
    assert torch.equal(plain, known)


def test_counts_that_do_not_fit_are_refused() -> None:
    batch = retrieval_batch().to(CPU)
    assert batch.counts is not None
    wrong = replace(batch, counts={**batch.counts, "item_id": (3, 0, 7, 2)})
    with pytest.raises(ValueError, match="counts: expected lengths that add up to the 11 rows of a batch, got 12"):
        HSTURetrievalTask(retrieval_model())(wrong)
