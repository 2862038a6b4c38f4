"""dk and dv begin beside the end of dq, where the chip can launch so, and no number depends on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu_kernels import AttentionMask, JaggedLayout

triton = pytest.importorskip("triton", reason="Triton is not installed")
jobs = pytest.importorskip("hstu_kernels.attention.triton.jobs", reason="Triton is not installed")
schedule = pytest.importorskip("hstu_kernels.attention.triton.schedule", reason="Triton is not installed")
launch = pytest.importorskip("hstu_kernels.attention.triton.launch", reason="Triton is not installed")
tiles = pytest.importorskip("hstu_kernels.attention.triton.tiles", reason="Triton is not installed")
Variant = pytest.importorskip("hstu_kernels.triton.launcher", reason="Triton is not installed").Variant

MASKS = {
    "prefix": AttentionMask(max_attn_len=256, global_prefix_len=256),
    "tail": AttentionMask(max_attn_len=256, full_attn_tail_len=256),
    "causal": AttentionMask(),
}
ALL = (True, True, True, False, False)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that this PyTorch can use")


@pytest.mark.parametrize(
    ("dtype", "hopper", "early", "expected"),
    [
        (torch.bfloat16, True, True, True),
        (torch.bfloat16, True, False, False),
        (torch.float32, True, True, False),
        (torch.bfloat16, False, True, False),
    ],
    ids=["early", "on-its-own", "float32", "another-chip"],
)
def test_only_kernels_that_wait_are_launched_early(
    dtype: torch.dtype, hopper: bool, early: bool, expected: bool
) -> None:
    """A kernel without the instruction that waits may not begin before the one ahead has ended."""
    facts = (4, 128, 128, dtype, 0, -1, -1, "ieee", hopper)
    tile = tiles.tile_set(128, 128, dtype, biased=False).dkdv
    variant = jobs._variant("dkdv", facts, AttentionMask(), tile, False, 0, 0, early)
    assert bool(variant._settings.get("launch_pdl")) is expected
    assert variant._settings["SHAPE"].waits or not expected


@pytest.mark.parametrize("early", [False, True])
def test_what_adds_up_waits_where_it_is_launched_early(
    early: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    variant = jobs._joiner(4, 8, 64, 16, 128, 128, 512, early)
    settings = dict(variant._settings)
    assert settings.pop("launch_pdl", False) is early
    warps = settings.pop("num_warps")
    kernel = variant._function
    types = {"out_ptr": "*bf16", "partial_ptr": "*fp32", "work_ptr": "*i64", "pieces": "i32", "factor": "fp32"}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=settings, attrs=attributes)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
    assert code.count("griddepcontrol.wait") == early
    if early:
        before, after = code.split("griddepcontrol.wait")
        # Sums of pieces come four numbers at a time, the work list one by one.
        assert "ld.global.v4" not in before
        assert "ld.global.v4" in after
        assert "ret;" not in before, "a program that adds nothing ends before those behind may go on"


class Problem:
    """One batch on the GPU, large enough that the first kernel's last programs leave room."""

    def __init__(self, mask: str = "prefix", width: int = 128) -> None:
        lengths = [4096, 900, 0, 2500, 4096, 130, 3000, 64]
        draw = torch.Generator("cuda").manual_seed(0)
        self.shape = (sum(lengths), 4, width)
        tensors = [torch.randn(self.shape, device="cuda", generator=draw).to(torch.bfloat16) for _ in range(4)]
        self.operands, self.grad = tensors[:3], tensors[3]
        layout = JaggedLayout.from_lengths(torch.tensor(lengths, device="cuda"), max_seq_len=max(lengths))
        self.plan = schedule.plan_triton(layout, MASKS[mask], None, sum(lengths))

    def backward(
        self, needed: tuple[bool, ...] = ALL, into: tuple[torch.Tensor, ...] | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        arguments = (None, None, self.plan, 0.1, 1 / 64, None, needed, None, into)
        found: tuple[torch.Tensor | None, ...] = launch.triton_backward(self.grad, *self.operands, *arguments)
        return found[:3]

    def forward(self) -> torch.Tensor:
        found: torch.Tensor = launch.triton_forward(*self.operands, None, None, self.plan, 0.1, 1 / 64)
        return found

    def columns(self) -> tuple[torch.Tensor, ...]:
        """Room for the three gradients side by side, full of what is no number."""
        rows, heads, width = self.shape
        wide = torch.full((rows, 3 * heads * width), torch.nan, dtype=torch.bfloat16, device="cuda")
        return tuple(part.unflatten(1, (heads, width)) for part in wide.chunk(3, 1))


@contextmanager
def one_by_one() -> Iterator[None]:
    """No kernel begins before the one ahead has ended."""

    def plain(function: Any, **settings: Any) -> Any:
        settings.pop("launch_pdl", None)
        return Variant(function, **settings)

    def forget() -> None:
        jobs._variant.cache_clear()
        jobs._joiner.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "Variant", plain)
        forget()
        yield
    forget()


def gradients(mask: str, width: int = 128) -> list[torch.Tensor]:
    """What nothing that begins early can have changed."""
    with one_by_one():
        found = Problem(mask, width).backward()
        torch.cuda.synchronize()
    return [x for x in found if x is not None]


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("piece_rows", [1024, schedule.PIECE_ROWS])
@pytest.mark.parametrize(("mask", "width"), [("prefix", 128), ("tail", 128), ("causal", 128), ("prefix", 64)])
def test_nobody_behind_sees_half_a_gradient(
    mask: str, width: int, piece_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what adds up the pieces of long tiles half a piece."""
    monkeypatch.setattr(schedule, "PIECE_ROWS", piece_rows)
    expected, problem = gradients(mask, width), Problem(mask, width)
    for _ in range(20):
        into = problem.columns()
        problem.backward(into=into)
        # Read by the next kernel of the stream, without a wait of the host.
        copies = [x.clone() for x in into]
        assert all(torch.equal(x, y) for x, y in zip(copies, expected, strict=True))


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("mask", MASKS)
def test_in_a_graph(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "PIECE_ROWS", 1024)
    expected, problem = gradients(mask), Problem(mask)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        problem.backward(into=problem.columns())
    torch.cuda.current_stream().wait_stream(side)
    into = problem.columns()
    copies = [torch.empty(problem.shape, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in into:
            x.fill_(torch.nan)
        problem.backward(into=into)
        for copy, x in zip(copies, into, strict=True):
            copy.copy_(x)
    for _ in range(10):
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(copies, expected, strict=True))


@pytest.mark.cuda
@needs_gpu
def test_the_forward_of_pieces_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """What adds them up is launched early, and waits for the kernel ahead that knows nothing of it."""
    monkeypatch.setattr(schedule, "PIECE_ROWS", 1024)
    with one_by_one():
        expected = Problem("tail").forward()
        torch.cuda.synchronize()
    problem = Problem("tail")
    for _ in range(20):
        # The result's memory held no number before.
        torch.full_like(expected, torch.nan)
        found = problem.forward()
        # Read by the next kernel of the stream, without a wait of the host.
        assert torch.equal(found.clone(), expected)


@pytest.mark.cuda
@needs_gpu
def test_the_gradient_may_come_from_the_kernel_right_before() -> None:
    """Only dq's launch waits for it, and dk and dv for dq: they read what was there before."""
    expected, problem = gradients("prefix"), Problem()
    source = problem.grad.clone()
    for _ in range(20):
        problem.grad = torch.full_like(source, torch.nan)
        problem.grad.copy_(source)
        found = problem.backward()
        assert all(x is not None and torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        # Without dq nothing is ahead of dk and dv but the copy.
        problem.grad = torch.full_like(source, torch.nan)
        problem.grad.copy_(source)
        found = problem.backward((False, True, True, False, False))
        assert all(x is not None and torch.equal(x, y) for x, y in zip(found[1:], expected[1:], strict=True))
