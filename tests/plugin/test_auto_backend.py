"""``backend: auto``: kernels on NVIDIA GPUs where they serve and pay, the eager path everywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu_kernels import AttentionMask, Backend, JaggedLayout, dispatch, hstu_attention, plan_attention
from hstu_kernels.dispatch import choose_backend
from hstu_plugin.config import HSTUConfig
from hstu_plugin.encoder import HSTUEncoder
from hstu_plugin.sequence import JaggedSequence

GPU = torch.device("cuda")
LENGTHS = (90, 0, 33, 1)
cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that this PyTorch can use"),
]


def on_gpu(*values: Any) -> Any:
    return pytest.param(*values, marks=cuda)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Decisions as on a machine with a Hopper GPU and this Triton."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(dispatch, "_capability", lambda: (9, 0))
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    dispatch._decided.cache_clear()
    yield
    dispatch._decided.cache_clear()


def config(*, width: int = 64, **changes: Any) -> HSTUConfig:
    return HSTUConfig(
        embedding_dim=2 * width,
        num_layers=2,
        num_heads=2,
        attention_dim=width,
        linear_dim=width,
        max_seq_len=128,
        dropout=0.0,
        **changes,
    )


def batch(width: int, *, device: str, dtype: torch.dtype) -> JaggedSequence:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(sum(LENGTHS), width, generator=generator, dtype=torch.float64).to(device, dtype)
    times = torch.arange(sum(LENGTHS), device=device) * 977
    return JaggedSequence(values, JaggedLayout.from_counts(LENGTHS, device=device), times)


def test_a_gpu_gets_kernels(hopper: None) -> None:
    assert choose_backend("auto", GPU, torch.bfloat16, (64, 64)) is Backend.TRITON
    assert choose_backend("auto", GPU, torch.float64, (64, 64)) is Backend.EAGER
    assert choose_backend("auto", torch.device("cpu"), torch.bfloat16, (64, 64)) is Backend.EAGER
    # An explicit request is never replaced.
    assert choose_backend("eager", GPU, torch.bfloat16, (64, 64)) is Backend.EAGER


@pytest.mark.parametrize(
    ("tools", "headers", "missing"),
    [((), True, "C compiler"), (("gcc",), False, "Python.h"), (("clang",), True, "")],
    ids=["no-compiler", "no-headers", "all"],
)
def test_what_triton_needs_to_start_a_kernel(
    tools: tuple[str, ...], headers: bool, missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if headers:
        (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(dispatch.shutil, "which", lambda name: name if name in tools else None)
    monkeypatch.setattr(dispatch.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    decide = dispatch._found_capability.__wrapped__
    if missing:
        with pytest.warns(UserWarning, match=rf"^backend: 'auto' takes the eager path.* no {missing}"):
            assert decide() is None
    else:
        assert decide() == (9, 0)


def test_precision_of_float32_counts_from_the_next_call_on(hopper: None) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert choose_backend("auto", GPU, torch.float32, (128, 128)) is Backend.TRITON
        torch.set_float32_matmul_precision("highest")
        assert choose_backend("auto", GPU, torch.float32, (128, 128)) is Backend.EAGER
        assert choose_backend("auto", GPU, torch.float32, (64, 64)) is Backend.TRITON
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_compiler_takes_the_search_for_a_gpu_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    # Normalises paths, which no compiler traces.
    monkeypatch.setattr(
        dispatch, "_found_capability", lambda: (9, 0) if dispatch.sysconfig.get_path("include") else None
    )
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)

    @torch.compile(backend="eager", fullgraph=True)
    def step(x: Tensor) -> Tensor:
        return x + 1 if choose_backend("auto", GPU, x.dtype, (64, 64)) is Backend.TRITON else x - 1

    assert step(torch.zeros(2, dtype=torch.bfloat16)).tolist() == [1, 1]


def test_products_run_in_autocasts_dtype() -> None:
    rows = torch.empty(0, 256)
    assert dispatch.product_dtype(rows, torch.bfloat16) is torch.bfloat16
    assert dispatch.product_dtype(rows.to("meta"), torch.float32) is torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dispatch.product_dtype(rows, torch.float32) is torch.bfloat16
        assert dispatch.product_dtype(rows.double(), torch.float32) is torch.float32


def test_auto_follows_its_plan() -> None:
    q, k, v = torch.randn(3, sum(LENGTHS), 2, 8, dtype=torch.float64)
    layout, mask = JaggedLayout.from_counts(LENGTHS), AttentionMask()
    plan = plan_attention(layout, mask, total_rows=q.shape[0], backend="reference")
    options: dict[str, Any] = {"alpha": 0.3, "scale": 0.1, "plan": plan}
    assert torch.equal(
        hstu_attention(q, k, v, layout, mask, **options),
        hstu_attention(q, k, v, layout, mask, backend="reference", **options),
    )
    with pytest.raises(ValueError, match=r"^plan: expected one made for backend eager, got reference"):
        hstu_attention(q, k, v, layout, mask, backend="eager", **options)


def outcome(encoder: HSTUEncoder, seq: JaggedSequence, *, autocast: bool) -> list[Tensor]:
    """Output and gradients of a step."""
    encoder.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        out = encoder(seq).values
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in encoder.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("width", "dtype", "autocast", "expected"),
    [
        on_gpu(64, torch.float32, True, "triton"),
        on_gpu(64, torch.float32, False, "triton"),
        on_gpu(128, torch.float32, True, "triton"),
        on_gpu(128, torch.float32, False, "eager"),
        on_gpu(64, torch.float64, False, "eager"),
        on_gpu(8, torch.float32, True, "eager"),
        on_gpu(64, torch.bfloat16, False, "triton"),
    ],
)
def test_auto_gives_the_bits_of_what_it_chose(width: int, dtype: torch.dtype, autocast: bool, expected: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    torch.manual_seed(0)
    automatic = HSTUEncoder(config(width=width)).to("cuda", dtype)
    explicit = HSTUEncoder(replace(automatic.config, backend=Backend(expected))).to("cuda", dtype)
    explicit.load_state_dict(automatic.state_dict())
    seq = batch(2 * width, device="cuda", dtype=dtype)
    torch.use_deterministic_algorithms(True)
    try:
        for ours, theirs in zip(
            outcome(automatic, seq, autocast=autocast), outcome(explicit, seq, autocast=autocast), strict=True
        ):
            assert torch.equal(ours, theirs)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("learning", [on_gpu(False), on_gpu(True)])
def test_auto_scores_cached_histories_with_and_without_gradients(learning: bool) -> None:
    torch.manual_seed(0)
    encoder = HSTUEncoder(config()).cuda()
    history = batch(128, device="cuda", dtype=torch.float32)
    targets = JaggedSequence(
        torch.randn(8, 128, device="cuda"),
        JaggedLayout.from_counts((3, 0, 4, 1), device="cuda"),
        torch.full((8,), 10**6, device="cuda"),
    )
    with torch.set_grad_enabled(learning):
        cache = encoder.prefill(history)[1]
        out = encoder.decode(targets, cache).values
    assert out.requires_grad is learning
    wide = HSTUEncoder(encoder.config).cuda().double()
    wide.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        right = wide.decode(
            targets.with_values(targets.values.double()),
            wide.prefill(history.with_values(history.values.double()))[1],
        ).values
    error = (out - right).norm() / right.norm()
    assert error <= 1e-5, float(error)
