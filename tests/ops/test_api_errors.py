"""Every refusal of the operators names the argument that is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hstu_kernels import (
    AttentionMask,
    Backend,
    JaggedLayout,
    LayerKV,
    RelativeBias,
    UnsupportedBackend,
    hstu_attention,
    hstu_target_attention,
    plan_attention,
    resolve_backend,
)
from hstu_kernels.backend import CallFacts

LAYOUT = JaggedLayout.from_lengths(torch.tensor([3, 2]))
TARGETS = JaggedLayout.from_lengths(torch.tensor([1, 2]))
TIMES = torch.arange(5)
TABLE = torch.zeros(9)


def rows(count: int, heads: int = 2, width: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(count, heads, width, dtype=dtype)


def attend(**changed: Any) -> torch.Tensor:
    arguments = {
        "q": rows(5),
        "k": rows(5),
        "v": rows(5),
        "layout": LAYOUT,
        "mask": AttentionMask(),
        "alpha": 1.0,
        "scale": 1.0,
    }
    return hstu_attention(**{**arguments, **changed})


def attend_targets(**changed: Any) -> torch.Tensor:
    arguments = {
        "q": rows(3),
        "k": rows(3),
        "v": rows(3),
        "cache": LayerKV(rows(5), rows(5), LAYOUT),
        "layout": TARGETS,
        "mask": AttentionMask(),
        "alpha": 1.0,
        "scale": 1.0,
    }
    return hstu_target_attention(**{**arguments, **changed})


BAD_TENSORS = {
    "q-2d": ({"q": torch.zeros(5, 4)}, ValueError, "q"),
    "k-2d": ({"k": torch.zeros(5, 4)}, ValueError, "k"),
    "v-4d": ({"v": torch.zeros(5, 2, 2, 2)}, ValueError, "v"),
    "q-integer": ({"q": rows(5).long()}, TypeError, "q"),
    "k-integer": ({"k": rows(5).long()}, TypeError, "k"),
    "k-other-dtype": ({"k": rows(5).double()}, TypeError, "k"),
    "v-other-dtype": ({"v": rows(5).bfloat16()}, TypeError, "v"),
    "k-other-device": ({"k": rows(5).to("meta")}, TypeError, "k"),
    "k-other-width": ({"k": rows(5, width=3)}, ValueError, "k"),
    "k-other-rows": ({"k": rows(4)}, ValueError, "k"),
    "v-other-heads": ({"v": rows(5, heads=1)}, ValueError, "v"),
    "v-other-rows": ({"v": rows(6)}, ValueError, "v"),
}


@pytest.mark.parametrize(("changed", "error", "name"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_attention_refuses_tensors(changed: dict[str, Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{name}: expected"):
        attend(**changed)


BAD_BATCHES = {
    "layout-covers-other-rows": ({"layout": JaggedLayout.from_lengths(torch.tensor([3, 1]))}, "q: expected 4 rows"),
    "bound-too-small": ({"layout": JaggedLayout(torch.tensor([0, 3, 5]), 2)}, "max_seq_len: expected"),
    "decreasing": ({"layout": JaggedLayout(torch.tensor([0, 6, 5]), 9)}, "seq_offsets: expected"),
    "targets": ({"layout": JaggedLayout(torch.tensor([0, 3, 5]), 3, torch.tensor([4, 0]))}, "num_targets"),
    "times-of-other-rows": ({"bias": RelativeBias(None, TABLE, TIMES[:4])}, "bias.timestamps: expected"),
    "row-times-of-other-rows": ({"bias": RelativeBias(None, TABLE, TIMES, TIMES[:4])}, "bias.row_timestamps: expected"),
    "unknown-backend": ({"backend": "magic"}, "backend: expected one of"),
}


@pytest.mark.parametrize(("changed", "message"), BAD_BATCHES.values(), ids=BAD_BATCHES.keys())
def test_attention_refuses_batches(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        attend(**changed)


BAD_DEVICES = {
    "pos_table": RelativeBias(TABLE.to("meta")),
    "time_table": RelativeBias(None, TABLE.to("meta"), TIMES),
    "timestamps": RelativeBias(TABLE, None, TIMES.to("meta")),
    "row_timestamps": RelativeBias(TABLE, None, None, TIMES.to("meta")),
}


@pytest.mark.parametrize(("name", "bias"), BAD_DEVICES.items(), ids=BAD_DEVICES.keys())
def test_bias_on_another_device_is_refused(name: str, bias: RelativeBias) -> None:
    with pytest.raises(TypeError, match=f"^bias.{name}: expected"):
        attend(bias=bias)
    if name != "timestamps":
        with pytest.raises(TypeError, match=f"^bias.{name}: expected"):
            attend_targets(bias=replace(bias, timestamps=None if bias.timestamps is None else TIMES))


TIME_BIAS = RelativeBias(None, TABLE, TIMES)
WRONG_PLANS = {
    "other-backend": (plan_attention(LAYOUT, AttentionMask(), total_rows=5, backend="reference"), {"backend": "eager"}),
    "other-mask": (plan_attention(LAYOUT, AttentionMask(max_attn_len=2), total_rows=5), {}),
    "other-layout": (
        plan_attention(JaggedLayout.from_lengths(torch.tensor([2, 3])), AttentionMask(), total_rows=5),
        {},
    ),
    "without-times": (plan_attention(LAYOUT, AttentionMask(), total_rows=5), {"bias": TIME_BIAS}),
    "other-times": (
        plan_attention(LAYOUT, AttentionMask(), bias=RelativeBias(None, TABLE, TIMES + 1), total_rows=5),
        {"bias": TIME_BIAS},
    ),
    "other-row-times": (
        plan_attention(LAYOUT, AttentionMask(), bias=replace(TIME_BIAS, row_timestamps=TIMES), total_rows=5),
        {"bias": TIME_BIAS},
    ),
    "other-buckets": (
        plan_attention(LAYOUT, AttentionMask(), bias=replace(TIME_BIAS, time_table=TABLE[:5]), total_rows=5),
        {"bias": TIME_BIAS},
    ),
}


@pytest.mark.parametrize(("plan", "changed"), WRONG_PLANS.values(), ids=WRONG_PLANS.keys())
def test_a_plan_of_another_batch_is_refused(plan: Any, changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^plan: "):
        attend(plan=plan, **changed)


def test_plan_refuses_rows_that_the_layout_does_not_cover() -> None:
    with pytest.raises(ValueError, match=r"^total_rows: expected 5 rows"):
        plan_attention(LAYOUT, AttentionMask(), total_rows=6)


@pytest.mark.parametrize(("changed", "error", "name"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_target_attention_refuses_tensors(changed: dict[str, Any], error: type[Exception], name: str) -> None:
    base = {"q": rows(5), "k": rows(5), "v": rows(5), "layout": LAYOUT}
    with pytest.raises(error, match=f"^{name}: expected"):
        attend_targets(**{**base, **changed})


WITH_TARGETS = JaggedLayout.from_lengths(torch.tensor([3, 2]), num_targets=torch.tensor([1, 0]))
BAD_CACHES = {
    "targets-of-other-rows": ({"layout": LAYOUT}, "q: expected 5 rows"),
    "cache-of-other-rows": ({"cache": LayerKV(rows(4), rows(4), LAYOUT)}, "cache.k: expected 5 rows"),
    "cache-of-other-users": (
        {"cache": LayerKV(rows(5), rows(5), JaggedLayout.from_lengths(torch.tensor([5])))},
        "cache: expected 2 sequences",
    ),
    "cache-of-other-heads": ({"cache": LayerKV(rows(5, heads=1), rows(5, heads=1), LAYOUT)}, "cache: expected heads"),
    "cache-of-other-width": ({"cache": LayerKV(rows(5), rows(5, width=3), LAYOUT)}, "cache: expected heads and widths"),
    "cache-values-of-other-rows": ({"cache": LayerKV(rows(5), rows(4), LAYOUT)}, "cache.v: expected 5 rows"),
    "cache-with-targets": ({"cache": LayerKV(rows(5), rows(5), WITH_TARGETS)}, "layout: expected target rows only"),
    "layout-with-targets": (
        {"layout": JaggedLayout.from_lengths(torch.tensor([1, 2]), num_targets=torch.tensor([1, 2]))},
        "layout: expected target rows only",
    ),
    "no-request-times": ({"bias": TIME_BIAS}, "bias.row_timestamps: expected"),
    "request-times-of-others": ({"bias": replace(TIME_BIAS, row_timestamps=TIMES)}, "bias.row_timestamps: expected"),
    "times-of-other-rows": (
        {"bias": RelativeBias(None, TABLE, TIMES[:4], TIMES[:3])},
        "bias.timestamps: expected one entry for each of 5",
    ),
    "unknown-backend": ({"backend": "magic"}, "backend: expected one of"),
}


@pytest.mark.parametrize(("changed", "message"), BAD_CACHES.values(), ids=BAD_CACHES.keys())
def test_target_attention_refuses(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        attend_targets(**changed)


def test_cache_of_another_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^cache"):
        attend_targets(cache=LayerKV(rows(5).double(), rows(5).double(), LAYOUT))


def test_backends_are_resolved_by_name_and_never_replaced() -> None:
    assert resolve_backend("reference") is Backend.REFERENCE
    assert resolve_backend(Backend.EAGER) is Backend.EAGER
    assert resolve_backend("auto") is not Backend.AUTO
    with pytest.raises(UnsupportedBackend, match=r"^backend: expected one of auto, reference, eager.*'gpu'"):
        resolve_backend("gpu")
    assert issubclass(UnsupportedBackend, ValueError)


SERVED = CallFacts(
    device_type="cuda",
    dtype=torch.bfloat16,
    qk_dim=16,
    v_dim=256,
    triton_release=(3, 10),
    oldest_triton=(3, 4),
    interpreting=False,
    capability=(9, 0),
)
NOT_SERVED = {
    "not-installed": ({"triton_release": None}, "is not installed"),
    "old": ({"triton_release": (3, 2)}, "is too old: expected release 3.4 or newer, got 3.2"),
    "on-a-cpu": ({"device_type": "cpu"}, "needs tensors on an NVIDIA GPU, got cpu"),
    "float64": ({"dtype": torch.float64}, "serves float32, bfloat16 and float16, got torch.float64"),
    "narrow-keys": ({"qk_dim": 15}, "serves head widths of 16 to 256, got Dqk 15"),
    "wide-values": ({"v_dim": 257}, "serves head widths of 16 to 256, got Dv 257"),
    "interpreted-bfloat16": ({"interpreting": True}, "cannot compute in torch.bfloat16 in its interpreter"),
}


@pytest.mark.parametrize(("changed", "reason"), NOT_SERVED.values(), ids=NOT_SERVED.keys())
def test_triton_says_why_it_cannot_serve(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedBackend, match=f"^backend: triton {reason}; use backend='eager'$"):
        resolve_backend("triton", replace(SERVED, **changed))


def test_triton_serves_what_it_says() -> None:
    assert resolve_backend("triton", SERVED) is Backend.TRITON
    # Before the tensors are known, and before anything is known.
    assert resolve_backend("triton", replace(SERVED, dtype=None, qk_dim=None, v_dim=None)) is Backend.TRITON
    assert resolve_backend("triton") is Backend.TRITON
    interpreted = replace(SERVED, device_type="cpu", dtype=torch.float16, interpreting=True)
    assert resolve_backend("triton", interpreted) is Backend.TRITON


AUTOMATIC = {
    "served": ({}, Backend.TRITON),
    "older-gpu": ({"capability": (8, 0)}, Backend.EAGER),
    "newer-gpu": ({"capability": (10, 0)}, Backend.EAGER),
    "no-nvidia-gpu": ({"capability": None}, Backend.EAGER),
    "cpu": ({"device_type": "cpu", "capability": None}, Backend.EAGER),
    # Kernels run on a CPU only to be tested.
    "interpreted": ({"device_type": "cpu", "interpreting": True, "dtype": torch.float16}, Backend.EAGER),
    "unknown-dtype": ({"dtype": None}, Backend.EAGER),
    "unknown-widths": ({"qk_dim": None, "v_dim": None}, Backend.TRITON),
    "float64": ({"dtype": torch.float64}, Backend.EAGER),
    "narrow": ({"qk_dim": 8}, Backend.EAGER),
    "no-triton": ({"triton_release": None}, Backend.EAGER),
    "float32": ({"dtype": torch.float32}, Backend.TRITON),
    "exact": ({"dtype": torch.float32, "exact_float32": True, "v_dim": 64}, Backend.TRITON),
    "exact-wide": ({"dtype": torch.float32, "exact_float32": True, "v_dim": 65}, Backend.EAGER),
}


@pytest.mark.parametrize(("changed", "chosen"), AUTOMATIC.values(), ids=AUTOMATIC.keys())
def test_auto_takes_kernels_where_they_serve_and_pay(changed: dict[str, Any], chosen: Backend) -> None:
    assert resolve_backend("auto", replace(SERVED, **changed)) is chosen


def test_auto_without_facts_is_eager() -> None:
    assert resolve_backend("auto") is Backend.EAGER


def test_a_plan_of_other_rows_is_refused() -> None:
    plan = plan_attention(LAYOUT, AttentionMask(), total_rows=5)
    with pytest.raises(ValueError, match=r"^plan: made for 5 rows, got 4 rows in q"):
        attend(q=rows(4), k=rows(4), v=rows(4), plan=plan)
