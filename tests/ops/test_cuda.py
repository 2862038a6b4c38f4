"""The named cases on a GPU: the same rules as on the CPU, and both devices agree."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from hstu_kernels import Backend, hstu_attention
from hstu_kernels.attention import ops
from hstu_kernels.testing import (
    ATTENTION_CASES,
    AttentionCase,
    assert_equals_oracle,
    assert_within_budget,
    make_inputs,
    run_attention,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that this PyTorch can use"),
]

eager = functools.partial(hstu_attention, backend="eager")
cases = pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)


@cases
def test_equals_oracle_in_fp64(case: AttentionCase) -> None:
    assert_equals_oracle(eager, make_inputs(case, torch.float64, device="cuda"))


@cases
def test_bfloat16_stays_in_the_budget(case: AttentionCase) -> None:
    # Not float32: there both sides are the library's matrix products, whose last bits depend on the kernel it picks
    # for a shape; that the algorithm is right in every bit that matters is what fp64 shows.
    if case.total_rows:
        assert_within_budget(eager, make_inputs(case, torch.bfloat16, device="cuda"), signal=False)


@cases
def test_devices_agree(case: AttentionCase) -> None:
    on_cpu = run_attention(eager, make_inputs(case, torch.float64))
    on_gpu = run_attention(eager, make_inputs(case, torch.float64, device="cuda"))
    for name, expected in on_cpu.items():
        torch.testing.assert_close(on_gpu[name].cpu(), expected, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_forward_and_backward_are_captured_in_a_graph(biased: bool) -> None:
    """Through the operators, so that work lists and time buckets are made inside the graph, for each batch anew."""
    name = "length-1000" if biased else "no-bias"
    case = replace(next(case for case in ATTENTION_CASES if case.name == name), qk_dim=32, v_dim=32)
    inputs = make_inputs(case, torch.bfloat16, device="cuda")
    layout = inputs.layout

    def step() -> dict[str, torch.Tensor]:
        attend = functools.partial(ops.operator_attention, backend=Backend.TRITON)
        return run_attention(attend, inputs)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        # Other numbers and other lengths, the same shapes.
        inputs.q.normal_()
        layout.seq_offsets[1:-1] = layout.seq_offsets[1:-1] // 2
        graph.replay()
        expected = step()
    torch.cuda.synchronize()
    for result, wanted in expected.items():
        # Sums over programs come in any order.
        assert float((captured[result] - wanted).float().norm()) <= 1e-5 * float(wanted.float().norm()), result


def test_triton_compiles_into_one_graph_on_a_gpu() -> None:
    case = replace(next(case for case in ATTENTION_CASES if case.name == "everything"), qk_dim=32, v_dim=32)
    inputs = make_inputs(case, torch.bfloat16, device="cuda")
    attend = functools.partial(hstu_attention, backend="triton")
    assert_within_budget(torch.compile(attend, fullgraph=True), inputs)
