"""Objectives against loops over the same draws; samplers; what is never scored."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hstu_plugin import losses
from hstu_plugin.config import RetrievalConfig, Similarity
from hstu_plugin.losses import next_item_loss, normalise

ITEMS, WIDTH = 12, 5
POSITIVES = torch.tensor([3, 7, 3, 11, 1, 7, 3])
similarities = pytest.mark.parametrize("similarity", ["dot", "l2"])


def tensors(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    users = torch.randn(len(POSITIVES), WIDTH, dtype=torch.float64, generator=generator)
    return users, torch.randn(ITEMS, WIDTH, dtype=torch.float64, generator=generator)


def config(**options: Any) -> RetrievalConfig:
    return RetrievalConfig(**{"temperature": 0.5, "num_negatives": 6, **options})


def score(user: Tensor, item: Tensor, similarity: str) -> float:
    dot = float(sum(a * b for a, b in zip(user.tolist(), item.tolist(), strict=True)))
    if similarity == "l2":
        dot /= math.sqrt(sum(a * a for a in user.tolist())) * math.sqrt(sum(a * a for a in item.tolist()))
    return dot / 0.5


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform_draw() -> list[list[int]]:
    """The draw that the loss makes from `generator`: ids 1 to 11."""
    return torch.randint(1, ITEMS, (len(POSITIVES), 6), generator=generator()).tolist()


def in_batch_draw() -> list[list[int]]:
    chosen = torch.randint(0, len(POSITIVES), (len(POSITIVES), 6), generator=generator())
    return POSITIVES[chosen].tolist()


@similarities
def test_full_softmax(similarity: str) -> None:
    users, items = tensors()
    total = 0.0
    for user, positive in zip(users, POSITIVES.tolist(), strict=True):
        # From 1: the padding has no place in the sum.
        scores = [score(user, items[i], similarity) for i in range(1, ITEMS)]
        total += math.log(sum(math.exp(s) for s in scores)) - scores[positive - 1]
    got = next_item_loss(users, POSITIVES, items, config(loss="full_softmax", similarity=similarity))
    assert float(got) == pytest.approx(total / len(POSITIVES), rel=1e-5)


@similarities
@pytest.mark.parametrize("logq", [False, True], ids=["plain", "logq"])
@pytest.mark.parametrize("source", ["uniform", "in_batch"])
def test_sampled_softmax(source: str, logq: bool, similarity: str) -> None:
    users, items = tensors()
    draws = uniform_draw() if source == "uniform" else in_batch_draw()
    assert any(p in drawn for p, drawn in zip(POSITIVES.tolist(), draws, strict=True)), "the draw has no collision"
    share = {3: 3 / 7, 7: 2 / 7, 11: 1 / 7, 1: 1 / 7}
    total = 0.0
    for user, positive, drawn in zip(users, POSITIVES.tolist(), draws, strict=True):
        # The positive is counted once, however often it was drawn.
        candidates = [positive, *(i for i in drawn if i != positive)]
        scores = [score(user, items[i], similarity) for i in candidates]
        if logq and source == "in_batch":
            scores = [s - math.log(share[i]) for s, i in zip(scores, candidates, strict=True)]
        total += math.log(sum(math.exp(s) for s in scores)) - scores[0]
    options = config(loss="sampled_softmax", similarity=similarity, negatives=source, logq_correction=logq)
    got = next_item_loss(users, POSITIVES, items, options, generator=generator())
    assert float(got) == pytest.approx(total / len(POSITIVES), rel=1e-5)


@similarities
@pytest.mark.parametrize("source", ["uniform", "in_batch"])
def test_bce(source: str, similarity: str) -> None:
    users, items = tensors()
    draws = uniform_draw() if source == "uniform" else in_batch_draw()
    total = 0.0
    for user, positive, drawn in zip(users, POSITIVES.tolist(), draws, strict=True):
        kept = [score(user, items[i], similarity) for i in drawn if i != positive]
        negative = sum(softplus(s) for s in kept) / len(kept) if kept else 0.0
        total += softplus(-score(user, items[positive], similarity)) + negative
    options = config(loss="bce", similarity=similarity, negatives=source)
    got = next_item_loss(users, POSITIVES, items, options, generator=generator())
    assert float(got) == pytest.approx(total / len(POSITIVES), rel=1e-9)


def test_in_batch_positives_alone_give_no_signal() -> None:
    """All rows share one positive: every negative collides, none pushes."""
    users, items = tensors()
    same = torch.full_like(POSITIVES, 4)
    options = config(loss="sampled_softmax", negatives="in_batch")
    assert float(next_item_loss(users, same, items, options)) == pytest.approx(0, abs=1e-12)
    only_positive = sum(softplus(-score(user, items[4], "l2")) for user in users) / len(users)
    got = next_item_loss(users, same, items, config(loss="bce", negatives="in_batch"))
    assert float(got) == pytest.approx(only_positive, rel=1e-9)


def test_many_uniform_negatives_approach_the_full_softmax() -> None:
    """With n draws the sum over negatives estimates n / (items - 1) times the sum over all others."""
    users, items = tensors()
    draws = 200_000
    options = config(loss="sampled_softmax", num_negatives=draws)
    got = float(next_item_loss(users, POSITIVES, items, options, generator=generator()))
    total = 0.0
    for user, positive in zip(users, POSITIVES.tolist(), strict=True):
        own = math.exp(score(user, items[positive], "l2"))
        others = sum(math.exp(score(user, items[i], "l2")) for i in range(1, ITEMS) if i != positive)
        total += math.log(own + others * draws / (ITEMS - 1)) - math.log(own)
    assert got == pytest.approx(total / len(POSITIVES), abs=5e-3)


def test_in_batch_correction_removes_popularity() -> None:
    """Corrected in-batch sampling estimates the softmax over the distinct items, each counted once."""
    users, items = tensors()
    draws = 200_000
    options = config(loss="sampled_softmax", negatives="in_batch", num_negatives=draws)
    got = float(next_item_loss(users, POSITIVES, items, options, generator=generator()))
    share = {3: 3 / 7, 7: 2 / 7, 11: 1 / 7, 1: 1 / 7}
    total = 0.0
    for user, positive in zip(users, POSITIVES.tolist(), strict=True):
        own = math.exp(score(user, items[positive], "l2")) / share[positive]
        others = sum(math.exp(score(user, items[i], "l2")) for i in share if i != positive)
        total += math.log(own + others * draws) - math.log(own)
    assert got == pytest.approx(total / len(POSITIVES), abs=5e-3)


LOSSES = {
    "full": {"loss": "full_softmax"},
    "sampled-uniform": {"loss": "sampled_softmax"},
    "sampled-in-batch": {"loss": "sampled_softmax", "negatives": "in_batch"},
    "bce-uniform": {"loss": "bce"},
    "bce-in-batch": {"loss": "bce", "negatives": "in_batch"},
}
any_loss = pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES.keys())


@any_loss
@similarities
def test_padding_is_never_scored(options: dict[str, Any], similarity: str) -> None:
    users, items = tensors()
    options = {**options, "similarity": similarity, "num_negatives": 500}
    items.requires_grad_()
    loss = next_item_loss(users, POSITIVES, items, config(**options), generator=generator())
    loss.backward()
    assert items.grad is not None
    assert float(items.grad[0].abs().max()) == 0
    assert float(items.grad[1:].abs().max()) > 1e-4
    moved = items.detach().clone()
    moved[0] += 100
    again = next_item_loss(users, POSITIVES, moved, config(**options), generator=generator())
    assert float(again) == float(loss.detach())


@any_loss
@similarities
def test_gradients(options: dict[str, Any], similarity: str) -> None:
    users, items = tensors()
    options = {**options, "similarity": similarity}

    def call(users: Tensor, items: Tensor) -> Tensor:
        return next_item_loss(users, POSITIVES, items, config(**options), generator=generator())

    leaves = users.requires_grad_(), items.requires_grad_()
    if options["loss"] == "bce":
        assert torch.autograd.gradcheck(call, leaves)
        return
    # The softmax losses end in float32: compare slopes along one direction, with a step that float32 resolves.
    loss = call(*leaves)
    grads = torch.autograd.grad(loss, leaves)
    directions = [torch.randn(x.shape, dtype=x.dtype, generator=generator(9)) for x in leaves]
    slope = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=True))
    step = 1e-2
    ahead, behind = (
        float(call(*(x.detach() + sign * step * d for x, d in zip(leaves, directions, strict=True))))
        for sign in (1, -1)
    )
    assert (ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-2, abs=1e-3)


@any_loss
def test_no_rows(options: dict[str, Any]) -> None:
    users = torch.zeros(0, WIDTH, requires_grad=True)
    items = torch.randn(ITEMS, WIDTH, requires_grad=True)
    loss = next_item_loss(users, POSITIVES[:0], items, config(**options))
    assert loss.shape == ()
    assert float(loss.detach()) == 0
    loss.backward()
    assert users.grad is not None
    # Data-parallel training waits for the table's gradient, too; not even a broken table may spoil it.
    assert items.grad is not None
    assert not bool(items.grad.any())


def test_no_rows_beside_a_table_that_is_not_finite() -> None:
    loss = next_item_loss(torch.zeros(0, WIDTH), POSITIVES[:0], torch.full((ITEMS, WIDTH), math.inf), config())
    assert float(loss) == 0


@pytest.mark.parametrize("loss", ["sampled_softmax", "bce"])
@pytest.mark.parametrize("items", [1, 2])
def test_uniform_negatives_need_a_second_item(items: int, loss: str) -> None:
    users, table = tensors()
    with pytest.raises(ValueError, match=rf"^items: expected at least 2 items .* got {items - 1}; use loss=full"):
        next_item_loss(users, torch.ones_like(POSITIVES), table[:items], config(loss=loss))


@any_loss
def test_a_seeded_generator_repeats(options: dict[str, Any]) -> None:
    users, items = tensors()
    first = float(next_item_loss(users, POSITIVES, items, config(**options), generator=generator(1)))
    assert float(next_item_loss(users, POSITIVES, items, config(**options), generator=generator(1))) == first
    other = float(next_item_loss(users, POSITIVES, items, config(**options), generator=generator(2)))
    assert (other == first) is (options["loss"] == "full_softmax")


@any_loss
def test_loss_falls_when_the_positive_comes_nearer(options: dict[str, Any]) -> None:
    users, items = tensors()
    far = float(next_item_loss(users, POSITIVES, items, config(**options), generator=generator()))
    nearer = users + 2 * items[POSITIVES]
    assert float(next_item_loss(nearer, POSITIVES, items, config(**options), generator=generator())) < far


def test_normalise() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert normalise(x, Similarity.DOT) is x
    assert torch.allclose(normalise(x, Similarity.L2), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_normalise_has_a_finite_gradient_at_zero() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    normalise(x, Similarity.L2).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


# The full softmax, chunk of rows by chunk.


@pytest.fixture(params=[1, 3, 100], ids=lambda rows: f"{rows}-rows-at-once")
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CPU_CHUNK", request.param * (ITEMS - 1))


def full_softmax(users: Tensor, items: Tensor) -> Tensor:
    return next_item_loss(users, POSITIVES, items, config(loss="full_softmax", similarity="dot"))


def plain_softmax(users: Tensor, items: Tensor) -> Tensor:
    return F.cross_entropy(users @ items[1:].T / 0.5, POSITIVES - 1)


@pytest.mark.usefixtures("chunks")
def test_chunked_softmax_is_the_cross_entropy() -> None:
    users, items = tensors()
    leaves = users.requires_grad_(), items.requires_grad_()
    got, expected = full_softmax(*leaves), plain_softmax(*leaves)
    assert got.dtype == torch.float64
    assert torch.allclose(got, expected, rtol=1e-14, atol=0)
    # Another factor than 1 in front, as gradient scaling has it.
    for one, other in zip(torch.autograd.grad(3 * got, leaves), torch.autograd.grad(3 * expected, leaves), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(full_softmax, leaves)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("frozen", [0, 1], ids=["users", "items"])
def test_chunked_softmax_with_one_side_frozen(frozen: int) -> None:
    leaves = list(tensors())
    leaf = leaves[1 - frozen].requires_grad_()
    got, expected = (torch.autograd.grad(f(*leaves), leaf)[0] for f in (full_softmax, plain_softmax))
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("table", [torch.bfloat16, torch.float32], ids=str)
def test_chunked_softmax_in_bfloat16(table: torch.dtype) -> None:
    users, items = tensors()
    leaves = users.bfloat16().requires_grad_(), items.to(table).requires_grad_()
    loss = full_softmax(*leaves)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(plain_softmax(users, items)), rel=0.02)
    loss.backward()
    exact = users.clone().requires_grad_()
    plain_softmax(exact, items).backward()
    assert leaves[0].grad is not None
    assert leaves[0].grad.dtype == torch.bfloat16
    assert leaves[1].grad is not None
    assert leaves[1].grad.dtype == table
    assert exact.grad is not None
    assert torch.allclose(leaves[0].grad.double(), exact.grad, rtol=0.05, atol=0.05 * float(exact.grad.abs().max()))


@any_loss
def test_half_precision_users_beside_a_float32_table(options: dict[str, Any]) -> None:
    users, items = tensors()
    exact = float(next_item_loss(users, POSITIVES, items, config(**options), generator=generator()))
    got = next_item_loss(users.bfloat16(), POSITIVES, items.float(), config(**options), generator=generator())
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(exact, rel=0.02)


@pytest.mark.usefixtures("chunks")
def test_chunked_softmax_without_gradients() -> None:
    leaves = [x.requires_grad_() for x in tensors()]
    with torch.no_grad():
        loss = full_softmax(*leaves)
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(float(plain_softmax(*leaves).detach()), rel=1e-14)


def test_chunked_softmax_has_no_second_derivative() -> None:
    users, items = tensors()
    users.requires_grad_()
    (slope,) = torch.autograd.grad(full_softmax(users, items).square(), users, create_graph=True)
    # torch 2.6 words it differently
    with pytest.raises(RuntimeError, match=r"once_differentiable|custom autograd function"):
        slope.square().sum().backward()
