"""The Triton kernels around the attention in Triton's interpreter; run by `test_layer_interpreter.py`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu_kernels import JaggedLayout, gated_linear, gated_norm, norm_linear_silu
from hstu_kernels.gated_norm import ops as gate_ops
from hstu_kernels.projection import ops as silu_ops
from hstu_kernels.testing import poisoned_empty
from hstu_plugin.config import HSTUConfig, Variant
from hstu_plugin.layer import HSTULayer

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_layer_interpreter.py"
torch.set_num_threads(1)
SEED = torch.tensor([0x1234_5678_9ABC])


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def run(call: Callable[..., Tensor], leaves: list[Tensor | None]) -> list[Tensor]:
    given = [leaf for leaf in leaves if leaf is not None]
    out = call(*leaves)
    back = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, given, back)]


def within_budget(call: Callable[..., Tensor], leaves: list[Tensor | None]) -> None:
    """As near to float64 as eager PyTorch in the same precision, by a factor of two."""
    wide = [None if x is None else x.detach().double().requires_grad_() for x in leaves]
    truth = run(lambda *x: call(*x, backend="eager"), wide)
    rounded = run(lambda *x: call(*x, backend="eager"), leaves)
    with poisoned_empty():
        got = run(lambda *x: call(*x, backend="triton"), leaves)
    for i, (wanted, near, result) in enumerate(zip(truth, rounded, got, strict=True)):
        assert result.shape == near.shape
        assert result.dtype == near.dtype
        if wanted.numel() == 0:
            continue
        # A few units in the last place: both sides round sums of their own order.
        eps = 4 * torch.finfo(result.dtype).eps * float(wanted.abs().max())
        budget = 2 * float((near.double() - wanted).abs().max()) + eps
        error = float((result.double() - wanted).abs().max())
        assert error <= budget, f"result {i}: error {error:.3g}, budget {budget:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("concat", [False, True], ids=["single", "concat"])
@pytest.mark.parametrize(("rows", "width", "affine"), [(1, 20, True), (300, 24, False), (67, 128, True), (0, 8, False)])
def test_gated_norm(rows: int, width: int, affine: bool, concat: bool, p: float, dtype: torch.dtype) -> None:
    a, u = (draw(rows, width, dtype=dtype, seed=s) for s in (1, 2))
    parameters = [draw(width, dtype=torch.float32, seed=s) if affine else None for s in (3, 4)]
    options: dict[str, Any] = {"eps": 1e-6, "dropout": p, "seed": SEED, "concat": concat}
    within_budget(lambda *x, backend: gated_norm(*x, **options, backend=backend), [a, u, *parameters])


def test_dropout_drops_the_same_elements_everywhere() -> None:
    a, u = (draw(131, 37, dtype=torch.float32, seed=s) for s in (1, 2))
    zeros = [
        gated_norm(a, u, eps=1e-6, dropout=0.4, seed=SEED, concat=True, backend=b) == 0 for b in ("eager", "triton")
    ]
    assert torch.equal(*zeros)


def test_columns_of_a_wider_tensor_need_no_copy() -> None:
    wide = torch.randn(33, 48)
    a, u = wide[:, :24], wide[:, 24:]
    together = gated_norm(a, u, eps=1e-6, backend="triton")
    assert torch.equal(together, gated_norm(a.contiguous(), u.contiguous(), eps=1e-6, backend="triton"))


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "again"])
def test_gated_linear(stored: bool) -> None:
    a, u = (draw(67, 24, dtype=torch.float32, seed=s) for s in (1, 2))
    weight, bias = draw(10, 24, dtype=torch.float32, seed=3), draw(10, dtype=torch.float32, seed=4)
    options: dict[str, Any] = {"eps": 1e-6, "dropout": 0.3, "seed": SEED, "store_gated": stored}
    within_budget(lambda *x, backend: gated_linear(*x, **options, backend=backend), [a, u, None, None, weight, bias])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activated", [40, 10])
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "again"])
def test_norm_linear_silu(stored: bool, activated: int, dtype: torch.dtype) -> None:
    x, weight = draw(67, 24, dtype=dtype, seed=1), draw(40, 24, dtype=dtype, seed=2)
    parameters = [draw(24, dtype=torch.float32, seed=s) for s in (3, 4)]
    options: dict[str, Any] = {"eps": 1e-6, "activated": activated, "store_normed": stored, "store_mixed": stored}
    leaves = [x, *parameters, weight, draw(40, dtype=dtype, seed=5)]
    within_budget(lambda *y, backend: norm_linear_silu(*y, **options, backend=backend), leaves)


@pytest.mark.parametrize("concat", [False, True], ids=["single", "concat"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_operators_are_registered_right(concat: bool, affine: bool) -> None:
    a, u = (torch.randn(9, 20) for _ in range(2))
    parameters = [torch.randn(20) if affine else None for _ in range(2)]
    torch.library.opcheck(gate_ops.gate_forward, (a, u, *parameters, SEED, 1e-6, 0.3, concat, torch.float16))
    out, mean, rstd = gate_ops.gate_forward(a, u, *parameters, SEED, 1e-6, 0.3, concat, torch.float32)
    torch.library.opcheck(gate_ops.gate_backward, (out, a, u, *parameters, mean, rstd, SEED, 0.3, concat))
    torch.library.opcheck(silu_ops.column_silu, (a, 7))
    torch.library.opcheck(silu_ops.column_silu_backward, (u, a, 7))


def test_a_layer_compiles_into_one_graph() -> None:
    x, weight, out_weight = (
        draw(*n, dtype=torch.float32, seed=s) for s, n in ((1, (9, 16)), (2, (32, 16)), (3, (8, 16)))
    )

    def layer(x: Tensor, weight: Tensor, out_weight: Tensor) -> Tensor:
        mixed = norm_linear_silu(x, None, None, weight, None, eps=1e-6, activated=16, backend="triton")
        a, u = mixed.split(16, 1)
        options: dict[str, Any] = {"eps": 1e-6, "dropout": 0.3, "seed": SEED, "backend": "triton"}
        return gated_linear(a, u, None, None, out_weight, None, **options)

    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaves: list[Tensor | None] = [x, weight, out_weight]
    for got, wanted in zip(run(graph, leaves), run(layer, leaves), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("variant", list(Variant), ids=str)
def test_a_layer_of_the_plugin_runs_in_these_kernels(variant: Variant) -> None:
    """The same outputs and gradients as in PyTorch's own operations."""
    lengths = torch.tensor([9, 0, 14])
    layout = JaggedLayout.from_lengths(lengths)
    times = torch.arange(23) * 977
    results = []
    for backend in ("eager", "triton"):
        torch.manual_seed(0)
        config = HSTUConfig(embedding_dim=32, num_heads=2, max_seq_len=16, variant=variant, backend=backend)
        layer = HSTULayer(config).eval()
        x = torch.randn(23, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = layer(x, layout, times, times)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_in_training_drops_its_share() -> None:
    config = HSTUConfig(embedding_dim=32, num_heads=1, max_seq_len=16, dropout=0.5, backend="triton")
    layer = HSTULayer(config)
    layout, x = JaggedLayout.from_lengths(torch.tensor([12])), torch.randn(12, 32)
    first, second = (layer(x, layout, torch.arange(12), torch.arange(12)) for _ in range(2))
    assert not torch.equal(first, second)
    layer.eval()
    again = [layer(x, layout, torch.arange(12), torch.arange(12)) for _ in range(2)]
    assert torch.equal(*again)
