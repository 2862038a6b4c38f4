"""Long tiles cut into pieces: what `test_triton_interpreter.py` runs in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import functools
import os
from dataclasses import replace

import pytest
import torch

from hstu_kernels import AttentionMask
from hstu_kernels.attention.triton import plan_triton, schedule
from hstu_kernels.attention.triton.launch import triton_attention, triton_backward
from hstu_kernels.attention.triton.tiles import Tile, TileSet
from hstu_kernels.testing import (
    AttentionCase,
    AttentionInputs,
    BiasKind,
    assert_within_budget,
    make_inputs,
    poisoned_empty,
    run_attention,
)

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_triton_interpreter.py"
torch.set_num_threads(1)

TILES = TileSet(Tile(16, 16, 4, 2), Tile(16, 16, 4, 2), Tile(16, 16, 4, 2), Tile(16, 16, 4, 1))
MASKS = {
    "prefix": AttentionMask(max_attn_len=5, global_prefix_len=7),
    "tail": AttentionMask(max_attn_len=5, full_attn_tail_len=8),
    "both-with-context": AttentionMask(
        max_attn_len=5, global_prefix_len=4, full_attn_tail_len=5, contextual_sees_history=True
    ),
}


def attention(q, k, v, layout, mask, *, alpha, scale, bias):  # type: ignore[no-untyped-def]
    plan = plan_triton(layout, mask, bias, q.shape[0])
    return triton_attention(q, k, v, plan, alpha=alpha, scale=scale, bias=bias, tiles=TILES)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "PIECE_ROWS", 32)


def inputs_of(name: str, bias: BiasKind = BiasKind.NONE) -> AttentionInputs:
    contextual = 3 if "context" in name else 0
    case = AttentionCase(
        name=name,
        lengths=(36, 3, 67),
        num_targets=(0, 0, 3),
        contextual_seq_len=contextual,
        mask=MASKS[name],
        bias=bias,
        qk_dim=16,
        v_dim=24,
    )
    return make_inputs(case, torch.float32)


@pytest.mark.parametrize("name", MASKS)
def test_pieces_stay_in_the_budget(name: str) -> None:
    inputs = inputs_of(name)
    plan = plan_triton(inputs.layout, inputs.mask, None, inputs.q.shape[0])
    assert plan.pieces("query", 16)[1] + plan.pieces("key", 16)[1] > 0
    # Poisoned: every row is written.
    with poisoned_empty():
        assert_within_budget(attention, inputs, signal=False)


def test_pieces_with_tables() -> None:
    assert_within_budget(attention, inputs_of("both-with-context", BiasKind.BOTH), signal=False)


def test_the_launch_bound_is_never_a_number() -> None:
    inputs = inputs_of("tail")
    wider = run_attention(attention, replace(inputs, layout=replace(inputs.layout, max_seq_len=10_000)))
    for name, result in run_attention(attention, inputs).items():
        assert torch.equal(result, wider[name])


@pytest.mark.parametrize("name", ["prefix", "tail"])
def test_neighbours_move_no_border(name: str) -> None:
    """The same sequence alone and behind others, of which one is cut, too: the same bits."""
    case = AttentionCase(name=name, lengths=(35,), mask=MASKS[name], bias=BiasKind.NONE, qk_dim=16, v_dim=16)
    alone = make_inputs(case, torch.float32)
    together = make_inputs(replace(case, lengths=(41, 3, 35)), torch.float32)
    for x in ("q", "k", "v", "grad_out"):
        if hasattr(alone, x):
            getattr(together, x)[44:] = getattr(alone, x)
    together = replace(together, alpha=alone.alpha, scale=alone.scale)
    expected = run_attention(functools.partial(attention), alone)
    for key, result in run_attention(attention, together).items():
        assert torch.equal(result[44:], expected[key]), key


@pytest.mark.parametrize(
    ("needed", "early"),
    [
        ((True, True, True, False, False), True),
        ((False, True, True, False, False), False),
        ((True, False, True, False, False), True),
        ((True, True, True, True, False), False),
        ((False, True, True, False, True), False),
    ],
    ids=["all", "without-dq", "dq-dv", "position", "time"],
)
def test_dk_and_dv_begin_early_behind_dq_alone(needed: tuple[bool, ...], early: bool) -> None:
    """Kernels that add up the tables' gradients stand between, and without dq nobody has waited for the inputs."""
    tables = BiasKind.BOTH if needed[3] or needed[4] else BiasKind.NONE
    inputs = inputs_of("prefix", tables)
    plan = plan_triton(inputs.layout, inputs.mask, inputs.bias, inputs.q.shape[0])
    entries = (None, None) if inputs.bias is None else (inputs.bias.pos_table, inputs.bias.time_table)
    operands = [x.detach() for x in (inputs.grad_out, inputs.q, inputs.k, inputs.v)]
    triton_backward(*operands, *entries, plan, inputs.alpha, inputs.scale, TILES, needed)
    jobs = [key for kit in plan.kits.values() for key in kit.jobs]
    assert [key[3] for key in jobs if key[0] == "dkdv"] == [early]
