"""HSTURetrieval: user vectors, scores, the generative loss; two toy tasks that it must learn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hstu_kernels import AttentionMask, JaggedLayout
from hstu_kernels.testing import make_timestamps
from hstu_plugin.config import HSTUConfig, RetrievalConfig
from hstu_plugin.embedding import SequenceEmbedding, init_item_table
from hstu_plugin.losses import next_item_loss
from hstu_plugin.retrieval import HSTURetrieval
from hstu_plugin.sequence import JaggedSequence

LENGTHS = (6, 0, 1, 4)


def make_model(retrieval: RetrievalConfig | None = None, **options: Any) -> HSTURetrieval:
    torch.manual_seed(0)
    config = HSTUConfig(**{"embedding_dim": 8, "max_seq_len": 8, "dropout": 0.0, **options})
    return HSTURetrieval(config, retrieval).eval()


def make_batch(lengths: tuple[int, ...] = LENGTHS) -> JaggedSequence:
    layout = JaggedLayout.from_lengths(torch.tensor(lengths))
    rows = sum(lengths)
    values = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))
    return JaggedSequence(values, layout, make_timestamps(layout, rows))


# Tokens.


def test_embedding_by_hand() -> None:
    embedding = SequenceEmbedding(HSTUConfig(embedding_dim=4, max_seq_len=3, dropout=0.0))
    assert embedding.positions is not None
    layout = JaggedLayout.from_lengths(torch.tensor([2, 5]), num_targets=torch.tensor([1, 2]))
    seq = JaggedSequence(torch.ones(7, 4), layout)
    # Targets stand at the history end: 1 for the first user, 3 for the second.
    places = torch.tensor([0, 1, 0, 1, 2, 3, 3])
    assert torch.equal(embedding(seq).values, 2.0 + embedding.positions.weight[places])


def test_embedding_beyond_its_length_takes_the_last_position() -> None:
    embedding = SequenceEmbedding(HSTUConfig(embedding_dim=4, max_seq_len=3, dropout=0.0))
    assert embedding.positions is not None
    seq = JaggedSequence(torch.zeros(6, 4), JaggedLayout.from_lengths(torch.tensor([6])))
    assert torch.equal(embedding(seq).values, embedding.positions.weight[torch.tensor([0, 1, 2, 3, 3, 3])])


def test_embedding_without_positions_and_with_dropout() -> None:
    plain = SequenceEmbedding(HSTUConfig(embedding_dim=4, dropout=0.5, position_embedding=False))
    seq = JaggedSequence(torch.ones(500, 4), JaggedLayout.from_lengths(torch.tensor([500])))
    assert not list(plain.parameters())
    assert torch.equal(plain.eval()(seq).values, torch.full((500, 4), 2.0))
    dropped = plain.train()(seq).values
    assert set(dropped.unique().tolist()) == {0.0, 4.0}


def test_item_table_has_a_zero_padding_row() -> None:
    table = torch.full((2000, 8), 9.0)
    init_item_table(table)
    assert float(table[0].abs().max()) == 0
    assert float(table[1:].std()) == pytest.approx(0.02, rel=0.1)


# User vectors and scores.


def test_user_vectors_are_the_rows_of_the_last_events() -> None:
    seq = make_batch()
    for similarity in ("dot", "l2"):
        model = make_model(RetrievalConfig(similarity=similarity))  # type: ignore[arg-type]
        rows = model.encode(seq).values[torch.tensor([5, 6, 10])]
        if similarity == "l2":
            rows = rows / rows.norm(dim=1, keepdim=True)
        users = model(seq)
        assert users.shape == (4, 8)
        assert torch.allclose(users[[0, 2, 3]], rows, rtol=0, atol=1e-6)
        assert not bool(users[1].any())


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)], ids=["no-users", "one-empty", "all-empty"])
def test_users_without_any_history(lengths: tuple[int, ...]) -> None:
    users = make_model()(make_batch(lengths))
    assert users.shape == (len(lengths), 8)
    assert not bool(users.any())


def test_the_last_user_without_history() -> None:
    users = make_model()(make_batch((3, 0)))
    assert not bool(users[1].any())
    assert bool(users.isfinite().all())


def test_gradient_of_user_vectors_is_finite_with_empty_users() -> None:
    model = make_model().train()
    model(make_batch()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("similarity", ["dot", "l2"])
def test_scores(similarity: str) -> None:
    model = make_model(RetrievalConfig(similarity=similarity, temperature=0.25))  # type: ignore[arg-type]
    items = torch.randn(9, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        users = model(make_batch())
        scores = model.scores(users, items)
    assert scores.shape == (4, 9)
    for b in range(4):
        for i in range(1, 9):
            length = float(items[i].norm()) if similarity == "l2" else 1.0
            assert float(scores[b, i]) == pytest.approx(float(users[b] @ items[i]) / length / 0.25, abs=1e-5)


def test_the_padding_item_is_never_the_best() -> None:
    """All real items point away from the user; the padding row is zero and would win with a score of 0."""
    model = make_model()
    users = model(make_batch((6,)))
    items = torch.cat([torch.zeros(1, 8), -users - 0.01 * torch.rand(5, 8)])
    assert int(model.scores(users, items).argmax()) != 0


def test_request_timestamps_reach_the_encoder() -> None:
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    seq = make_batch((6,))
    assert seq.timestamps is not None
    now = seq.timestamps[-1:]
    assert torch.allclose(model(seq, now), model(seq))
    assert not torch.allclose(model(seq, now + 10**6), model(seq))


# The generative loss.


def test_loss_is_over_the_rows_that_have_a_positive() -> None:
    model = make_model()
    seq, items = make_batch(), torch.randn(9, 8)
    positives = torch.tensor([3, 0, 5, 1, 0, 8, 0, 2, 0, 4, 7])
    rows = model.encode(seq).values
    kept = torch.tensor([0, 2, 3, 5, 7, 9, 10])
    expected = next_item_loss(rows[kept], positives[kept], items, model.retrieval)
    assert float(model.loss(seq, positives, items).detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_loss_without_any_positive_is_zero_and_has_a_gradient() -> None:
    model = make_model().train()
    loss = model.loss(make_batch(), torch.zeros(11, dtype=torch.int64), torch.randn(9, 8))
    assert float(loss.detach()) == 0
    loss.backward()


def test_loss_refuses_positives_of_other_rows() -> None:
    with pytest.raises(ValueError, match=r"^positives: expected \[11\]"):
        make_model().loss(make_batch(), torch.zeros(10, dtype=torch.int64), torch.randn(9, 8))


def test_loss_refuses_contextual_rows_that_see_the_history() -> None:
    model = make_model(mask=AttentionMask(contextual_sees_history=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    plain = make_batch((6, 4))
    seq = replace(plain, layout=replace(plain.layout, contextual_seq_len=1))
    positives, items = torch.ones(10, dtype=torch.int64), torch.randn(9, 8)
    # Why: the last event of a user reaches the user's earlier rows.
    changed = seq.values.clone()
    changed[5] *= -1
    assert not torch.allclose(model.encode(seq).values[1:5], model.encode(seq.with_values(changed)).values[1:5])
    with pytest.raises(ValueError, match=r"^mask.contextual_sees_history: expected False .* has to predict"):
        model.loss(seq, positives, items)
    # Without contextual rows the option does nothing.
    assert bool(model.loss(plain, positives, items).isfinite())


# Learning.


@pytest.mark.parametrize(
    ("variant", "loss", "similarity"),
    [
        ("research", "full_softmax", "l2"),
        ("production", "full_softmax", "dot"),
        ("ultra", "sampled_softmax", "l2"),
        ("research", "bce", "dot"),
    ],
    ids=lambda value: value,
)
def test_learns_a_deterministic_sequence(variant: str, loss: str, similarity: str) -> None:
    """The next item follows from the last two, so that a table of pairs of neighbours is not enough."""
    torch.manual_seed(0)
    items, users, length = 11, 40, 9
    model = HSTURetrieval(
        HSTUConfig(embedding_dim=24, num_layers=2, max_seq_len=length, dropout=0.0, variant=variant),  # type: ignore[arg-type]
        RetrievalConfig(
            loss=loss,  # type: ignore[arg-type]
            similarity=similarity,  # type: ignore[arg-type]
            temperature=0.1 if similarity == "l2" else 1.0,
            num_negatives=32,
        ),
    )
    table = nn.Parameter(torch.randn(items + 1, 24) * 0.1)
    ids = torch.randint(0, items, (users, length + 1))
    for place in range(2, length + 1):
        ids[:, place] = (ids[:, place - 1] + ids[:, place - 2]) % items
    ids += 1
    layout = JaggedLayout.from_lengths(torch.full((users,), length))
    times = (1_700_000_000 + 60 * torch.arange(length)).repeat(users)
    positives = ids[:, 1:].clone()
    # The second item is drawn at random and cannot be known from the first.
    positives[:, 0] = 0
    optimizer = torch.optim.Adam([*model.parameters(), table], lr=1e-2)
    asked = positives.reshape(-1) != 0
    best = 0.0
    for _ in range(15):
        for _ in range(20):
            optimizer.zero_grad()
            seq = JaggedSequence(table[ids[:, :-1].reshape(-1)], layout, times)
            model.loss(seq, positives.reshape(-1), table).backward()
            optimizer.step()
        with torch.no_grad():
            seq = JaggedSequence(table[ids[:, :-1].reshape(-1)], layout, times)
            scores = model.scores(model.encode(seq).values, table)[:, 1:]
            right = scores.argmax(1) + 1 == positives.reshape(-1)
            best = float(right[asked].double().mean())
        if best > 0.95:
            break
    assert best > 0.95


def draw_time_task(table: Tensor, users: int, generator: torch.Generator) -> tuple[JaggedSequence, Tensor, Tensor]:
    """Six different items; the answer is the one that was taken a day before the request, wherever it stands."""
    items, length = table.shape[0] - 1, 6
    ids = 1 + torch.stack([torch.randperm(items, generator=generator)[:length] for _ in range(users)])
    place = torch.randint(0, length, (users,), generator=generator)
    request = 1_700_000_000 + torch.randint(0, 10**7, (users,), generator=generator)
    order = torch.arange(length)
    month, day, minute = 30 * 86_400, 86_400, 60
    ages = torch.where(order < place[:, None], month, torch.where(order == place[:, None], day, minute))
    layout = JaggedLayout.from_lengths(torch.full((users,), length))
    times = (request[:, None] - ages + order).reshape(-1)
    answer = ids.gather(1, place[:, None]).squeeze(1)
    return JaggedSequence(table[ids.reshape(-1)], layout, times), request, answer


def accuracy_on_time_task(time_bias: bool) -> float:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = HSTURetrieval(
        HSTUConfig(embedding_dim=24, num_layers=1, max_seq_len=6, dropout=0.0, time_bias=time_bias),
        RetrievalConfig(temperature=0.1),
    )
    table = nn.Parameter(torch.randn(13, 24) * 0.3)
    optimizer = torch.optim.Adam([*model.parameters(), table], lr=1e-2)
    for _ in range(250):
        seq, request, answer = draw_time_task(table, 64, generator)
        positives = torch.zeros(64, 6, dtype=torch.int64)
        positives[:, -1] = answer
        optimizer.zero_grad()
        model.loss(seq, positives.view(-1), table, request_timestamps=request).backward()
        optimizer.step()
    with torch.no_grad():
        seq, request, answer = draw_time_task(table, 300, generator)
        scores = model.scores(model(seq, request), table)[:, 1:]
        return float((scores.argmax(1) + 1 == answer).double().mean())


def test_learns_what_only_time_can_tell() -> None:
    assert accuracy_on_time_task(time_bias=True) > 0.95


def test_cannot_learn_it_without_the_time_bias() -> None:
    """The control: without times, one of six is a guess."""
    assert accuracy_on_time_task(time_bias=False) < 0.4
