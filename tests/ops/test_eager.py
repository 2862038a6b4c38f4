"""The eager path's own: what its plan spares, and what its backward refuses."""

from __future__ import annotations

import pytest
import torch

from hstu_kernels import AttentionMask, Backend, JaggedLayout, hstu_attention
from hstu_kernels.attention import eager
from hstu_kernels.testing import AttentionCase, make_inputs


def test_a_window_bounds_the_keys_of_unequal_lengths_in_one_group() -> None:
    window, prefix = 40, 3
    mask = AttentionMask(max_attn_len=window, global_prefix_len=prefix)
    plan = eager.plan_eager(JaggedLayout.from_lengths(torch.tensor([980, 1000])), mask, None)
    (group,) = plan.groups
    assert group.valid is not None, "the group is not padded"
    assert len(group.blocks) > 3
    for block in group.blocks:
        keys = torch.arange(group.index.shape[1])[block.cols].numel()
        assert keys <= prefix + window + block.row_end - block.row_begin


def test_backward_says_that_it_has_no_derivative() -> None:
    inputs = make_inputs(AttentionCase(name="tiny", lengths=(4, 3)))
    q = inputs.q.clone().requires_grad_()
    out = hstu_attention(
        q,
        inputs.k,
        inputs.v,
        inputs.layout,
        inputs.mask,
        alpha=inputs.alpha,
        scale=inputs.scale,
        bias=inputs.bias,
        backend=Backend.EAGER,
    )
    (slope,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
