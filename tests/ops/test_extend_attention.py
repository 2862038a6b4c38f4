"""hstu_extend_attention: rows appended to a cache equal the last rows of the full attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu_kernels import (
    AttentionMask,
    Backend,
    JaggedLayout,
    LayerKV,
    RelativeBias,
    UnsupportedBackend,
    hstu_attention,
    hstu_extend_attention,
    next_event_timestamps,
)
from hstu_kernels.attention import extend
from hstu_kernels.testing import ATTENTION_CASES, AttentionCase, BiasKind, make_inputs

CASES = [case for case in ATTENTION_CASES if case.num_targets is None] + [
    AttentionCase(
        name=f"everything-{kind}",
        lengths=(30, 0, 7, 2),
        heads=2,
        qk_dim=5,
        v_dim=7,
        contextual_seq_len=2,
        mask=AttentionMask(max_attn_len=4, global_prefix_len=3, full_attn_tail_len=5),
        bias=kind,
    )
    for kind in BiasKind
]


def split(case: AttentionCase, cached: list[int]) -> tuple[tuple[Any, ...], dict[str, Any], Tensor, Tensor]:
    """Arguments for the rows behind the first ``cached[b]`` of each sequence; those rows; and their full outputs."""
    inputs = make_inputs(case)
    layout = inputs.layout
    total = case.total_rows
    full = hstu_attention(
        inputs.q,
        inputs.k,
        inputs.v,
        layout,
        inputs.mask,
        alpha=inputs.alpha,
        scale=inputs.scale,
        bias=inputs.bias,
        backend="reference",
    )
    before = torch.tensor(cached, dtype=torch.int64)
    old = layout.row_indices(total) < torch.repeat_interleave(before, layout.seq_lengths)
    bias, old_times = inputs.bias, None
    if bias is not None and bias.timestamps is not None:
        old_times = bias.timestamps[old]
        asked = next_event_timestamps(bias.timestamps, layout)
        bias = RelativeBias(bias.pos_table, bias.time_table, bias.timestamps[~old], asked[~old])
    cache = LayerKV(
        inputs.k[old],
        inputs.v[old],
        JaggedLayout.from_lengths(before, contextual_seq_len=case.contextual_seq_len),
        old_times,
    )
    new = JaggedLayout.from_lengths(layout.seq_lengths - before)
    arguments = (inputs.q[~old], inputs.k[~old], inputs.v[~old], cache, new, inputs.mask)
    return arguments, {"alpha": inputs.alpha, "scale": inputs.scale, "bias": bias}, ~old, full


@pytest.mark.parametrize("row_block", [3, 512])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_full_attention(
    case: AttentionCase, share: float, row_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extend, "_ROW_BLOCK", row_block)
    if row_block == 3 and case.total_rows > 500:
        monkeypatch.setattr(extend, "_ROW_BLOCK", 77)
    arguments, options, new, full = split(case, [int(share * n) for n in case.lengths])
    got = hstu_extend_attention(*arguments, **options)
    assert got.shape == full[new].shape
    assert torch.allclose(got, full[new], rtol=0, atol=1e-12)


def test_refusals() -> None:
    case = CASES[-1]
    arguments, options, _, _ = split(case, [20, 0, 3, 2])
    q, k, v, cache, layout, mask = arguments
    bias = options["bias"]
    with pytest.raises(UnsupportedBackend, match=r"^backend: triton has no attention of appended rows"):
        hstu_extend_attention(*arguments, **options, backend=Backend.TRITON)
    with pytest.raises(ValueError, match=r"^q, k, v: expected"):
        hstu_extend_attention(q, k[:, :, :2], v, cache, layout, mask, **options)
    with pytest.raises(ValueError, match=r"^layout: expected new history rows alone"):
        hstu_extend_attention(q, k, v, cache, replace(layout, contextual_seq_len=1), mask, **options)
    with pytest.raises(ValueError, match=r"^cache: expected 4 sequences"):
        hstu_extend_attention(
            q, k, v, replace(cache, layout=JaggedLayout.from_lengths(torch.tensor([25]))), layout, mask, **options
        )
    with pytest.raises(ValueError, match=r"^cache.v: expected"):
        hstu_extend_attention(q, k, v, replace(cache, v=cache.v[1:]), layout, mask, **options)
    with pytest.raises(TypeError, match=r"^cache.k: expected torch.float64"):
        hstu_extend_attention(q, k, v, replace(cache, k=cache.k.float()), layout, mask, **options)
    with pytest.raises(ValueError, match=r"^bias.row_timestamps: expected"):
        hstu_extend_attention(*arguments, **{**options, "bias": replace(bias, row_timestamps=None)})
    with pytest.raises(ValueError, match=r"^cache.timestamps: expected"):
        hstu_extend_attention(q, k, v, replace(cache, timestamps=None), layout, mask, **options)
