"""The layer as one operation in Triton's interpreter; run by `test_layer_interpreter.py`."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu_kernels import JaggedLayout
from hstu_kernels.projection.triton import product_launch
from hstu_kernels.projection.triton.product_launch import ProductTile
from hstu_kernels.testing import poisoned_empty
from tests.ops.layer_cases import make_leaves, make_options, production, results, whole

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_layer_interpreter.py"
torch.set_num_threads(1)
SEED = torch.tensor([0x1234_5678_9ABC])
TILE = ProductTile(16, 32, 16, 4, 2)


def same(options: Any, lengths: tuple[int, ...], *, affine: bool, dtype: torch.dtype, tables: bool = False) -> None:
    """As near to float64 as the eager backend in the same precision, by a factor of two."""
    layout, rows = JaggedLayout.from_lengths(torch.tensor(lengths)), sum(lengths)
    entries = (31, 17) if tables else None
    leaves = make_leaves(options, rows, width=24, affine=affine, dtype=dtype, tables=entries)
    wide = {name: None if leaf is None else leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    common: dict[str, Any] = {"seed": SEED, "times": torch.arange(rows) * 977}
    truth = results(whole(wide, options, layout, backend="eager", **common), wide)
    near = results(whole(leaves, options, layout, backend="eager", **common), leaves)
    with poisoned_empty():
        got = results(whole(leaves, options, layout, backend="triton", **common), leaves)
    for name, wanted in truth.items():
        assert got[name].dtype == near[name].dtype, name
        if wanted.numel() == 0:
            continue
        eps = 4 * torch.finfo(got[name].dtype).eps * float(wanted.abs().max())
        budget = 2 * float((near[name].double() - wanted).abs().max()) + eps
        error = float((got[name].double() - wanted).abs().max())
        assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("make", [make_options, production], ids=["single", "concat"])
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "again"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_layer(affine: bool, stored: bool, make: Any, dtype: torch.dtype) -> None:
    options = make(attention_dim=16, linear_dim=16, store_normed=stored, store_uvqk=stored, store_gated=stored)
    same(options, (9, 0, 21, 1), affine=affine, dtype=dtype, tables=affine)


def test_an_empty_batch() -> None:
    same(make_options(attention_dim=16, linear_dim=16), (0, 0), affine=True, dtype=torch.float32)


def test_widths_that_no_copy_engine_fetches() -> None:
    same(make_options(attention_dim=17, linear_dim=18), (9, 4), affine=True, dtype=torch.float16)


def test_gradients_of_pieces_go_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tail makes long tiles, whose pieces another kernel adds up; its rows stand in the wider matrix, too."""
    from hstu_kernels import AttentionMask
    from hstu_kernels.attention.triton import jobs, schedule

    strides: list[int] = []
    original = jobs._joiner
    monkeypatch.setattr(jobs, "_joiner", lambda *shape: strides.append(shape[-2]) or original(*shape))
    monkeypatch.setattr(schedule, "PIECE_ROWS", 64)
    mask = AttentionMask(max_attn_len=8, full_attn_tail_len=16, global_prefix_len=3)
    same(make_options(mask=mask, attention_dim=16, linear_dim=16), (200,), affine=False, dtype=torch.float32)
    # The attention's output is contiguous; dq, dk and dv are columns of a matrix of four times that width.
    assert sorted(set(strides)) == [32, 128]


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 8, 8), (33, 40, 24), (64, 64, 64)], ids=str)
@pytest.mark.parametrize("activated", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_product_with_silu(biased: bool, activated: float, rows: int, columns: int, depth: int) -> None:
    a, weight = drawn(rows, depth, seed=1), drawn(columns, depth, seed=2)
    bias = drawn(columns, seed=3) if biased else None
    count = int(activated * columns)
    assert product_launch.serves(a, weight)
    with poisoned_empty():
        mixed, out = product_launch.linear_silu(a, weight, bias, count, keep_mixed=True, tile=TILE)
        nothing, alone = product_launch.linear_silu(a, weight, bias, count, keep_mixed=False, tile=TILE)
    assert nothing is None
    assert torch.equal(out, alone)
    exact = a.double() @ weight.double().T + (0 if bias is None else bias.double())
    silu = torch.cat([torch.nn.functional.silu(exact[:, :count]), exact[:, count:]], 1)
    for got, wanted in ((mixed, exact), (out, silu)):
        assert got is not None
        torch.testing.assert_close(got.double(), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 8, 8), (33, 40, 24)], ids=str)
def test_product_with_sum(rows: int, columns: int, depth: int, dtype: torch.dtype) -> None:
    a, weight, bias = drawn(rows, depth, seed=1), drawn(columns, depth, seed=2), drawn(columns, seed=3)
    x = drawn(rows, columns, seed=4, dtype=dtype)
    with poisoned_empty():
        out = product_launch.linear_sum(x, a, weight, bias, tile=TILE)
    assert out.dtype == dtype
    exact = x.double() + a.double() @ weight.double().T + bias.double()
    tolerance = 2e-3 if dtype is torch.float16 else 1e-5
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(("rows", "width"), list(itertools.product([1, 67, 4000], [20, 128])), ids=str)
def test_narrow(rows: int, width: int) -> None:
    from hstu_kernels.layer.triton import launch

    x = drawn(rows, width, seed=1, dtype=torch.float32)
    with poisoned_empty():
        rounded, sums = launch.narrow(x, torch.float16)
    assert torch.equal(rounded, x.half())
    torch.testing.assert_close(sums.double(), x.double().sum(0), rtol=1e-5, atol=1e-4)
