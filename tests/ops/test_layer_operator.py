"""The layer as one operation: the same function, gradients and dropout as its parts, from fewer stored bytes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu_kernels import JaggedLayout, UnsupportedBackend
from hstu_kernels.layer import LayerOptions, LayerWeights, hstu_layer
from tests.ops.layer_cases import composed, make_leaves, make_options, production, results, whole

SEED = torch.tensor([0x1234_5678_9ABC])
LENGTHS = (9, 0, 14, 1)
ROWS = sum(LENGTHS)
TIMES = torch.arange(ROWS) * 977
FLAGS = ("store_normed", "store_uvqk", "store_gated")
STORED = [dict(zip(FLAGS, values, strict=True)) for values in itertools.product([True, False], repeat=3)]
stored = pytest.mark.parametrize("stored", STORED, ids=lambda s: "+".join(n[6:] for n in s if s[n]) or "least")
form = pytest.mark.parametrize("make", [make_options, production], ids=["single", "concat"])
affine = pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])


def layout() -> JaggedLayout:
    return JaggedLayout.from_lengths(torch.tensor(LENGTHS))


def options_of(leaves_of: LayerOptions) -> dict[str, Any]:
    return {"options": leaves_of, "layout": layout(), "seed": SEED, "backend": "eager", "times": TIMES}


@stored
@form
@affine
def test_it_is_the_composition(affine: bool, make: Any, stored: dict[str, bool]) -> None:
    options = make(**stored)
    leaves = make_leaves(options, ROWS, affine=affine, tables=(31, 17))
    got = results(whole(leaves, **options_of(options)), leaves)
    wanted = results(composed(leaves, **options_of(options)), leaves)
    assert len(got) == (12 if affine else 7)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@affine
def test_gradients_by_differences(affine: bool) -> None:
    options = make_options(store_uvqk=False, dropout=0.4)
    leaves = make_leaves(options, 5, affine=affine)
    short = JaggedLayout.from_lengths(torch.tensor([3, 2]))

    def call(*values: Tensor) -> Tensor:
        given = dict(zip(leaves, values, strict=True))
        return whole(given, options, short, seed=SEED, backend="eager", times=TIMES)

    inputs = [leaf for leaf in leaves.values() if leaf is not None]
    assert torch.autograd.gradcheck(call, inputs, check_batched_grad=False)


@stored
def test_a_second_backward_through_a_kept_graph(stored: dict[str, bool]) -> None:
    options = make_options(**stored)
    leaves = make_leaves(options, ROWS, affine=True)
    out = whole(leaves, **options_of(options)).square().sum()
    given = [leaf for leaf in leaves.values() if leaf is not None]
    first = torch.autograd.grad(out, given, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(out, given), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("frozen", ["x", "uvqk", "output", "norm_weight", "gate_bias", "uvqk_bias", "output_bias"])
def test_frozen_inputs_have_no_gradient_and_change_no_other(frozen: str) -> None:
    options = make_options()
    leaves = make_leaves(options, ROWS, affine=True)
    wanted = results(whole(leaves, **options_of(options)), leaves)
    leaf = leaves[frozen]
    assert leaf is not None
    leaf.requires_grad_(False)
    got = results(whole(leaves, **options_of(options)), leaves)
    assert set(wanted) - set(got) == {frozen}
    for name, value in got.items():
        assert torch.equal(value, wanted[name])


# Rows of float64 of one layer of width 12 with H Dv 20 and H Dqk 12: the normed rows or, where the norm has parameters,
# rows and normed rows; the projection twice; the attention's output; the gated rows.
PLAIN, UVQK, GATED = 12 + 2 * 64 + 20 + 20, 2 * 64, 20


@stored
@affine
def test_stored_bytes(affine: bool, stored: dict[str, bool]) -> None:
    options = make_options(**stored)
    leaves = make_leaves(options, ROWS, affine=affine)
    known = {leaf.data_ptr() for name, leaf in leaves.items() if leaf is not None and name != "x"}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = whole(leaves, **options_of(options))
    assert out.requires_grad
    expected = PLAIN - (0 if stored["store_uvqk"] else UVQK) - (0 if stored["store_gated"] else GATED)
    if affine and stored["store_normed"]:
        expected += 12
    # Two statistics of the gate, one of the norm, two where it has parameters; and the seed.
    statistics = 4 if affine else 3
    assert sum(storages.values()) == 8 * (ROWS * (expected + statistics) + 1)


def test_a_plain_norm_lets_its_input_go() -> None:
    """Nothing is left that would notice a change of the input behind the forward."""
    options = make_options()
    leaves = make_leaves(options, ROWS, affine=False)
    wanted = results(whole(leaves, **options_of(options)), leaves)
    x = leaves["x"]
    assert x is not None
    out = whole(leaves, **options_of(options))
    with torch.no_grad():
        x.add_(1)
    got = results(out, leaves)
    for name, value in wanted.items():
        assert torch.equal(got[name], value)


def test_dropout_drops_the_same_elements_when_the_gate_runs_again() -> None:
    options = make_options(store_gated=False, dropout=0.6)
    leaves = make_leaves(options, ROWS, affine=True)
    kept = results(whole(leaves, **options_of(replace(options, store_gated=True))), leaves)
    again = results(whole(leaves, **options_of(options)), leaves)
    for name, value in kept.items():
        assert torch.equal(again[name], value)
    other = results(
        whole(leaves, options, layout(), seed=SEED + 1, backend="eager", times=TIMES),
        leaves,
    )
    assert not torch.equal(other["out"], kept["out"])


def test_seeds_follow_the_generator() -> None:
    options = make_options(dropout=0.5)
    leaves = make_leaves(options, ROWS, affine=False)
    x = leaves["x"]
    assert x is not None
    weights = LayerWeights(None, None, leaves["uvqk"], None, None, None, leaves["output"], None)  # type: ignore[arg-type]

    def drawn() -> Tensor:
        return hstu_layer(x, weights, options, layout(), backend="eager")

    torch.manual_seed(5)
    first = drawn()
    assert not torch.equal(first, drawn())
    torch.manual_seed(5)
    assert torch.equal(first, drawn())


def test_autocast_runs_the_products_in_its_precision() -> None:
    options = make_options()
    leaves = make_leaves(options, ROWS, affine=True, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = whole(leaves, **options_of(options))
    # The sum over the layers stays in float32.
    assert out.dtype == torch.float32
    got = results(out, leaves)
    for name, leaf in leaves.items():
        assert leaf is not None
        assert got[name].dtype == leaf.dtype
    wide = {name: None if leaf is None else leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    truth = results(whole(wide, **options_of(options)), wide)
    for name, value in truth.items():
        assert float((got[name].double() - value).norm() / value.norm()) < 0.02, name


def test_an_empty_batch() -> None:
    options = make_options()
    leaves = make_leaves(options, 0, affine=True)
    empty = JaggedLayout.from_lengths(torch.tensor([0, 0]))
    out = whole(leaves, options, empty, seed=SEED, backend="eager", times=TIMES[:0])
    for name, value in results(out, leaves).items():
        assert bool((value == 0).all()), name


def test_errors_name_the_argument() -> None:
    options = make_options()
    leaves = make_leaves(options, ROWS, affine=False)
    common = options_of(options)
    with pytest.raises(ValueError, match=r"uvqk: expected \[64, 12\], got \(3, 12\)"):
        whole(leaves | {"uvqk": torch.zeros(3, 12)}, **common)
    with pytest.raises(ValueError, match=r"output: expected \[12, 20\], got \(12, 60\)"):
        whole(leaves | {"output": torch.zeros(12, 60)}, **common)
    with pytest.raises(ValueError, match=r"x: expected \[L, D\]"):
        whole(leaves | {"x": torch.zeros(2, 3, 4)}, **common)
    with pytest.raises(ValueError, match="dropout: expected a probability"):
        whole(leaves, **options_of(replace(options, dropout=1.0)))
    with pytest.raises(ValueError, match=r"activated: expected a number in \[0, 64\], got 65"):
        whole(leaves, **options_of(replace(options, activated=65)))
    with pytest.raises(UnsupportedBackend, match="no backward of its own"):
        whole(leaves, **(common | {"backend": "reference"}))
    with pytest.raises(ValueError, match="rows"):
        whole(leaves | {"x": torch.zeros(7, 12)}, **common)
