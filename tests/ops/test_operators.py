"""The attention as operators: registration, compilation, export and autocast on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu_kernels import Backend, JaggedLayout, RelativeBias, UnsupportedBackend, hstu_attention, plan_attention
from hstu_kernels.attention import ops
from hstu_kernels.testing import (
    ATTENTION_CASES,
    AttentionCase,
    AttentionInputs,
    assert_equals_oracle,
    make_inputs,
    run_attention,
)

NAMES = ("everything", "no-bias", "time-bias", "position-bias", "window-tail", "empty-batch", "empty-sequences")
CASES = [case for case in ATTENTION_CASES if case.name in NAMES]


def through_operators(*args: Any, **options: Any) -> Tensor:
    return ops.operator_attention(*args, **options, backend=Backend.EAGER)


def arguments(inputs: AttentionInputs, work: list[Tensor], backend: str) -> tuple[Any, ...]:
    """Of ``attention_forward``, with leaves that ask for gradients."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    bias, layout = inputs.bias or RelativeBias(), inputs.layout
    tables = [t if t is None else t.detach().clone().requires_grad_() for t in (bias.pos_table, bias.time_table)]
    geometry = (layout.seq_offsets, layout.num_targets, layout.contextual_seq_len)
    fields = ops._fields(inputs.mask)
    times = (bias.timestamps, bias.row_timestamps)
    return (q, k, v, *tables, *times, *geometry, work, *fields, inputs.alpha, inputs.scale, backend)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_operators_equal_the_oracle(case: AttentionCase) -> None:
    assert_equals_oracle(through_operators, make_inputs(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operators_are_registered_right(case: AttentionCase) -> None:
    inputs = make_inputs(case, torch.float32)
    torch.library.opcheck(ops.attention_forward, arguments(inputs, [], "eager"))
    layout, fields = inputs.layout, ops._fields(inputs.mask)
    for side in ("query", "key"):
        geometry = (layout.seq_offsets, layout.num_targets, layout.contextual_seq_len)
        torch.library.opcheck(ops.attention_work, (*geometry, *fields, case.total_rows, side, 16, 32))


@pytest.mark.parametrize("needed", [[True] * 5, [True, False, True, False, True], [False] * 5], ids=str)
def test_the_backward_operator_is_registered_right(needed: list[bool]) -> None:
    inputs = make_inputs(CASES[-1], torch.float32)
    given = [x.detach() if isinstance(x, Tensor) else x for x in arguments(inputs, [], "eager")]
    torch.library.opcheck(ops.attention_backward, (inputs.grad_out, *given, needed))


def compiled(backend: str = "aot_eager", **options: Any) -> Callable[..., Tensor]:
    """`hstu_attention` with a plan, as one graph."""

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: Any, mask: Any, **others: Any) -> Tensor:
        plan = plan_attention(layout, mask, bias=others["bias"], total_rows=q.shape[0])
        return hstu_attention(q, k, v, layout, mask, plan=plan, **others)

    result: Callable[..., Tensor] = torch.compile(attend, fullgraph=True, backend=backend, **options)
    return result


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_call_compiles_into_one_graph(case: AttentionCase) -> None:
    assert_equals_oracle(compiled(), make_inputs(case))


def test_other_lengths_need_no_other_graph() -> None:
    attend = compiled(dynamic=True)
    lengths: tuple[tuple[int, ...], ...] = ((63, 20), (40, 21), (5, 90))
    with torch.compiler.set_stance("default"):
        case = AttentionCase(name="first", lengths=lengths[0], table_reach=64)
        assert_equals_oracle(attend, replace(make_inputs(case), scale=0.125))
    with torch.compiler.set_stance("fail_on_recompile"):
        for other in lengths[1:]:
            # Two sequences again: the bound on their lengths may change, too.
            assert_equals_oracle(attend, replace(make_inputs(replace(case, lengths=other)), scale=0.125))


class Attend(torch.nn.Module):
    """Builds the layout from tensors, as an exported program must."""

    def __init__(self, case: AttentionCase, inputs: AttentionInputs) -> None:
        super().__init__()
        self.case, self.alpha, self.scale = case, inputs.alpha, inputs.scale

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, targets: Tensor, pos: Tensor, time: Tensor, at: Tensor
    ) -> Tensor:
        layout = JaggedLayout(offsets, 200, targets, self.case.contextual_seq_len)
        bias = RelativeBias(pos, time, at)
        return hstu_attention(q, k, v, layout, self.case.mask, alpha=self.alpha, scale=self.scale, bias=bias)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_an_exported_program_serves_other_batches(strict: bool) -> None:
    case = next(case for case in CASES if case.name == "everything")

    def inputs(lengths: tuple[int, ...], targets: tuple[int, ...]) -> tuple[AttentionInputs, tuple[Any, ...]]:
        made = make_inputs(replace(case, lengths=lengths, num_targets=targets, table_reach=64), torch.float32)
        bias, layout = made.bias, made.layout
        assert bias is not None
        tables = (bias.pos_table, bias.time_table, bias.timestamps)
        return made, (made.q, made.k, made.v, layout.seq_offsets, layout.num_targets, *tables)

    made, given = inputs((40, 0, 33), (20, 0, 4))
    module = Attend(case, made)
    rows, batch = torch.export.Dim("rows", min=2), torch.export.Dim("batch", min=2)
    by_rows = {0: rows}
    shapes = (by_rows, by_rows, by_rows, {0: batch + 1}, {0: batch}, None, None, by_rows)
    program = torch.export.export(module, given, strict=strict, dynamic_shapes=shapes).module()
    for lengths, targets in (((40, 0, 33), (20, 0, 4)), ((7, 60, 33, 9), (2, 0, 4, 3))):
        made, given = inputs(lengths, targets)
        assert torch.equal(program(*given), module(*given))


def test_autocast_computes_in_its_own_precision() -> None:
    inputs = make_inputs(CASES[0], torch.float32)
    call = {"alpha": inputs.alpha, "scale": inputs.scale, "bias": inputs.bias}

    def attend(dtype: torch.dtype) -> Tensor:
        q, k, v = (x.to(dtype) for x in (inputs.q, inputs.k, inputs.v))
        return hstu_attention(q, k, v, inputs.layout, inputs.mask, **call)  # type: ignore[arg-type]

    expected = attend(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(torch.float32)
        mixed = hstu_attention(
            inputs.q,
            inputs.k.bfloat16(),
            inputs.v,
            inputs.layout,
            inputs.mask,
            **call,  # type: ignore[arg-type]
        )
        assert attend(torch.float64).dtype == torch.float64
    assert out.dtype == mixed.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert torch.equal(mixed, expected)


def test_autocast_gives_gradients_in_the_precision_of_the_leaves() -> None:
    inputs = make_inputs(CASES[0], torch.float32)

    def attend(*args: Any, **options: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return hstu_attention(*args, **options)

    for name, result in run_attention(attend, inputs).items():
        assert result.dtype == (torch.bfloat16 if name == "out" else torch.float32)
        exact = run_attention(hstu_attention, inputs)[name]
        assert float((result - exact).norm() / exact.norm()) < 0.02


def test_autocast_compiles() -> None:
    inputs = make_inputs(CASES[0], torch.float32)

    def attend(q: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return hstu_attention(q, inputs.k, inputs.v, inputs.layout, inputs.mask, alpha=1.0, scale=1.0)

    assert torch.equal(torch.compile(attend, fullgraph=True, backend="aot_eager")(inputs.q), attend(inputs.q))


def test_inputs_need_not_be_contiguous() -> None:
    inputs = make_inputs(CASES[0])
    spread = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (inputs.q, inputs.k, inputs.v)]
    strided = AttentionInputs(*spread, inputs.grad_out, *(getattr(inputs, n) for n in AttentionInputs.__slots__[4:]))
    assert not strided.q.is_contiguous()
    assert_equals_oracle(through_operators, strided)
    torch.library.opcheck(ops.attention_forward, arguments(strided, [], "eager"))


def test_the_oracle_is_not_compiled() -> None:
    inputs = make_inputs(CASES[0])
    with pytest.raises(UnsupportedBackend, match="reference cannot be compiled or exported; use backend='eager'"):
        ops.operator_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.layout,
            inputs.mask,
            alpha=1.0,
            scale=1.0,
            bias=None,
            backend=Backend.REFERENCE,
        )
