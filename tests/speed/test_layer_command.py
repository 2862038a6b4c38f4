"""``python -m benchmarks.layer`` on a CPU."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import Kernel

from benchmarks.layer import __main__ as command
from benchmarks.layer import models
from benchmarks.layer.models import CONTENDERS, Ours, cases, exact, training_flops
from benchmarks.layer.parts import (
    ATTENTION_BACKWARD,
    ATTENTION_FORWARD,
    OPTIMISER,
    PARTS,
    PRODUCTS,
    REST,
    UNKNOWN,
    WAITING,
    part_of,
    parts_of,
)

TINY = ["run", "--tiny", "--device", "cpu", "--layers", "2", "--seconds", "0.001"]


def test_a_step_is_checked_timed_recorded_and_reported(tmp_path: Path) -> None:
    path, text = tmp_path / "layer.csv", tmp_path / "layer.md"
    words = ["--contender", "eager", "--contender", "triton", "--output", str(path), "--commit", "abc"]
    done = CliRunner().invoke(command.main, [*TINY, *words])
    assert done.exit_code == 0, done.output
    assert "triton               not measured" in done.output
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    assert [(row["case"], row["contender"], row["commit"]) for row in rows] == [
        ("full", "eager", "abc"),
        ("jagged", "eager", "abc"),
    ]
    assert all(float(row["p50_ms"]) > 0 and 0 < float(row["relative_error"]) < 0.05 for row in rows)
    done = CliRunner().invoke(command.main, ["report", "--input", str(path), "--output", str(text)])
    assert done.exit_code == 0, done.output
    assert "| full | ultra | 2 | eager |" in text.read_text(encoding="utf-8")


def test_a_wrong_contender_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Ours):
        def forward(self, *args: object) -> torch.Tensor:
            return super().forward(*args) * 1.2  # type: ignore[arg-type]

    monkeypatch.setitem(CONTENDERS, "eager-compiled", lambda case: Wrong(case, "eager"))
    done = CliRunner().invoke(
        command.main, [*TINY, "--contender", "eager-compiled", "--output", str(tmp_path / "x.csv")]
    )
    assert done.exit_code == 1
    assert "gradients are off by" in done.output
    assert not (tmp_path / "x.csv").exists()


def test_work_counts_every_product_once() -> None:
    full, jagged = cases(layers=8, variant="ultra", tiny=False)
    rows = 16 * 2048
    linear = 3 * 2 * rows * 512 * (2048 + 512)
    attention = 3.5 * 2 * 16 * (2048 * 2049 // 2) * 1024
    assert training_flops(full) == 8 * (linear + attention)
    assert abs(sum(jagged.lengths) / 16 - 2048) < 64
    production = cases(layers=1, variant="production", tiny=False)[0]
    assert training_flops(production) > training_flops(full) / 8


@pytest.mark.parametrize("which", [0, 1], ids=["full", "jagged"])
@pytest.mark.parametrize("name", ["sdpa-compiled", "sdpa-varlen-compiled"])
def test_the_softmax_layers_have_the_same_linear_weights(
    name: str, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = cases(layers=2, variant="ultra", tiny=True)[which]

    def count(model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    softmax = CONTENDERS[name](case)
    assert count(softmax) == count(CONTENDERS["eager"](case))
    batch = command.make_batch(case, torch.device("cpu"))
    command.backward(softmax, batch, autocast=True)
    assert all(p.grad is not None for p in softmax.parameters())
    # Padded or jagged, what is computed is softmax attention of each sequence by itself.
    assert 0 < command._check(name, case, batch) < 0.05
    torch.manual_seed(0)
    one = CONTENDERS[name](case).eval()
    torch.manual_seed(0)
    other = exact(name, case).eval()
    with torch.no_grad():
        torch.testing.assert_close(one(batch), other(batch))


def test_softmax_that_sees_other_sequences_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    flat = models._flash_of_rows
    monkeypatch.setattr(
        models, "_flash_of_rows", lambda q, k, v, offsets, longest: flat(q, k, v, offsets[[0, -1]], longest)
    )
    case = cases(layers=2, variant="ultra", tiny=True)[1]
    batch = command.make_batch(case, torch.device("cpu"))
    with pytest.raises(command.Wrong, match="sdpa-varlen-compiled, jagged: gradients are off"):
        command._check("sdpa-varlen-compiled", case, batch)


def test_a_rival_that_fails_is_left_out_and_ours_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: object) -> nn.Module:
        raise RuntimeError("no such operator")

    monkeypatch.setitem(CONTENDERS, "sdpa-compiled", broken)
    words = ["--contender", "sdpa-compiled", "--contender", "eager", "--case", "full", "--output", str(tmp_path / "x")]
    done = CliRunner().invoke(command.main, [*TINY, *words])
    assert done.exit_code == 0, done.output
    assert "sdpa-compiled        not measured: RuntimeError: no such operator" in done.output
    assert [row["contender"] for row in csv.DictReader((tmp_path / "x").open(encoding="utf-8"))] == ["eager"]
    monkeypatch.setitem(CONTENDERS, "eager-compiled", broken)
    failed = CliRunner().invoke(command.main, [*TINY, "--contender", "eager-compiled", "--dry-run"])
    assert isinstance(failed.exception, RuntimeError)


def test_memory_lists_what_each_choice_stores() -> None:
    done = CliRunner().invoke(
        command.main, ["memory", "--tiny", "--device", "cpu", "--layers", "1", "--seconds", "0.001"]
    )
    assert done.exit_code == 0, done.output
    assert "eager: nothing" in done.output
    assert "triton not measured" in done.output
    assert "x [" in done.output
    assert " bfloat16: " in done.output


def test_the_time_of_a_step_by_part(tmp_path: Path) -> None:
    path = tmp_path / "parts.csv"
    words = ["parts", "--tiny", "--device", "cpu", "--layers", "2", "--output", str(path), "--commit", "abc"]
    done = CliRunner().invoke(command.main, words)
    assert done.exit_code == 0, done.output
    assert "triton  not measured" in done.output
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    assert [row["part"] for row in rows] == list(PARTS) and {row["contender"] for row in rows} == {"eager"}
    assert all(float(row["ms"]) > 0 for row in rows)
    # Six digits of each are written: half a unit of the last one is lost.
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=5e-7 * len(rows))


@pytest.mark.parametrize(
    ("kernel", "origin", "part"),
    [
        ("hopper_fwd_kernel", ["_Layer"], ATTENTION_FORWARD),
        ("hstu_bwd_dkdv_kernel", ["_LayerBackward"], ATTENTION_BACKWARD),
        ("nvjet_tst", ["aten::bmm", "_EagerAttention"], ATTENTION_FORWARD),
        ("nvjet_tst", ["aten::baddbmm", "_EagerAttentionBackward"], ATTENTION_BACKWARD),
        ("nvjet_tst", ["aten::mm", "MmBackward0"], PRODUCTS),
        ("product_kernel", ["_Layer"], PRODUCTS),
        ("gate_bwd_kernel", ["_LayerBackward"], REST),
        ("vectorized_elementwise", ["aten::mul"], REST),
        ("multi_tensor_apply", ["aten::_fused_adamw_", "Optimizer.step#AdamW.step"], OPTIMISER),
    ],
)
def test_every_kernel_has_its_part(kernel: str, origin: list[str], part: str) -> None:
    assert part_of(kernel, origin) == part


def test_kernels_on_a_device_are_put_to_the_operations_that_launched_them() -> None:
    def event(name: str, begin: float, end: float, device: DeviceType, parent: object = None) -> SimpleNamespace:
        spent = SimpleNamespace(start=begin, end=end, elapsed_us=lambda: end - begin)
        return SimpleNamespace(name=name, time_range=spent, device_type=device, cpu_parent=parent, kernels=[])

    layer = event("_EagerAttentionBackward", 0, 1, DeviceType.CPU)
    product = event("aten::bmm", 0, 1, DeviceType.CPU, layer)
    step = event("Optimizer.step#AdamW.step", 0, 1, DeviceType.CPU)
    product.kernels = [Kernel("gemm", 0, 5.0)]
    step.kernels = [Kernel("adam", 0, 1.0), Kernel("Optimizer.step#AdamW.step", 0, 9.0)]
    # One kernel begins beside the end of another.
    device = [("gemm", 0, 5), ("hopper_fwd_kernel", 6, 9), ("lost", 8, 12), ("adam", 14, 15)]
    kernels = [event(name, begin, end, DeviceType.CUDA) for name, begin, end in device]
    kernels.append(event("Optimizer.step#AdamW.step", 0, 90, DeviceType.CUDA))
    found = parts_of([layer, product, step, *kernels], on_device=True)
    assert found == {
        ATTENTION_FORWARD: 3,
        ATTENTION_BACKWARD: 5,
        PRODUCTS: 0,
        REST: 0,
        OPTIMISER: 1,
        UNKNOWN: 4,
        WAITING: 3,
    }
