"""Gated norm, output projection and the way into a layer, against plain PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hstu_kernels import UnsupportedBackend, gated_linear, gated_norm, norm_linear_silu
from hstu_kernels.dropout import drop_threshold, kept, new_seed

SEED = torch.tensor([0x1234_5678_9ABC])
affine = pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
concat = pytest.mark.parametrize("concat", [False, True], ids=["single", "concat"])
dropout = pytest.mark.parametrize("p", [0.0, 0.3])


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def gate_leaves(rows: int, width: int, *, with_affine: bool) -> list[Tensor | None]:
    parameters: list[Tensor | None] = [draw(width, seed=3), draw(width, seed=4)] if with_affine else [None, None]
    return [draw(rows, width, seed=1), draw(rows, width, seed=2), *parameters]


def plain_gate(a: Tensor, u: Tensor, weight: Any, bias: Any, *, with_concat: bool, p: float) -> Tensor:
    """In PyTorch's own words; the mask of each part stands behind that of the part before it."""
    gated = F.layer_norm(a, a.shape[1:], weight, bias, 1e-6) * u
    parts = [u, a, gated] if with_concat else [gated]
    if p:
        parts = [x * kept(SEED, x.shape[0], x.shape[1], p, i) / (1 - p) for i, x in enumerate(parts)]
    return torch.cat(parts, 1)


def same(call: Callable[..., Tensor], expected: Callable[..., Tensor], leaves: list[Tensor | None]) -> None:
    """Output and all gradients agree to rounding."""
    given = [leaf for leaf in leaves if leaf is not None]
    results = []
    for function in (call, expected):
        out = function(*leaves)
        back = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
        results.append((out, *torch.autograd.grad(out, given, back)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@affine
@concat
@dropout
@pytest.mark.parametrize(("rows", "width"), [(1, 5), (63, 24), (0, 8)], ids=str)
def test_the_gated_norm_is_the_composition(rows: int, width: int, affine: bool, concat: bool, p: float) -> None:
    same(
        lambda *x: gated_norm(*x, eps=1e-6, dropout=p, seed=SEED, concat=concat),
        lambda *x: plain_gate(*x, with_concat=concat, p=p),
        gate_leaves(rows, width, with_affine=affine),
    )


@affine
@concat
@dropout
@pytest.mark.parametrize("store", [True, False], ids=["stored", "again"])
def test_the_output_projection_is_the_composition(store: bool, affine: bool, concat: bool, p: float) -> None:
    width = 24
    leaves = gate_leaves(33, width, with_affine=affine)
    leaves += [draw(7, width * (3 if concat else 1), seed=5), draw(7, seed=6) if affine else None]
    same(
        lambda *x: gated_linear(*x, eps=1e-6, dropout=p, seed=SEED, concat=concat, store_gated=store),
        lambda *x: F.linear(plain_gate(*x[:4], with_concat=concat, p=p), *x[4:]),
        leaves,
    )


@affine
@pytest.mark.parametrize("activated", [40, 10, 0])
@pytest.mark.parametrize("stored", [(True, True), (False, True), (True, False), (False, False)], ids=str)
def test_the_projection_is_the_composition(stored: tuple[bool, bool], activated: int, affine: bool) -> None:
    parameters: list[Tensor | None] = [draw(16, seed=2), draw(16, seed=3)] if affine else [None, None]
    leaves = [draw(33, 16, seed=1), *parameters, draw(40, 16, seed=4), draw(40, seed=5) if affine else None]

    def expected(x: Tensor, norm_weight: Any, norm_bias: Any, weight: Tensor, bias: Any) -> Tensor:
        mixed = F.linear(F.layer_norm(x, (16,), norm_weight, norm_bias, 1e-6), weight, bias)
        return torch.cat([F.silu(mixed[:, :activated]), mixed[:, activated:]], 1)

    options = {"eps": 1e-6, "activated": activated, "store_normed": stored[0], "store_mixed": stored[1]}
    same(lambda *x: norm_linear_silu(*x, **options), expected, leaves)


def test_gradients_by_differences() -> None:
    leaves = gate_leaves(3, 5, with_affine=True)
    assert torch.autograd.gradcheck(
        lambda *x: gated_norm(*x, eps=1e-3, dropout=0.4, seed=SEED, concat=True), leaves, check_batched_grad=False
    )
    x, weight = draw(3, 5, seed=1), draw(8, 5, seed=2)
    assert torch.autograd.gradcheck(lambda *y: norm_linear_silu(y[0], None, None, y[1], None, eps=1e-3), (x, weight))


@pytest.mark.parametrize("name", ["store_gated", "store_normed", "store_mixed"])
def test_what_is_not_stored_takes_no_memory(name: str) -> None:
    def stored(**options: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            if name == "store_gated":
                leaves = [*gate_leaves(64, 16, with_affine=False), draw(8, 16, seed=5), None]
                out = gated_linear(*leaves, eps=1e-6, **options)  # type: ignore[arg-type]
            else:
                leaves = [draw(64, 16), None, None, draw(32, 16), None]
                out = norm_linear_silu(*leaves, eps=1e-6, **options)  # type: ignore[arg-type]
        assert out.requires_grad
        return sum(sizes.values())

    assert stored(**{name: True}) - stored(**{name: False}) == 64 * (32 if name == "store_mixed" else 16)


def test_dropout_follows_its_seed_and_keeps_the_right_share() -> None:
    p, rows, columns = 0.2, 2000, 130
    mask = kept(SEED, rows, columns, p)
    assert torch.equal(mask, kept(SEED, rows, columns, p))
    # A sequence's rows drop the same whatever stands behind them, and a part has a mask of its own.
    assert torch.equal(mask[:10], kept(SEED, 10, columns, p))
    assert not torch.equal(mask, kept(SEED, rows, columns, p, part=1))
    assert not torch.equal(mask, kept(SEED + 1, rows, columns, p))
    deviation = (p * (1 - p) / (rows * columns)) ** 0.5
    assert abs(float(mask.double().mean()) - (1 - p)) < 5 * deviation
    for other in (mask.roll(1, 0), mask.roll(1, 1), mask.roll(4, 1)):
        both = float((mask & other).double().mean())
        assert abs(both - (1 - p) ** 2) < 0.005
    assert (drop_threshold(0.0), drop_threshold(0.5)) == (0, 2**31)


def test_philox_gives_the_published_words() -> None:
    """Known answer of Philox-4x32-10 for a counter and key of zeros."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    for column, word in enumerate(words):
        below, above = word / 2**32, (word + 1) / 2**32
        assert bool(kept(torch.tensor([0]), 1, 4, below)[0, column])
        assert not bool(kept(torch.tensor([0]), 1, 4, above)[0, column])


def test_seeds_follow_the_generator() -> None:
    torch.manual_seed(5)
    first = new_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(first, new_seed(torch.device("cpu")))
    a, u, *_ = gate_leaves(8, 8, with_affine=False)
    assert a is not None and u is not None
    torch.manual_seed(5)
    drawn = gated_norm(a, u, eps=1e-6, dropout=0.5)
    assert torch.equal(drawn, gated_norm(a, u, eps=1e-6, dropout=0.5, seed=first))
    assert not torch.equal(drawn, gated_norm(a, u, eps=1e-6, dropout=0.5))


def test_half_precision_keeps_statistics_wide() -> None:
    a, u = (draw(16, 32, dtype=torch.bfloat16, seed=s) for s in (1, 2))
    exact = gated_norm(a.double(), u.double(), eps=1e-6)
    out = gated_norm(a, u, eps=1e-6)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.bfloat16())


def test_autocast_runs_the_products_in_its_precision() -> None:
    x, weight = draw(9, 16, dtype=torch.float32), draw(24, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = norm_linear_silu(x, None, None, weight, None, eps=1e-6)
        out = gated_linear(x, x, None, None, draw(5, 16, dtype=torch.float32), None, eps=1e-6)
    assert mixed.dtype == out.dtype == torch.bfloat16
    dx, dweight = torch.autograd.grad(mixed.float().sum(), (x, weight))
    assert dx.dtype == dweight.dtype == torch.float32


def test_compiles_into_one_graph() -> None:
    a, u, *_ = gate_leaves(8, 16, with_affine=False)
    weight, out_weight = draw(16, 16, seed=3), draw(4, 16, seed=4)

    def layer(a: Tensor, u: Tensor) -> Tensor:
        mixed = norm_linear_silu(a, None, None, weight, None, eps=1e-6, store_mixed=False)
        return gated_linear(mixed, u, None, None, out_weight, None, eps=1e-6, dropout=0.5, seed=SEED)

    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    same(graph, layer, [a, u])


def test_errors_name_the_argument() -> None:
    x, u = torch.zeros(3, 8), torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"u: expected the shape of attended \(3, 8\), got \(3, 4\)"):
        gated_norm(x, u[:, :4], eps=1e-6)
    with pytest.raises(TypeError, match=r"u: expected torch\.float32"):
        gated_norm(x, u.double(), eps=1e-6)
    with pytest.raises(ValueError, match=r"weight: expected \[8\]"):
        gated_norm(x, u, torch.zeros(3), eps=1e-6)
    with pytest.raises(ValueError, match="dropout: expected a probability"):
        gated_norm(x, u, eps=1e-6, dropout=1.0)
    with pytest.raises(ValueError, match=r"seed: expected \[1\] int64"):
        gated_norm(x, u, eps=1e-6, dropout=0.1, seed=torch.zeros(1))
    with pytest.raises(ValueError, match=r"out_weight: expected \[D, 24\]"):
        gated_linear(x, u, None, None, torch.zeros(4, 8), None, eps=1e-6, concat=True)
    with pytest.raises(ValueError, match=r"weight: expected \[C, 8\]"):
        norm_linear_silu(x, None, None, torch.zeros(4, 9), None, eps=1e-6)
    with pytest.raises(ValueError, match=r"activated: expected a number in \[0, 4\]"):
        norm_linear_silu(x, None, None, torch.zeros(4, 8), None, eps=1e-6, activated=5)
    with pytest.raises(UnsupportedBackend, match="triton"):
        gated_norm(x, u, eps=1e-6, backend="triton")
