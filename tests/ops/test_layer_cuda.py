"""The layer as one operation on a GPU: error budgets, the same bits whatever is stored, products with epilogues."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hstu_kernels import AttentionMask, JaggedLayout, plan_attention
from hstu_kernels.layer import LayerOptions, LayerWeights, hstu_layer
from tests.ops.layer_cases import NAMES, Leaves, composed, make_leaves, results, whole

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that this PyTorch can use"),
]

LENGTHS = (700, 0, 129, 1, 64)
ROWS = sum(LENGTHS)
WIDTH = 256
OPTIONS = LayerOptions(
    heads=2,
    attention_dim=128,
    linear_dim=128,
    mask=AttentionMask(),
    alpha=1 / 16,
    scale=1 / 64,
    eps=1e-6,
    activated=4 * 2 * 128,
    dropout=0.2,
)
FORMS = {"single": OPTIONS, "concat": replace(OPTIONS, concat=True, activated=256)}


@pytest.fixture(autouse=True)
def with_triton() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")


def common() -> dict[str, Any]:
    layout = JaggedLayout.from_counts(LENGTHS, device="cuda")
    times = torch.arange(ROWS, device="cuda") * 977
    return {"layout": layout, "seed": torch.tensor([0x1234_5678_9ABC], device="cuda"), "times": times}


def leaves_of(options: LayerOptions, *, affine: bool, dtype: torch.dtype, tables: bool = False) -> Leaves:
    entries = (2 * 800 - 1, 33) if tables else None
    return make_leaves(options, ROWS, width=WIDTH, affine=affine, dtype=dtype, device="cuda", tables=entries)


def wide(leaves: Leaves) -> Leaves:
    return {name: None if leaf is None else leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_as_near_to_float64_as_plain_pytorch(dtype: torch.dtype, affine: bool, form: str) -> None:
    options = replace(FORMS[form], store_uvqk=affine, store_gated=not affine, store_normed=False)
    leaves = leaves_of(options, affine=affine, dtype=dtype, tables=affine)
    exact = wide(leaves)
    truth = results(composed(exact, options, backend="eager", **common()), exact)
    near = results(composed(leaves, options, backend="eager", **common()), leaves)
    got = results(whole(leaves, options, backend="triton", **common()), leaves)
    for name, wanted in truth.items():
        assert got[name].dtype == near[name].dtype, name
        scale = float(wanted.abs().max())
        budget = 2 * float((near[name].double() - wanted).abs().max()) + 4 * torch.finfo(dtype).eps * scale
        error = float((got[name].double() - wanted).abs().max())
        assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g}, scale {scale:.3g}"


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_what_is_stored_changes_no_bit(affine: bool, form: str) -> None:
    leaves = leaves_of(FORMS[form], affine=affine, dtype=torch.float32)
    found = []
    for normed, uvqk, gated in itertools.product([True, False], repeat=3):
        options = replace(FORMS[form], store_normed=normed, store_uvqk=uvqk, store_gated=gated)
        with torch.autocast("cuda", torch.bfloat16):
            out = whole(leaves, options, backend="triton", **common())
        assert out.dtype == torch.float32
        found.append(results(out, leaves))
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(other[name], value), name


def test_gradients_of_pieces_go_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long tiles, cut into pieces, against the same without the wider matrix."""
    from hstu_kernels.attention.triton import schedule

    monkeypatch.setattr(schedule, "PIECE_ROWS", 256)
    options = replace(OPTIONS, mask=AttentionMask(max_attn_len=64, global_prefix_len=32, full_attn_tail_len=64))
    leaves = leaves_of(options, affine=False, dtype=torch.bfloat16)
    exact = wide(leaves)
    truth = results(composed(exact, options, backend="eager", **common()), exact)
    near = results(composed(leaves, options, backend="triton", **common()), leaves)
    got = results(whole(leaves, options, backend="triton", **common()), leaves)
    for name, wanted in truth.items():
        budget = 2 * float((near[name].double() - wanted).abs().max()) + 0.02 * float(wanted.abs().max())
        assert float((got[name].double() - wanted).abs().max()) <= budget, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 2048, 512), (1000, 2048, 512), (4097, 520, 72)], ids=str)
def test_products_with_epilogues(rows: int, columns: int, depth: int, dtype: torch.dtype) -> None:
    from hstu_kernels.projection.triton import product_launch

    def draw(*shape: int, factor: float = 1.0, as_dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, device="cuda") * factor).to(as_dtype)

    torch.manual_seed(1)
    a, weight, bias = draw(rows, depth), draw(columns, depth, factor=depth**-0.5), draw(columns)
    x = draw(rows, columns, as_dtype=torch.float32)
    if not product_launch.serves(a, weight):
        pytest.skip("no tensor copy engine on this GPU")
    exact = F.linear(a.double(), weight.double(), bias.double())
    activated = columns // 4 * 3
    silu = torch.cat([F.silu(exact[:, :activated]), exact[:, activated:]], 1)
    mixed, out = product_launch.linear_silu(a, weight, bias, activated, keep_mixed=True)
    nothing, alone = product_launch.linear_silu(a, weight, bias, activated, keep_mixed=False)
    assert nothing is None and mixed is not None
    assert torch.equal(out, alone)
    near = F.linear(a, weight, bias)
    for got, wanted, plain in ((mixed, exact, near), (out, silu, F.silu(near))):
        budget = 2 * float((near.double() - exact).abs().max()) + torch.finfo(dtype).eps * float(exact.abs().max())
        assert float((got.double() - wanted).abs().max()) <= budget
        assert plain.dtype == got.dtype
    total = product_launch.linear_sum(x, a, weight, bias)
    assert total.dtype == torch.float32
    assert float((total.double() - (x.double() + exact)).abs().max()) <= 1e-4


@pytest.mark.parametrize(("rows", "width"), [(1, 512), (33_000, 512), (777, 50)], ids=str)
def test_narrowing_sums_the_columns(rows: int, width: int) -> None:
    from hstu_kernels.layer.triton import launch

    x = torch.randn(rows, width, device="cuda")
    rounded, sums = launch.narrow(x, torch.bfloat16)
    assert torch.equal(rounded, x.bfloat16())
    exact = x.double().sum(0)
    assert float((sums.double() - exact).abs().max()) <= 1e-6 * float(x.double().abs().sum(0).max())


def test_a_step_replays_from_a_graph() -> None:
    """No step of the layer waits for the device or asks the host between its launches."""
    options = replace(OPTIONS, store_uvqk=False)
    leaves = leaves_of(options, affine=False, dtype=torch.bfloat16)
    given = common()
    plan = plan_attention(given["layout"], options.mask, total_rows=ROWS, backend="triton")
    x, *weights = (leaves.get(name) for name in NAMES)
    assert x is not None
    wanted = [leaf for leaf in leaves.values() if leaf is not None]
    back = torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.bfloat16)

    def step() -> list[Tensor]:
        out = hstu_layer(
            x,
            LayerWeights(*weights),  # type: ignore[arg-type]
            options,
            given["layout"],
            plan=plan,
            seed=given["seed"],
            backend="triton",
        )
        return [out.detach(), *torch.autograd.grad(out, wanted, back)]

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    graph.replay()
    torch.cuda.synchronize()
    for got, value in zip(replayed, expected, strict=True):
        assert torch.equal(got, value)
