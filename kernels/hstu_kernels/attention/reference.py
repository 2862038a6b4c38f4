"""The oracle: HSTU attention written to be read, one sequence at a time, in the precision of its inputs.

    S_ij = SiLU(alpha * (q_i . k_j) + rab_ij) * scale   where visible(i, j), else 0;   out_i = sum_j S_ij v_j

(HSTU, equations 1 to 3, with the pointwise aggregated attention of section 3.2.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hstu_kernels.bias import RelativeBias, next_event_timestamps
from hstu_kernels.layout import JaggedLayout, LayerKV
from hstu_kernels.mask import AttentionMask


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: JaggedLayout,
    mask: AttentionMask,
    *,
    alpha: float,
    scale: float,
    bias: RelativeBias | None,
) -> Tensor:
    """Arguments and result as `hstu_kernels.hstu_attention`; differentiable, any float dtype."""
    offsets = layout.seq_offsets.tolist()
    history_lengths = layout.history_lengths.tolist()
    key_times = None if bias is None else bias.timestamps
    row_times = None if bias is None else bias.row_timestamps
    if key_times is not None and row_times is None:
        row_times = next_event_timestamps(key_times, layout)

    outputs = []
    for begin, end, history_end in zip(offsets[:-1], offsets[1:], history_lengths, strict=True):
        rows = torch.arange(end - begin, device=q.device)
        visible = mask.visible(rows[:, None], rows[None, :], history_end, layout.contextual_seq_len)
        positions = rows.clamp(max=history_end)
        rab: Tensor | float = 0.0
        if bias is not None:
            rab = bias.dense(
                positions,
                positions,
                None if row_times is None else row_times[begin:end],
                None if key_times is None else key_times[begin:end],
            ).to(q.dtype)
        logits = alpha * torch.einsum("ihd,jhd->hij", q[begin:end], k[begin:end]) + rab
        weights = torch.where(visible, F.silu(logits) * scale, 0.0)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v[begin:end]))
    return torch.cat(outputs) if outputs else v.new_zeros(v.shape)


def reference_target_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: LayerKV,
    layout: JaggedLayout,
    mask: AttentionMask,
    *,
    alpha: float,
    scale: float,
    bias: RelativeBias | None,
) -> Tensor:
    """Arguments and result as `hstu_kernels.hstu_target_attention`; differentiable, any float dtype."""
    offsets = layout.seq_offsets.tolist()
    cache_offsets = cache.layout.seq_offsets.tolist()
    outputs = []
    for b in range(layout.batch_size):
        begin, end = offsets[b], offsets[b + 1]
        first, last = cache_offsets[b], cache_offsets[b + 1]
        history_end = last - first
        targets = end - begin
        # One target after another behind the history, as in the full sequence.
        rows = history_end + torch.arange(targets, device=q.device)
        cols = torch.arange(history_end + targets, device=q.device)
        visible = mask.visible(rows[:, None], cols[None, :], history_end, cache.layout.contextual_seq_len)
        rab: Tensor | float = 0.0
        if bias is not None:
            times = bias.row_timestamps
            key_times = None
            if times is not None and bias.timestamps is not None:
                key_times = torch.cat([bias.timestamps[first:last], times[begin:end]])
            rab = bias.dense(
                rows.clamp(max=history_end),
                cols.clamp(max=history_end),
                None if times is None else times[begin:end],
                key_times,
            ).to(q.dtype)
        keys = torch.cat([cache.k[first:last], k[begin:end]])
        values = torch.cat([cache.v[first:last], v[begin:end]])
        logits = alpha * torch.einsum("ihd,jhd->hij", q[begin:end], keys) + rab
        weights = torch.where(visible, F.silu(logits) * scale, 0.0)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, values))
    return torch.cat(outputs) if outputs else v.new_zeros(v.shape)
