"""Target attention over buffers of fixed shapes, with the history's end in a tensor: nothing here asks the device.

A CUDA graph replays launches with the same shapes and addresses. So one user's keys and values lie at the front of
larger buffers, and what is behind the history's end is masked.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hstu_kernels.bias import RelativeBias, position_index, time_buckets
from hstu_kernels.mask import AttentionMask

# Keys whose logits are held at once.
_KEY_BLOCK = 2048


def static_target_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    history_end: Tensor,
    mask: AttentionMask,
    *,
    contextual_seq_len: int,
    alpha: float,
    scale: float,
    bias: RelativeBias | None = None,
    boundaries: Tensor | None = None,
) -> Tensor:
    """Targets of one user against buffers of its cached history and against themselves.

    Equals `hstu_target_attention` over the first ``history_end`` rows of the buffers.

    Args:
        q, k: ``[T, H, Dqk]``. v: ``[T, H, Dv]``: the targets.
        keys: ``[C, H, Dqk]``. values: ``[C, H, Dv]``: buffers; finite everywhere.
        history_end: int64 scalar tensor, at most ``C``.
        mask, contextual_seq_len, alpha, scale: as in `hstu_attention`.
        bias: ``timestamps [C]`` and ``row_timestamps [T]`` when it has a time table.
        boundaries: `bucket_boundaries` of the time table, on the device.

    Returns:
        ``[T, H, Dv]``.
    """
    pos_table = None if bias is None or bias.pos_table is None else bias.pos_table.to(q.dtype)
    time_table = None if bias is None or bias.time_table is None else bias.time_table.to(q.dtype)
    own = alpha * (q * k).sum(-1, keepdim=True)
    if pos_table is not None:
        own = own + pos_table[(pos_table.numel() - 1) // 2]
    if time_table is not None:
        own = own + time_table[0]
    out = F.silu(own) * scale * v
    position = history_end.reshape(1, 1)
    for begin in range(0, keys.shape[0], _KEY_BLOCK):
        end = min(begin + _KEY_BLOCK, keys.shape[0])
        cols = torch.arange(begin, end, device=q.device)[None, :]
        logits = alpha * torch.einsum("ihd,jhd->hij", q, keys[begin:end])
        if pos_table is not None:
            logits = logits + pos_table[position_index(position, cols, pos_table)]
        if time_table is not None:
            assert bias is not None and boundaries is not None
            assert bias.row_timestamps is not None and bias.timestamps is not None
            buckets = time_buckets(bias.row_timestamps[:, None], bias.timestamps[None, begin:end], boundaries)
            logits = logits + time_table[buckets.long()]
        seen = mask.visible(position, cols, position, contextual_seq_len) & (cols < position)
        out = out + torch.einsum("hij,jhd->ihd", F.silu(logits) * scale * seen, values[begin:end])
    return out
