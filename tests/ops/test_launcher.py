"""Direct launches: what makes a compiled kernel serve a call, and what a warm call costs the host; no GPU needed.

A recorder stands where Triton would compile and launch. Tensors are the CPU's; only their addresses are looked at.
"""

from __future__ import annotations

import gc
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hstu_kernels import (
    AttentionMask,
    JaggedLayout,
    LayerKV,
    RelativeBias,
    dispatch,
    gated_norm,
    hstu_attention,
    hstu_target_attention,
)
from hstu_kernels import backend as backends
from hstu_kernels.attention import api
from hstu_kernels.attention.triton import TritonPlan, interpreting

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET is set: kernels are not compiled")


class Recorder:
    """Counts the launches that went Triton's way and keeps the arguments of those that went directly."""

    def __init__(self) -> None:
        self.compiled = 0
        self.direct: list[tuple[Any, ...]] = []
        # Of each of them: how many pointers and descriptors its kernel takes.
        self.arrays: list[int] = []

    def launch(self, variant: Any, programs: int, arrays: Any, numbers: Any) -> Any:
        self.compiled += 1
        return SimpleNamespace(run=partial(self._run, len(arrays)), function=7, packed_metadata=(4, 1, 0))

    def _run(self, arrays: int, *arguments: Any) -> None:
        self.direct.append(arguments)
        self.arrays.append(arrays)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    from hstu_kernels.attention.triton import arguments, jobs, target_launch
    from hstu_kernels.gated_norm.triton import launch as gate_launch
    from hstu_kernels.triton import launcher

    made = Recorder()
    monkeypatch.setattr(launcher.Variant, "_launch", lambda *given: made.launch(*given))
    monkeypatch.setattr(launcher, "_current_stream", lambda device: 0)
    monkeypatch.setattr(arguments, "_has_copy_engine", lambda device: True)
    monkeypatch.setattr(backends, "_triton_obstacle", lambda facts: None)
    caches = (dispatch._decided, jobs._variant, target_launch._variant, gate_launch._variant)
    for cache in caches:
        cache.cache_clear()
    yield made
    for cache in caches:
        cache.cache_clear()


def silu() -> Any:
    from hstu_kernels.projection.triton.kernels import silu_fwd_kernel
    from hstu_kernels.triton.launcher import Variant

    return Variant(silu_fwd_kernel, COLUMNS=16, ACTIVATED=16, BLOCK=64)


def gate() -> Any:
    from hstu_kernels.gated_norm.triton.kernels import gate_fwd_kernel
    from hstu_kernels.triton.launcher import Variant

    constants = {"WIDTH": 16, "BLOCK_R": 4, "BLOCK_W": 16, "CONCAT": False, "DROPOUT": False}
    return Variant(gate_fwd_kernel, **constants, num_warps=4)


def aligned(count: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
    """``count`` elements that begin ``offset`` bytes behind a multiple of 64."""
    raw = torch.zeros(count * 8 + 128, dtype=torch.uint8)
    begin = -raw.data_ptr() % 64 + offset
    return raw[begin : begin + count * dtype.itemsize].view(dtype)


def test_this_triton_is_known() -> None:
    import triton

    from hstu_kernels.triton.launcher import launches_as_known

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    assert launches_as_known() == ((3, 6) <= version < (3, 8)) or version >= (3, 8)


def test_the_second_launch_is_direct_and_passes_addresses_numbers_and_constants(recorder: Recorder) -> None:
    variant, x, out = silu(), aligned(64), aligned(64)
    variant(1, (x, out), (4,))
    assert (recorder.compiled, len(recorder.direct)) == (1, 0)
    variant(3, (x, out), (5,))
    assert recorder.compiled == 1
    # Grid, stream, function, metadata, no hooks; then the kernel's own.
    assert recorder.direct == [
        (3, 1, 1, 0, 7, (4, 1, 0), None, None, None, x.data_ptr(), out.data_ptr(), 5, 16, 16, 64)
    ]


Arguments = tuple[tuple[Tensor | None, ...], tuple[float, ...]]


def gate_arguments() -> dict[str, Arguments]:
    """Kinds of arguments of the gated norm's forward; each needs a kernel of its own."""

    def given(
        a: Tensor, u: Tensor | None, numbers: tuple[float, ...] = (3, 16, 16, 1e-6, 0, 1.0), **others: Tensor | None
    ) -> Arguments:
        arrays = {n: aligned(64) for n in ("weight", "bias", "out", "mean", "rstd")} | {"seed": None} | others
        return (a, u, *(arrays[n] for n in ("weight", "bias", "seed", "out", "mean", "rstd"))), numbers

    x, half = aligned(64), aligned(64, torch.float16)
    return {
        "plain": given(x, x),
        "half": given(half, half),
        "half-gate": given(x, half),
        "no-gate": given(x, None),
        "no-weight": given(x, x, weight=None),
        "no-bias": given(x, x, bias=None),
        "seed": given(x, x, seed=aligned(1, torch.int64)),
        "unaligned": given(aligned(64, offset=4), x),
        "unaligned-gate": given(x, aligned(64, offset=8)),
        "unaligned-out": given(x, x, out=aligned(64, offset=4)),
        "odd-stride": given(x, x, (3, 17, 16, 1e-6, 0, 1.0)),
        "odd-gate-stride": given(x, x, (3, 16, 17, 1e-6, 0, 1.0)),
        "unit-stride": given(x, x, (3, 1, 16, 1e-6, 0, 1.0)),
        "wide-stride": given(x, x, (3, 2**40, 16, 1e-6, 0, 1.0)),
        "threshold": given(x, x, (3, 16, 16, 1e-6, 1001, 1.0)),
        "wide-threshold": given(x, x, (3, 16, 16, 1e-6, 2**31 + 1, 1.0)),
    }


def triton_sees(variant: Any, arguments: Arguments) -> tuple[Any, ...]:
    """Triton's own description of the arguments, by which it keeps what it compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    function = variant._function
    bind = create_function_from_signature(function.signature, function.params, make_backend(GPUTarget("cuda", 90, 32)))
    arrays, numbers = arguments
    return tuple(bind(*arrays, *numbers, **variant._settings)[1])


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(gate_arguments(), 2)))
def test_no_kernel_serves_arguments_that_triton_tells_apart(first: str, second: str, recorder: Recorder) -> None:
    variant, kinds = gate(), gate_arguments()
    variant(1, *kinds[first])
    variant(1, *kinds[second])
    if triton_sees(variant, kinds[first]) != triton_sees(variant, kinds[second]):
        assert (recorder.compiled, recorder.direct) == (2, [])
    variant(1, *kinds[first])
    variant(1, *kinds[second])
    assert len(recorder.direct) >= 2


def test_all_kinds_differ_for_triton() -> None:
    """Otherwise the test above would be empty."""
    variant = gate()
    seen = [triton_sees(variant, arguments) for arguments in gate_arguments().values()]
    # A threshold is an integer as any other: with and without a factor of 16.
    assert len(set(seen)) == len(seen)


def test_free_numbers_share_a_kernel(recorder: Recorder) -> None:
    variant = gate()
    arrays, _ = gate_arguments()["plain"]
    for rows, eps, inverse in ((3, 1e-6, 1.0), (16, 1e-5, 2.0), (1, 0.5, 1.0)):
        variant(1, arrays, (rows, 16, 16, eps, 0, inverse))
    assert (recorder.compiled, len(recorder.direct)) == (1, 2)


def test_descriptors_differ_by_their_blocks(recorder: Recorder) -> None:
    from hstu_kernels.triton.launcher import Panel

    keys = []
    for dtype, rows, width in ((torch.float16, 64, 64), (torch.float16, 32, 64), (torch.bfloat16, 64, 64)):
        panel = Panel(aligned(4096, dtype), [64, 64], [64, 1], [rows, width])
        assert panel.checked().block_shape == [rows, width]
        assert (panel.padding, panel.checked().padding) == ("zero", "zero")
        variant = SimpleVariant()
        variant(1, (aligned(4), panel))
        keys.append(*variant._compiled)
    assert len(set(keys)) == 3


def SimpleVariant() -> Any:
    """Of a kernel with one pointer and one descriptor."""
    from hstu_kernels.triton.launcher import Variant

    variant = silu()
    assert isinstance(variant, Variant)
    variant._specialized = variant._others = lambda numbers: ()
    return variant


def test_beyond_32_bits_a_free_number_goes_the_long_way(recorder: Recorder) -> None:
    variant, x = silu(), aligned(64)
    for _ in range(3):
        variant(1, (x, x), (2**31,))
    assert (recorder.compiled, recorder.direct, variant._compiled) == (3, [], {})


def test_kinds_that_come_and_go_are_forgotten(recorder: Recorder) -> None:
    variant = gate()
    arrays, _ = gate_arguments()["plain"]
    for stride in range(1000):
        variant(1, arrays, (3, stride, 16, 1e-6, 0, 1.0))
    assert len(variant._compiled) <= 256


def test_whoever_watches_launches_sees_them_all(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    variant, x = silu(), aligned(64)

    def warm() -> int:
        before = recorder.compiled
        variant(1, (x, x), (4,))
        return recorder.compiled - before

    assert (warm(), warm()) == (1, 0)

    def hook(metadata: Any) -> None:
        """Would be called by Triton."""

    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(hook)
        assert warm() == 1
        chain.remove(hook)
        assert warm() == 0
    monkeypatch.setattr(variant._function, "pre_run_hooks", [hook])
    assert warm() == 1
    monkeypatch.undo()


def test_debugging_goes_the_long_way(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    variant, x = silu(), aligned(64)
    variant(1, (x, x), (4,))
    monkeypatch.setattr(knobs.runtime, "debug", True)
    variant(1, (x, x), (4,))
    assert recorder.compiled == 2


def test_another_triton_goes_the_long_way(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    from hstu_kernels.triton.launcher import launches_as_known

    def run(self: Any) -> None:
        """Launches in a way of its own."""

    launches_as_known.cache_clear()
    monkeypatch.setattr(JITFunction, "run", run)
    try:
        variant, x = silu(), aligned(64)
        for _ in range(2):
            variant(1, (x, x), (4,))
    finally:
        launches_as_known.cache_clear()
    assert (recorder.compiled, recorder.direct) == (2, [])


def test_parameters_in_another_order_are_refused() -> None:
    import triton
    import triton.language as tl

    from hstu_kernels.triton.launcher import Variant, launches_as_known

    if not launches_as_known():
        pytest.skip("this Triton launches in another way, so that order does not matter")

    @triton.jit
    def kernel(rows, x_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        tl.store(x_ptr + tl.arange(0, BLOCK), rows)

    with pytest.raises(TypeError, match="expected pointers and descriptors, then numbers, then constants"):
        Variant(kernel, BLOCK=16)


# Launches that wait for nothing but addresses.

# Grid, stream, function, metadata and hooks stand before a kernel's own arguments.
_OF_TRITON = 9


def seen(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of a launch with descriptors taken apart."""
    panels = [(a.base.data_ptr(), a.shape, a.strides, a.block_shape) if hasattr(a, "base") else a for a in arguments]
    return tuple(panels)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("width", [64, 24])
def test_a_ready_launch_passes_what_a_first_one_does(
    width: int, biased: bool, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hstu_kernels.attention.triton import calls, jobs

    bias = None
    if biased:
        bias = RelativeBias(aligned(15).requires_grad_(), aligned(9).requires_grad_(), torch.arange(16) * 1000)
    plan = api.plan_attention(LAYOUT, MASK, bias=bias, total_rows=16, backend="triton")
    kept: list[Any] = []

    def step(alpha: float, spread: int) -> None:
        q, k, v, grad = (spaced(width, spread).requires_grad_() for _ in range(4))
        out = hstu_attention(q, k, v, LAYOUT, MASK, alpha=alpha, scale=0.1, bias=bias, backend="triton", plan=plan)
        kept.append((q, k, v, grad, out, torch.autograd.grad(out, (q, k, v), grad.detach())))

    calls_made: list[bool] = []
    first = jobs.Job.first
    monkeypatch.setattr(jobs.Job, "first", lambda *a, **o: (calls_made.append(True), first(*a, **o))[1])
    for alpha, spread in ((0.1, 0), (0.1, 8), (0.2, 0)):
        for _ in range(2):
            step(alpha, spread)
    state: Any = plan.state
    tensors = (state.boundaries, state.row_times, state.key_times, *state.work.values(), *state.spans.values())
    owned = {x.data_ptr() for x in tensors if x is not None}
    for alpha, spread in ((0.2, 0), (0.1, 8), (0.1, 0)):
        calls_made.clear()
        recorder.direct.clear()
        step(alpha, spread)
        assert not calls_made
        ready, arrays = [seen(arguments) for arguments in recorder.direct], recorder.arrays[-len(recorder.direct) :]
        inputs = kept[-1][:3]
        addresses = {arguments[_OF_TRITON : _OF_TRITON + 3] for arguments in ready}
        assert addresses == {tuple(x.data_ptr() for x in inputs)}
        # The same once more the long way: numbers, constants, descriptors and what the plan owns are the same.
        recorder.direct.clear()
        with monkeypatch.context() as patch:
            patch.setattr(calls, "is_current", lambda device: False)
            step(alpha, spread)
        again = [seen(arguments) for arguments in recorder.direct]
        assert calls_made
        assert recorder.arrays[-len(again) :] == arrays
        for one, other, count in zip(again, ready, arrays, strict=True):
            assert comparable(one, count, owned) == comparable(other, count, owned)


def comparable(arguments: tuple[Any, ...], arrays: int, owned: set[int]) -> list[Any]:
    """Of a launch all but the addresses of tensors that come and go; descriptors' geometry.

    Which arguments are addresses follows from the kernel. A number's size says nothing: on the heap of a process that
    is not relocated addresses are small.
    """
    found: list[Any] = []
    for place, argument in enumerate(arguments):
        if not _OF_TRITON <= place < _OF_TRITON + arrays:
            found.append(argument)
        elif isinstance(argument, tuple):
            found.append(argument[1:])
        else:
            found.append(argument if argument is None or argument in owned else "address")
    return found


def spaced(width: int, spread: int) -> Tensor:
    """``[16, 2, width]`` whose rows lie ``spread`` further apart than they have to."""
    stride = 2 * width + spread
    return aligned(16 * stride, torch.bfloat16).view(16, stride)[:, : 2 * width].unflatten(1, (2, width)).detach()


def test_what_is_not_aligned_is_never_ready(recorder: Recorder) -> None:
    plan = api.plan_attention(LAYOUT, MASK, total_rows=16, backend="triton")
    compiled = []
    for offset in (0, 0, 2, 0, 2):
        q, k, v = (aligned(16 * 128, torch.bfloat16, offset).view(16, 2, 64) for _ in range(3))
        hstu_attention(q, k, v, LAYOUT, MASK, **OPTIONS, plan=plan)
        compiled.append(recorder.compiled)
    # One kernel for each alignment.
    assert [count - compiled[0] for count in compiled] == [0, 0, 1, 1, 1]


def test_a_plan_goes_when_nobody_holds_it(recorder: Recorder) -> None:
    plan = api.plan_attention(LAYOUT, MASK, total_rows=16, backend="triton")
    inputs = [x.requires_grad_() for x in rows()]
    for _ in range(2):
        out = hstu_attention(*inputs, LAYOUT, MASK, **OPTIONS, plan=plan)
        torch.autograd.grad(out, inputs, rows()[0])
    assert isinstance(plan.state, TritonPlan)
    lists = [weakref.ref(work) for work in plan.state.work.values()]
    gc.collect()
    gc.disable()
    try:
        del plan, out
        assert lists and all(work() is None for work in lists)
    finally:
        gc.enable()


def test_the_innermost_launcher_gets_what_triton_passes_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.nvidia import driver

    from hstu_kernels.triton import launcher

    if not launcher._calls_as_known(driver.CudaLauncher):
        pytest.skip("this Triton's launchers are called in another way")
    monkeypatch.setattr(launcher, "_current_stream", lambda device: 11)
    monkeypatch.setattr(driver, "make_tensordesc_arg", lambda panel, meta: [panel.base.data_ptr(), *panel.shape, meta])
    got: list[Any] = []
    x, y, z = aligned(64), aligned(64, torch.float16).view(4, 16), aligned(64, torch.float16).view(4, 16)
    for signature, metas in (
        ({"x": "*fp32", "n": "i32"}, None),
        ({"x": "*fp32", "y": "tensordesc<fp16[4, 16]>", "z": "tensordesc<fp16[2, 16]>", "n": "i32"}, ["one", "two"]),
    ):
        run = driver.CudaLauncher.__new__(driver.CudaLauncher)
        run.global_scratch_size = run.profile_scratch_size = run.global_scratch_align = run.profile_scratch_align = 0
        run.launch_cooperative_grid, run.launch_pdl = False, True
        run.launch = driver.wrap_handle_tensordesc(lambda *arguments: got.append(arguments), signature, metas)
        panels = [(1 + i, launcher.Panel(t, [4, 16], [16, 1], [4 - 2 * i, 16])) for i, t in enumerate((y, z)) if metas]
        run(3, 1, 1, 11, 7, (4, 1, 0), None, None, None, x.data_ptr(), *(panel for _, panel in panels), 5)
        compiled = (run, 7, (4, 1, 0), launcher._innermost(run), {})
        ready = launcher.Ready(None, compiled, 0, 3, panels, (5,))
        for _ in range(2):
            ready([x.data_ptr(), *(panel.base.data_ptr() for _, panel in panels)])
        assert len(got) == 3
        assert got[0] == got[1] == got[2]
        got.clear()


# What a warm call may cost, counted instead of timed: calls of Python functions, and operations of PyTorch.


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def cost(call: Callable[[], object]) -> tuple[int, list[str]]:
    """Python functions that a warm call enters, and the operations it runs."""
    call()
    call()
    with Operations() as operations:
        call()
    entered = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal entered
        entered += event == "call"

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered, operations.names


MASK = AttentionMask()
LAYOUT = JaggedLayout.from_lengths(torch.tensor([8, 8]))
TARGETS = JaggedLayout.from_lengths(torch.tensor([4, 4]))
OPTIONS: dict[str, Any] = {"alpha": 0.1, "scale": 0.1, "backend": "triton"}


def rows(count: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (aligned(count * 128, torch.bfloat16).view(count, 2, 64) for _ in range(3))
    return q, k, v


def test_a_warm_forward_is_lean(recorder: Recorder) -> None:
    plan = api.plan_attention(LAYOUT, MASK, total_rows=16, backend="triton")
    inputs = rows()
    entered, operations = cost(lambda: hstu_attention(*inputs, LAYOUT, MASK, **OPTIONS, plan=plan))
    assert operations == ["aten.empty_like.default"]
    assert entered <= 48
    assert recorder.direct


def test_a_warm_backward_is_lean(recorder: Recorder) -> None:
    plan = api.plan_attention(LAYOUT, MASK, total_rows=16, backend="triton")
    inputs = [x.requires_grad_() for x in rows()]
    grad = rows()[0]

    def step() -> None:
        out = hstu_attention(*inputs, LAYOUT, MASK, **OPTIONS, plan=plan)
        torch.autograd.grad(out, inputs, grad)

    entered, operations = cost(step)
    assert [name for name in operations if "detach" not in name] == ["aten.empty_like.default"] * 4
    assert entered <= 150
    assert len({arguments[4] for arguments in recorder.direct}) == 1


@torch.no_grad()
def test_warm_targets_are_lean_and_ask_the_device_nothing(recorder: Recorder) -> None:
    q, k, v = rows(8)
    _, keys, values = rows()
    cache = LayerKV(keys, values, LAYOUT)
    entered, operations = cost(lambda: hstu_target_attention(q, k, v, cache, TARGETS, MASK, **OPTIONS))
    assert operations == ["aten.empty_like.default"]
    assert entered <= 48


@torch.no_grad()
def test_a_warm_norm_is_lean(recorder: Recorder) -> None:
    a, u = aligned(1024).view(16, 64), aligned(1024).view(16, 64)
    entered, operations = cost(lambda: gated_norm(a, u, eps=1e-6, backend="triton"))
    assert operations == ["aten.empty.memory_format"] * 3
    assert entered <= 48
