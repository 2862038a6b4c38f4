"""Direct launches on a GPU: the bits of Triton's own way, whatever changes between two calls, and no wait."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu_kernels import (
    AttentionMask,
    JaggedLayout,
    LayerKV,
    RelativeBias,
    gated_norm,
    hstu_attention,
    hstu_target_attention,
    norm_linear_silu,
    plan_attention,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that this PyTorch can use"),
]

LENGTHS = (130, 0, 77)
TOTAL = sum(LENGTHS)
MASKS = {"plain": AttentionMask(), "window": AttentionMask(max_attn_len=40)}
OPTIONS: dict[str, Any] = {"alpha": 0.1, "scale": 0.05, "backend": "triton"}


@pytest.fixture(autouse=True)
def with_triton() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")


def layout() -> JaggedLayout:
    return JaggedLayout.from_counts(LENGTHS, device="cuda")


def draw(rows: int, width: int, dtype: torch.dtype, *, offset: int = 0, gap: int = 0, seed: int = 0) -> Tensor:
    """``[rows, 4, width]`` that begins ``offset`` elements behind an allocation, with ``gap`` more between rows."""
    generator = torch.Generator("cuda").manual_seed(seed)
    stride = 4 * width + gap
    flat = torch.randn(rows * stride + offset, device="cuda", generator=generator).to(dtype)
    return flat[offset:].view(rows, stride)[:, : 4 * width].unflatten(1, (4, width))


def in_tritons_way(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    from hstu_kernels.triton import launcher

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "_watched", lambda function: True)
        return call()


def same_bits(call: Callable[[], list[Tensor]]) -> None:
    """Once for the compiler, once directly, once in Triton's way."""
    call()
    for got, expected in zip(call(), in_tritons_way(call), strict=True):
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "off-by-one": {"offset": 1},
    "off-by-eight": {"offset": 8},
    "gap-of-eight": {"gap": 8},
    "gap-of-one": {"gap": 1},
    "narrow": {"width": 24},
}


def attend(mask: AttentionMask, *, dtype: torch.dtype = torch.bfloat16, width: int = 64, **place: int) -> list[Tensor]:
    """Output and gradients."""
    q, k, v = (draw(TOTAL, width, dtype, seed=s, **place).requires_grad_() for s in (1, 2, 3))
    out = hstu_attention(q, k, v, layout(), mask, **OPTIONS)
    return [out, *torch.autograd.grad(out, (q, k, v), draw(TOTAL, width, dtype, seed=4))]


@pytest.mark.parametrize("name", KINDS)
def test_attention_equals_tritons_own_launch(name: str) -> None:
    same_bits(lambda: attend(MASKS["plain"], **KINDS[name]))


def test_calls_of_several_kinds_do_not_mix() -> None:
    kinds = [("plain", "plain"), ("off-by-one", "plain"), ("float16", "plain"), ("plain", "window")]
    expected = {(n, m): in_tritons_way(lambda n=n, m=m: attend(MASKS[m], **KINDS[n])) for n, m in kinds}  # type: ignore[misc]
    for pair in itertools.permutations(kinds, 2):
        for name, mask in pair:
            for got, wanted in zip(attend(MASKS[mask], **KINDS[name]), expected[name, mask], strict=True):
                assert torch.equal(got, wanted)


def test_attention_with_a_bias_equals_tritons_own_launch() -> None:
    q, k, v = (draw(TOTAL, 64, torch.bfloat16, seed=s).requires_grad_() for s in (1, 2, 3))
    pos, time = torch.randn(255, device="cuda"), torch.randn(65, device="cuda")
    bias = RelativeBias(pos, time, torch.arange(TOTAL, device="cuda") * 1000)

    def call() -> list[Tensor]:
        out = hstu_attention(q, k, v, layout(), MASKS["plain"], **OPTIONS, bias=bias)
        return [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]

    same_bits(call)


@torch.no_grad()
def test_targets_equal_tritons_own_launch() -> None:
    targets = JaggedLayout.from_counts((5, 3, 70), device="cuda")
    for place in ({}, {"offset": 1}, {"gap": 8}):
        q, k, v = (draw(78, 64, torch.bfloat16, seed=s, **place) for s in (1, 2, 3))
        keys, values = (draw(TOTAL, 64, torch.bfloat16, seed=s, **place) for s in (4, 5))
        cache = LayerKV(keys, values, layout())
        same_bits(
            lambda q=q, k=k, v=v, cache=cache: [  # type: ignore[misc]
                hstu_target_attention(q, k, v, cache, targets, MASKS["plain"], **OPTIONS)
            ]
        )


@pytest.mark.parametrize("offset", [0, 1])
def test_norms_equal_tritons_own_launch(offset: int) -> None:
    x, u = (draw(50, 16, torch.bfloat16, offset=offset, seed=s).flatten(1).requires_grad_() for s in (1, 2))
    weight, bias = torch.randn(64, device="cuda"), torch.randn(64, device="cuda")
    matrix = torch.randn(96, 64, device="cuda").bfloat16().requires_grad_()
    seed = torch.tensor([5], device="cuda")

    def call() -> list[Tensor]:
        out = gated_norm(x, u, weight, bias, eps=1e-6, dropout=0.3, seed=seed, backend="triton")
        mixed = norm_linear_silu(x, weight, bias, matrix, None, eps=1e-6, activated=32, backend="triton")
        return [out, mixed, *torch.autograd.grad([out, mixed], (x, u, matrix), [out, mixed])]

    same_bits(call)


def test_warm_calls_wait_for_nothing() -> None:
    mask, where, targets = MASKS["plain"], layout(), JaggedLayout.from_counts((5, 3, 70), device="cuda")
    plan = plan_attention(where, mask, total_rows=TOTAL, backend="triton")
    q, k, v = (draw(TOTAL, 64, torch.bfloat16, seed=s).requires_grad_() for s in (1, 2, 3))
    rows = [draw(78, 64, torch.bfloat16, seed=s) for s in (1, 2, 3)]
    cache = LayerKV(k.detach(), v.detach(), where)

    def call() -> None:
        out = hstu_attention(q, k, v, where, mask, **OPTIONS, plan=plan)
        torch.autograd.grad(out, (q, k, v), out.detach())
        hstu_attention(q, k, v, where, mask, **OPTIONS)
        with torch.no_grad():
            hstu_target_attention(*rows, cache, targets, mask, **OPTIONS)

    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_launches_go_to_the_current_stream_and_into_graphs() -> None:
    mask, where = MASKS["plain"], layout()
    plan = plan_attention(where, mask, total_rows=TOTAL, backend="triton")
    q, k, v = (draw(TOTAL, 64, torch.bfloat16, seed=s) for s in (1, 2, 3))

    def call() -> Tensor:
        return hstu_attention(q, k, v, where, mask, **OPTIONS, plan=plan)

    expected = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
