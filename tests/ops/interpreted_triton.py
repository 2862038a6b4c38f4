"""What `test_triton_interpreter.py` runs in a process of its own, with TRITON_INTERPRET=1 from its start."""

from __future__ import annotations

import functools
import os
from dataclasses import replace

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from hstu_kernels import (
    AttentionMask,
    JaggedLayout,
    LayerKV,
    RelativeBias,
    UnsupportedBackend,
    hstu_attention,
    hstu_target_attention,
    plan_attention,
)
from hstu_kernels.attention import ops
from hstu_kernels.attention.triton import plan_triton
from hstu_kernels.attention.triton.launch import triton_attention
from hstu_kernels.attention.triton.target_launch import triton_target_attention
from hstu_kernels.attention.triton.tiles import Tile, TileSet
from hstu_kernels.testing import (
    ATTENTION_CASES,
    AttentionCase,
    AttentionInputs,
    BiasKind,
    assert_within_budget,
    make_inputs,
    poisoned_empty,
    run_attention,
    split_targets,
)

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_triton_interpreter.py"
torch.set_num_threads(1)

# Small blocks: many tiles, edges of every kind, in short sequences.
SMALL = TileSet(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 1))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: JaggedLayout,
    mask: AttentionMask,
    *,
    alpha: float,
    scale: float,
    bias: RelativeBias | None,
    tiles: TileSet | None = SMALL,
) -> Tensor:
    plan = plan_triton(layout, mask, bias, q.shape[0])
    return triton_attention(q, k, v, plan, alpha=alpha, scale=scale, bias=bias, tiles=tiles)


def served(case: AttentionCase) -> AttentionCase:
    """The named case at widths that the kernels serve, with short sequences: an interpreter is slow."""
    lengths = tuple(length if length <= 40 else 33 + length % 8 for length in case.lengths[:5])
    targets = case.num_targets
    if targets is not None:
        room = [max(0, length - case.contextual_seq_len - 6) for length in lengths]
        targets = tuple(
            min(t, r) if t < n else s for t, n, r, s in zip(targets, case.lengths, room, lengths, strict=False)
        )
    widths = (24, 40) if case.qk_dim != case.v_dim else (16, 16)
    heads = case.heads if case.name in ("odd-lengths", "three-heads-unequal-widths") else 1
    return replace(case, lengths=lengths, num_targets=targets, heads=heads, qk_dim=widths[0], v_dim=widths[1])


CASES = [served(case) for case in ATTENTION_CASES]

IN_HALF = ("odd-lengths", "three-heads-unequal-widths", "everything", "contextual-sees-history", "window-tail")


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in IN_HALF], ids=str)
def test_float32_stays_in_the_budget(case: AttentionCase) -> None:
    assert_within_budget(attention, make_inputs(case, torch.float32), signal=False)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in IN_HALF], ids=str)
def test_float16_stays_in_the_budget(case: AttentionCase) -> None:
    assert_within_budget(attention, make_inputs(case, torch.float16))


def test_the_tiles_of_the_table_give_the_same() -> None:
    inputs = make_inputs(CASES[1], torch.float32)
    assert_within_budget(functools.partial(attention, tiles=None), inputs, signal=False)


def test_through_the_door_with_and_without_a_plan() -> None:
    case = next(case for case in CASES if case.name == "targets")
    inputs = make_inputs(case, torch.float32)
    assert_within_budget(functools.partial(hstu_attention, backend="triton"), inputs, signal=False)
    plan = plan_attention(inputs.layout, inputs.mask, bias=inputs.bias, total_rows=inputs.q.shape[0], backend="triton")
    arguments = {"alpha": inputs.alpha, "scale": inputs.scale, "bias": inputs.bias, "backend": "triton"}
    planned = hstu_attention(inputs.q, inputs.k, inputs.v, inputs.layout, inputs.mask, plan=plan, **arguments)  # type: ignore[arg-type]
    alone = hstu_attention(inputs.q, inputs.k, inputs.v, inputs.layout, inputs.mask, **arguments)  # type: ignore[arg-type]
    assert torch.equal(planned, alone)


def operator_arguments(inputs: AttentionInputs) -> tuple[object, ...]:
    """Of ``attention_forward``, with leaves that ask for gradients and the lists that the kernels read."""
    bias, layout = inputs.bias or RelativeBias(), inputs.layout
    geometry = (layout.seq_offsets, layout.num_targets, layout.contextual_seq_len)
    fields = ops._fields(inputs.mask)
    kind = (inputs.bias is not None, inputs.mask.max_attn_len > 0)
    keys = ops.work_keys(inputs.q.shape[2], inputs.v.shape[2], inputs.q.dtype, *kind)
    work = [ops.attention_work(*geometry, *fields, inputs.q.shape[0], *key) for key in keys]
    if bias.time_table is not None:
        assert bias.timestamps is not None
        asked = (bias.timestamps, bias.row_timestamps)
        for side, block in ops.span_keys(inputs.q.shape[2], inputs.v.shape[2], inputs.q.dtype):
            work.append(ops.attention_spans(*asked, *geometry, side, block))
    leaves = [
        x if x is None else x.detach().clone().requires_grad_()
        for x in (inputs.q, inputs.k, inputs.v, bias.pos_table, bias.time_table)
    ]
    times = (bias.timestamps, bias.row_timestamps)
    return (*leaves, *times, *geometry, work, *fields, inputs.alpha, inputs.scale, "triton")


@pytest.mark.parametrize("name", ["targets", "no-bias"])
def test_the_operator_is_registered_right(name: str) -> None:
    targets = (1, 2) if name == "targets" else None
    case = replace(next(case for case in CASES if case.name == name), lengths=(9, 5), num_targets=targets)
    inputs = make_inputs(case, torch.float32)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(ops.attention_forward, operator_arguments(inputs), test_utils=checks)
    layout = inputs.layout
    geometry = (layout.seq_offsets, layout.num_targets, layout.contextual_seq_len)
    for side in ("query", "key"):
        arguments = (*geometry, *ops._fields(inputs.mask), inputs.q.shape[0], side, 16, 32)
        torch.library.opcheck(ops.attention_work, arguments)


def test_two_layers_compile_into_one_graph_and_share_their_lists() -> None:
    case = AttentionCase(name="short", lengths=(9, 5), qk_dim=16, v_dim=16)
    inputs = make_inputs(case, torch.float32)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def attend(q: Tensor, k: Tensor, v: Tensor, *args: object, **options: object) -> Tensor:
        first = hstu_attention(q, k, v, *args, **options, backend="triton")  # type: ignore[arg-type]
        return hstu_attention(q, k, first, *args, **options, backend="triton")  # type: ignore[arg-type]

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    expected = run_attention(attend, inputs)
    for name, result in run_attention(compiled, inputs).items():
        torch.testing.assert_close(result, expected[name])
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    lists = len(ops.work_keys(16, 16, torch.float32, True, False))
    assert targets.count(torch.ops.hstu_kernels.attention_work.default) == lists
    assert targets.count(torch.ops.hstu_kernels.attention_backward.default) == 2


def test_every_row_is_written() -> None:
    inputs = make_inputs(CASES[3], torch.float32)
    with poisoned_empty():
        results = run_attention(attention, inputs)
    assert all(bool(torch.isfinite(result).all()) for result in results.values())


def output(inputs: AttentionInputs, **changed: Tensor | JaggedLayout) -> Tensor:
    arguments = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "layout": inputs.layout, "mask": inputs.mask} | changed
    return attention(**arguments, alpha=inputs.alpha, scale=inputs.scale, bias=inputs.bias)  # type: ignore[arg-type]


def test_non_contiguous_inputs() -> None:
    inputs = make_inputs(CASES[1], torch.float32)
    packed = torch.cat([inputs.q, inputs.k, inputs.v], 2)
    q, k, v = packed.split(inputs.q.shape[2], 2)
    assert not q.is_contiguous()
    expected = output(inputs)
    assert torch.equal(output(inputs, q=q, k=k, v=v), expected)
    transposed = inputs.q.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(output(inputs, q=transposed), expected)


def test_the_launch_bound_is_never_a_number() -> None:
    inputs = make_inputs(CASES[1], torch.float32)
    wider = replace(inputs.layout, max_seq_len=10_000)
    assert torch.equal(output(inputs, layout=wider), output(inputs))


def test_buckets_are_exact_at_every_threshold() -> None:
    """Time differences on both sides of each threshold, far beyond what float32 can tell apart."""
    num_buckets = 150
    edges = torch.tensor([int(2.718281828459045 ** (k * 0.301)) for k in range(60, 130, 4)])
    differences = torch.cat([edges - 1, edges, edges + 1])
    rows = differences.numel() + 1
    timestamps = torch.cat([torch.zeros(1, dtype=torch.int64), differences])
    case = AttentionCase(
        name="edges", lengths=(rows,), bias=BiasKind.TIME, qk_dim=16, v_dim=16, num_buckets=num_buckets
    )
    inputs = make_inputs(case, torch.float32)
    assert inputs.bias is not None
    asked = replace(inputs.bias, timestamps=timestamps, row_timestamps=torch.zeros_like(timestamps))
    assert_within_budget(attention, replace(inputs, bias=asked), signal=False)


def test_refusals() -> None:
    layout = JaggedLayout.from_lengths(torch.tensor([3]))
    options = {"layout": layout, "mask": AttentionMask(), "alpha": 1.0, "scale": 1.0, "backend": "triton"}

    def attend(dtype: torch.dtype, qk_dim: int, v_dim: int) -> None:
        q, v = torch.zeros(3, 1, qk_dim, dtype=dtype), torch.zeros(3, 1, v_dim, dtype=dtype)
        hstu_attention(q, q, v, **options)  # type: ignore[arg-type]

    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(UnsupportedBackend, match=f"triton .*{dtype}.* use backend='eager'"):
            attend(dtype, 16, 16)
    with pytest.raises(UnsupportedBackend, match="16 to 256, got Dqk 15"):
        attend(torch.float32, 15, 16)
    with pytest.raises(UnsupportedBackend, match="16 to 256, got Dv 257"):
        attend(torch.float32, 16, 257)
    rows = torch.zeros(3, 1, 16)
    with pytest.raises(UnsupportedBackend, match="target attention has no gradient"):
        hstu_target_attention(rows.clone().requires_grad_(), rows, rows, LayerKV(rows, rows, layout), **options)  # type: ignore[arg-type]


TARGET_CASES = [case for case in CASES if case.num_targets is not None]
TARGET_MASKS = {
    "as-named": None,
    "window": AttentionMask(max_attn_len=7, window_targets=True),
    "window-prefix": AttentionMask(max_attn_len=9, global_prefix_len=3, window_targets=True),
    "window-meets-prefix": AttentionMask(max_attn_len=20, global_prefix_len=18, window_targets=True),
}

# Stretches of one block and of two; candidates that ask at one time and at their own.
TARGET_WAYS = [(name, None, 16, True) for name in TARGET_MASKS]
TARGET_WAYS += [(name, 3, 32, False) for name in ("as-named", "window-prefix")]


@pytest.mark.parametrize(("name", "micro_batch_size", "split_rows", "together"), TARGET_WAYS)
@pytest.mark.parametrize("case", TARGET_CASES, ids=str)
def test_cached_targets_equal_the_oracle(
    case: AttentionCase, name: str, micro_batch_size: int | None, split_rows: int, together: bool
) -> None:
    inputs = make_inputs(replace(case, mask=TARGET_MASKS[name] or case.mask), torch.float32)
    if together:
        inputs = asked_at_once(inputs)
    options = {"alpha": inputs.alpha, "scale": inputs.scale}
    for part in split_targets(inputs, micro_batch_size):
        with poisoned_empty():
            got = triton_target_attention(
                part.q,
                part.k,
                part.v,
                part.cache,
                part.layout,
                inputs.mask,
                **options,
                bias=part.bias,
                tile=SMALL.forward,
                split_rows=split_rows,
            )
        expected = hstu_target_attention(
            part.q,
            part.k,
            part.v,
            part.cache,
            part.layout,
            inputs.mask,
            **options,
            bias=part.bias,
            backend="reference",
        )
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def asked_at_once(inputs: AttentionInputs) -> AttentionInputs:
    """All targets ask at the time of the batch's first one."""
    bias, layout, total = inputs.bias, inputs.layout, inputs.q.shape[0]
    if bias is None or bias.timestamps is None:
        return inputs
    targets = layout.row_indices(total) >= layout.history_ends(total)
    first = bias.timestamps[targets.nonzero()[:1]].sum()
    times = torch.where(targets, first, bias.timestamps)
    asked = None if bias.row_timestamps is None else torch.where(targets, first, bias.row_timestamps)
    return replace(inputs, bias=replace(bias, timestamps=times, row_timestamps=asked))


def test_cached_targets_through_the_door() -> None:
    inputs = make_inputs(next(case for case in CASES if case.name == "targets"), torch.float32)
    (part,) = split_targets(inputs)
    attend = functools.partial(
        hstu_target_attention,
        part.q,
        part.k,
        part.v,
        part.cache,
        part.layout,
        inputs.mask,
        alpha=inputs.alpha,
        scale=inputs.scale,
        bias=part.bias,
    )
    torch.testing.assert_close(attend(backend="triton"), attend(backend="reference"), rtol=1e-5, atol=1e-6)
