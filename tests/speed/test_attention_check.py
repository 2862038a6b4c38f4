"""The benchmark's own check must notice wrong kernels, and adapters must hand over what the peers expect."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.attention.batches import Batch, make_batch
from benchmarks.attention.cases import Case, choose, tiny
from benchmarks.attention.check import Red, check
from benchmarks.attention.contenders import BASELINES, Bound, ours, ours_cached
from benchmarks.attention.unavailable import Unavailable
from hstu_kernels import AttentionMask, hstu_attention
from hstu_kernels.layout import JaggedLayout

CPU = torch.device("cpu")


def tiny_case(name: str) -> Case:
    return tiny(next(case for case in choose((), name) if case.name == name))


def bound_to(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Bound, Batch]:
    batch = make_batch(case, CPU, dtype)
    return ours("eager")(batch), batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["4x4096-causal", "8x16384-tail-jagged", "4x4096-prefix", "16x4096-bias-both", "32x4096-1024-candidates"]
)
def test_our_attention_is_right(name: str, dtype: torch.dtype) -> None:
    bound, batch = bound_to(tiny_case(name), dtype)
    assert 0 < check(bound, batch) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_cached_targets_are_right_and_wrong_ones_are_seen() -> None:
    batch = make_batch(tiny_case("32x4096-1024-candidates"), CPU, torch.float32)
    bound = ours_cached("eager")(batch)
    check(bound, batch)
    with pytest.raises(Red, match="out is off"):
        check(replace(bound, forward=lambda *x: bound.forward(*x).roll(1, 0)), batch)


def _scaled(out: Tensor) -> Tensor:
    return out * 1.02


def _last_row_lost(out: Tensor) -> Tensor:
    return torch.cat([out[:-1], torch.zeros_like(out[-1:])])


def _head_swapped(out: Tensor) -> Tensor:
    return out.flip(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spoil", [_scaled, _last_row_lost, _head_swapped])
def test_wrong_outputs_are_red(spoil: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    bound, batch = bound_to(tiny_case("16x4096x4x128-jagged"), dtype)
    with pytest.raises(Red, match=r"eager, tiny-16x4096x4x128-jagged: \w+ is off"):
        check(replace(bound, forward=lambda *leaves: spoil(bound.forward(*leaves))), batch)


@pytest.mark.parametrize("spoiled", ["dq", "dk", "dv", "pos_table", "time_table"])
def test_wrong_gradients_are_red(spoiled: str) -> None:
    bound, batch = bound_to(tiny_case("16x4096-bias-both"))
    at = bound.leaf_names.index(spoiled)

    def attend(*leaves: Tensor) -> Tensor:
        # The same number, another gradient.
        changed = [0.9 * x + 0.1 * x.detach() if i == at else x for i, x in enumerate(leaves)]
        bias = replace(batch.bias, pos_table=changed[3], time_table=changed[4])  # type: ignore[type-var]
        options: dict[str, Any] = {"alpha": batch.alpha, "scale": batch.scale, "bias": bias, "backend": "eager"}
        return hstu_attention(*changed[:3], batch.layout, batch.case.mask, **options)

    with pytest.raises(Red, match=f"{spoiled} is off"):
        check(replace(bound, forward=attend), batch)


def test_a_window_one_off_is_red() -> None:
    bound, batch = bound_to(tiny_case("4x4096-tail"))
    wide = replace(batch.case.mask, max_attn_len=batch.case.mask.max_attn_len + 1)
    wrong = replace(batch, case=replace(batch.case, mask=wide))
    with pytest.raises(Red):
        check(ours("eager")(wrong), batch)
    check(bound, batch)


def test_a_number_that_is_not_finite_is_red() -> None:
    bound, batch = bound_to(tiny_case("4x4096-causal"))

    def attend(*leaves: Tensor) -> Tensor:
        out = bound.forward(*leaves)
        return torch.where(torch.arange(out.shape[0])[:, None, None] == 5, torch.nan, out)

    with pytest.raises(Red, match="out is not finite"):
        check(replace(bound, forward=attend), batch)


class FakePeer:
    """Answers as the public kernels do, from their arguments alone."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, **options: Any) -> Tensor:
        layout = JaggedLayout(offsets.long(), longest, options.get("num_targets"))
        mask = options.get("mask", AttentionMask())
        return hstu_attention(q, k, v, layout, mask, alpha=options["alpha"], scale=1 / longest, backend="eager")

    def triton_hstu_mha(
        self, N: int, alpha: float, q: Tensor, k: Tensor, v: Tensor, seq_offsets: Tensor, num_targets: Tensor | None
    ) -> Tensor:
        return self.attend(q, k, v, seq_offsets, N, alpha=alpha, num_targets=num_targets)

    def hstu_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        window_size: tuple[int, int],
        alpha: float,
        func: Tensor | None = None,
    ) -> Tensor:
        assert cu_seqlens_q.dtype == torch.int32
        if func is None:
            assert window_size == (-1, 0)
            return self.attend(q, k, v, cu_seqlens_q, max_seqlen_q, alpha=alpha)
        outs = []
        for begin, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
            first, second, third = func[0, :, begin:end, None]
            cols = torch.arange(end - begin)
            seen = (cols < first) | ((cols >= second) & (cols < third))
            logits = alpha * torch.einsum("ihd,jhd->hij", q[begin:end], k[begin:end])
            weights = torch.where(seen, torch.nn.functional.silu(logits), 0) / max_seqlen_q
            outs.append(torch.einsum("hij,jhd->ihd", weights, v[begin:end]))
        return torch.cat(outs)


def install(patch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        patch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(parts[i - 1]))
    for attribute, value in contents.items():
        setattr(sys.modules[name], attribute, value)


def test_the_adapter_to_meta_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "generative_recommenders.ops.triton.triton_hstu_attention"
    install(monkeypatch, module, triton_hstu_mha=FakePeer().triton_hstu_mha)
    tuned: list[bool] = []
    install(monkeypatch, "generative_recommenders.common", set_use_runtime_max_seq_len=tuned.append)
    for name in ("16x4096x4x128-jagged", "32x4096-1024-candidates"):
        batch = make_batch(tiny_case(name), CPU, torch.float32)
        check(BASELINES["meta-triton"](batch), batch)
    assert tuned == [True, True]
    with pytest.raises(Unavailable, match="semi-local"):
        BASELINES["meta-triton"](make_batch(tiny_case("4x4096-tail"), CPU, torch.float32))


@pytest.mark.parametrize(("factor", "right"), [(1.02, True), (1.1, False)])
def test_a_public_kernel_may_round_but_not_mean_another_function(factor: float, right: bool) -> None:
    bound, batch = bound_to(tiny_case("16x4096x4x128-jagged"), torch.bfloat16)
    public = replace(bound, forward=lambda *leaves: bound.forward(*leaves) * factor, tolerance=0.05)
    if right:
        assert check(public, batch) > 0.01
    else:
        with pytest.raises(Red, match=r"out is off by 0\.1 of its norm, allowed 0\.05"):
            check(public, batch)


@pytest.mark.parametrize("package", ["hstu", "hstu_attn"])
def test_the_adapter_to_cutlass(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, package, hstu_attn_varlen_func=FakePeer().hstu_attn_varlen_func)
    for name in ("16x4096x4x128-jagged", "4x4096-prefix", "4x4096-tail", "8x16384-prefix-jagged"):
        batch = make_batch(tiny_case(name), CPU, torch.float32)
        check(BASELINES["fbgemm-cutlass"](batch), batch)


@pytest.mark.parametrize("name", ["meta-triton", "meta-fa3", "fbgemm-cutlass"])
def test_a_peer_that_is_not_installed_sits_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("generative_recommenders", "hstu", "hstu_attn"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Unavailable, match="cannot be imported"):
        BASELINES[name](make_batch(tiny_case("4x4096-causal"), CPU, torch.float32))
