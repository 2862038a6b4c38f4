"""The retrieval door against the core, one user at a time, and its refusals."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hstu_kernels import JaggedLayout
from hstu_plugin.adapters.torchrec import FeatureSchema, HSTURetrievalTask, SequenceBatch, Table, check_batch
from hstu_plugin.config import RetrievalConfig
from hstu_plugin.losses import normalise
from hstu_plugin.sequence import JaggedSequence
from hstu_plugin.shared_negatives import shared_negatives_loss

from .cases import ITEMS, RETRIEVAL, config, retrieval_batch, retrieval_model


def user_vectors(model, batch: SequenceBatch) -> torch.Tensor:
    """Through the core alone, from plain tensors."""
    items, kinds = (model.embeddings.embeddings[name].weight for name in ("item", "kind"))
    features, numbers = batch.features, batch.numbers
    values = items[features["item_id"].values()] + kinds[features["kind"].values()]
    layout = JaggedLayout.from_lengths(features["item_id"].lengths())
    seq = JaggedSequence(values, layout, numbers["time"].values())
    return model.head.core(seq, numbers["asked_at"].values())


def test_scores_are_the_cores_in_the_order_of_the_candidates() -> None:
    model, batch = retrieval_model().eval(), retrieval_batch()
    users = user_vectors(model, batch)
    wanted = []
    asked = batch.features["candidate"]
    for b, ids in enumerate(asked.values().split(asked.lengths().tolist())):
        vectors = normalise(model.embeddings.embeddings["item"].weight[ids], model.head.core.retrieval.similarity)
        wanted.append(vectors @ users[b] / model.head.core.retrieval.temperature)
    scores = model(batch.features, batch.numbers)
    torch.testing.assert_close(scores, torch.cat(wanted))
    assert scores.std() > 0.1
    torch.testing.assert_close(model.users(batch.features, batch.numbers), users)


def test_times_keep_their_seconds() -> None:
    model, batch = retrieval_model().eval(), retrieval_batch()
    seq = model.head.sequence(model.embeddings(batch.features), batch.numbers)
    assert seq.timestamps is not None and seq.timestamps.dtype == torch.int64
    assert torch.equal(seq.timestamps, batch.numbers["time"].values())
    moved = KeyedJaggedTensor(
        keys=batch.numbers.keys(), values=batch.numbers.values() // 128 * 128, lengths=batch.numbers.lengths()
    )
    assert not torch.equal(model(batch.features, batch.numbers), model(batch.features, moved))


def test_loss_is_that_of_every_position() -> None:
    model, batch = retrieval_model(), retrieval_batch()
    loss, (_, rows) = HSTURetrievalTask(model)(batch)
    items = model.embeddings.embeddings["item"].weight
    features, retrieval = batch.features, model.head.core.retrieval
    values = items[features["item_id"].values()] + model.embeddings.embeddings["kind"].weight[features["kind"].values()]
    layout = JaggedLayout.from_lengths(features["item_id"].lengths())
    encoded = model.head.core.encode(JaggedSequence(values, layout, batch.numbers["time"].values())).values
    total, count = torch.zeros(()), 0
    offsets, ids = layout.seq_offsets.tolist(), features["item_id"].values()
    drawn = features["negative"].values()
    for begin, end in pairwise(offsets):
        for row in range(begin, end - 1):
            asked = torch.cat([ids[row + 1 : row + 2], drawn[drawn != ids[row + 1]]])
            logits = normalise(items[asked], "l2") @ normalise(encoded[row], "l2") / retrieval.temperature
            total, count = total + F.cross_entropy(logits, torch.tensor(0)), count + 1
    assert rows == count == 8
    torch.testing.assert_close(loss, total / count)
    loss.backward()
    assert all(p.grad is not None for p in model.embeddings.parameters())


@pytest.mark.parametrize("lengths", [(0,), (1, 1)])
def test_a_batch_without_a_prediction_trains_nothing(lengths: tuple[int, ...]) -> None:
    task, batch = HSTURetrievalTask(retrieval_model()), retrieval_batch(lengths)
    loss, (_, rows) = task(batch)
    assert loss == 0 and rows == 0
    loss.backward()


def test_in_batch_negatives_need_no_key() -> None:
    model = retrieval_model()
    model.head.core.retrieval = RetrievalConfig(loss="sampled_softmax", negatives="in_batch", num_negatives=4)
    loss, _ = HSTURetrievalTask(model)(retrieval_batch())
    assert torch.isfinite(loss) and loss > 0


def test_log_q_shifts_frequent_items() -> None:
    users = torch.eye(3, 4, dtype=torch.float64)
    ids = torch.tensor([1, 1, 2])
    setup = RetrievalConfig(loss="sampled_softmax", negatives="in_batch", similarity="dot", temperature=1.0)
    got = shared_negatives_loss(users, ids, users, ids, users, setup)
    log_q = torch.log(torch.tensor([2 / 3, 2 / 3, 1 / 3], dtype=torch.float64))
    wanted = 0.0
    for r in range(3):
        others = [j for j in range(3) if ids[j] != ids[r]]
        logits = torch.stack([users[r] @ users[r] - log_q[r], *(users[r] @ users[j] - log_q[j] for j in others)])
        wanted = wanted - torch.log_softmax(logits, 0)[0] / 3
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="full_softmax"):
        shared_negatives_loss(users, ids, users, ids, users, RetrievalConfig())
    with pytest.raises(ValueError, match="at least one negative"):
        shared_negatives_loss(users, ids, users, ids[:0], users[:0], setup)


def test_bce_over_shared_negatives() -> None:
    users = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    setup = RetrievalConfig(loss="bce", similarity="dot", temperature=1.0)
    negatives = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    got = shared_negatives_loss(users, torch.tensor([1, 2]), users, torch.tensor([2, 3]), negatives, setup)
    one = F.softplus(-users[0] @ users[0]) + F.softplus(negatives @ users[0]).mean()
    # The second row's positive was drawn as a negative, too: it does not count.
    two = F.softplus(-users[1] @ users[1]) + F.softplus(negatives[1] @ users[1])
    torch.testing.assert_close(got, (one + two) / 2)


def without(batch: KeyedJaggedTensor, key: str) -> KeyedJaggedTensor:
    keys = batch.keys()
    kept = [name for name in keys if name != key]
    return KeyedJaggedTensor(
        keys=kept,
        values=torch.cat([batch[name].values() for name in kept]),
        lengths=torch.cat([batch[name].lengths() for name in kept]),
    )


def shortened(batch: KeyedJaggedTensor, key: str) -> KeyedJaggedTensor:
    """The last value of ``key`` is missing, lengths say so."""
    keys, values, lengths = batch.keys(), [], []
    for name in keys:
        own, counts = batch[name].values(), batch[name].lengths().clone()
        if name == key:
            own = own[:-1]
            counts[counts.nonzero()[-1]] -= 1
        values.append(own)
        lengths.append(counts)
    return KeyedJaggedTensor(keys=batch.keys(), values=torch.cat(values), lengths=torch.cat(lengths))


@pytest.mark.parametrize("key", ["item_id", "kind", "candidate"])
def test_missing_ids_are_named(key: str) -> None:
    batch = retrieval_batch()
    with pytest.raises(ValueError, match=f"feature key '{key}'"):
        check_batch(replace(batch, features=without(batch.features, key)), RETRIEVAL)


def test_missing_and_short_times_are_named() -> None:
    batch, model = retrieval_batch(), retrieval_model()
    for numbers in (None, without(batch.numbers, "time")):
        with pytest.raises(ValueError, match="time key 'time'"):
            check_batch(replace(batch, numbers=numbers), RETRIEVAL)
        with pytest.raises(ValueError, match="time key 'time'"):
            model(batch.features, numbers)
    with pytest.raises(ValueError, match=r"as many 'time' as 'item_id'.*0 and 1 for user 3"):
        check_batch(replace(batch, numbers=shortened(batch.numbers, "time")), RETRIEVAL)
    with pytest.raises(ValueError, match="expected one value for each user, got 0 for user 3"):
        check_batch(replace(batch, numbers=shortened(batch.numbers, "asked_at")), RETRIEVAL)
    with pytest.raises(ValueError, match=r"as many 'kind'"):
        model(shortened(batch.features, "kind"), batch.numbers)


def test_times_as_floats_are_refused() -> None:
    batch = retrieval_batch()
    floats = KeyedJaggedTensor(
        keys=batch.numbers.keys(), values=batch.numbers.values().float(), lengths=batch.numbers.lengths()
    )
    with pytest.raises(TypeError, match="int64"):
        check_batch(replace(batch, numbers=floats), RETRIEVAL)


@pytest.mark.parametrize(
    ("key", "place", "bad"), [("item_id", 3, ITEMS), ("item_id", 0, 0), ("kind", 0, -1), ("kind", 10, 5)]
)
def test_ids_outside_their_table_are_named(key: str, place: int, bad: int) -> None:
    batch = retrieval_batch()
    batch.features[key].values()[place] = bad
    user = {0: 0, 3: 2, 10: 3}[place]
    with pytest.raises(ValueError, match=rf"feature key '{key}': expected ids in .* got {bad} in user {user}"):
        check_batch(batch, RETRIEVAL)


def test_lengths_that_do_not_add_up() -> None:
    batch = retrieval_batch()
    lengths = batch.features.lengths().clone()
    lengths[-1] += 1
    broken = KeyedJaggedTensor(keys=batch.features.keys(), values=batch.features.values(), lengths=lengths)
    with pytest.raises((ValueError, RuntimeError), match=r"add up|split"):
        check_batch(replace(batch, features=broken), RETRIEVAL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidate": "item_id"}, "in one role"),
        ({"contextual": ("age",)}, "exactly one table"),
        ({"tables": RETRIEVAL.tables[:1]}, "exactly one table"),
        ({"candidate": None, "candidate_time": "t"}, "need the key of the candidates"),
    ],
)
def test_schema_mistakes(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RETRIEVAL, **changes)


def test_history_and_candidates_share_a_table() -> None:
    tables = (
        Table(name="item", num_embeddings=9, features=("item_id",)),
        Table(name="others", num_embeddings=9, features=("candidate",)),
    )
    with pytest.raises(ValueError, match="in the table of 'item_id'"):
        FeatureSchema(candidate="candidate", tables=tables)


def test_time_bias_needs_a_time_key() -> None:
    tables = (Table(name="item", num_embeddings=9, features=("item_id",)),)
    from hstu_plugin.adapters.torchrec import HSTURetrievalModel

    with pytest.raises(ValueError, match=r"schema\.time"):
        HSTURetrievalModel(config(), FeatureSchema(time=None, tables=tables), RetrievalConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"name": "items"}, "PyTorch's modules"), ({"num_embeddings": 1}, ">= 2"), ({"features": ()}, "at least one")],
)
def test_table_mistakes(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Table(**{"name": "item", "num_embeddings": 9, "features": ("item_id",), **changes})
