"""Target attention over buffers of fixed shapes, with all geometry in tensors: nothing here asks the device.

A CUDA graph replays launches with the same shapes and addresses. So histories lie at the front of larger buffers and
candidates at the front of a larger batch; where they end is read on the device, and what is behind does not count.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hstu_kernels.attention.triton.schedule import device_boundaries
from hstu_kernels.backend import Backend
from hstu_kernels.bias import RelativeBias, position_index, time_buckets
from hstu_kernels.layout import JaggedLayout, LayerKV
from hstu_kernels.mask import AttentionMask

# Keys whose logits are held at once.
_KEY_BLOCK = 2048


def static_target_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: LayerKV,
    layout: JaggedLayout,
    mask: AttentionMask,
    *,
    alpha: float,
    scale: float,
    bias: RelativeBias | None = None,
    backend: Backend,
) -> Tensor:
    """As `hstu_target_attention`, but nothing is checked, and buffers may be longer than what is in them.

    Args:
        q, k: ``[T, H, Dqk]``. v: ``[T, H, Dv]``: targets, those of ``layout`` first.
        cache: ``[C, H, D]`` keys and values, those of ``cache.layout`` first; finite everywhere.
        layout, cache.layout: of the same users. ``max_seq_len`` bounds the histories.
        mask, alpha, scale: as in `hstu_attention`.
        bias: ``timestamps [C]`` and ``row_timestamps [T]`` when it has a time table.
        backend: ``triton``, or any other for dense products of all targets with all keys.

    Returns:
        ``[T, H, Dv]``; rows behind the last target hold anything.
    """
    if backend is Backend.TRITON:
        # Here, so that everything else runs where Triton is not installed.
        from hstu_kernels.attention.triton.target_launch import triton_target_attention

        return triton_target_attention(q, k, v, cache, layout, mask, alpha=alpha, scale=scale, bias=bias)
    return _dense(q, k, v, cache, layout, mask, alpha=alpha, scale=scale, bias=bias)


def users_of_rows(layout: JaggedLayout, rows: Tensor) -> Tensor:
    """``[R]`` int64: the sequence that each of ``rows [R]`` belongs to; the batch size behind the last one."""
    return torch.searchsorted(layout.seq_offsets, rows, right=True) - 1


def _dense(
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
    pos_table = None if bias is None or bias.pos_table is None else bias.pos_table.to(q.dtype)
    time_table = None if bias is None or bias.time_table is None else bias.time_table.to(q.dtype)
    own = alpha * (q * k).sum(-1, keepdim=True)
    if pos_table is not None:
        own = own + pos_table[(pos_table.numel() - 1) // 2]
    if time_table is not None:
        own = own + time_table[0]
    out = F.silu(own) * scale * v
    users = users_of_rows(layout, torch.arange(q.shape[0], device=q.device))
    last = layout.batch_size - 1
    position = cache.layout.seq_lengths[users.clamp(max=last)][:, None]
    for begin in range(0, cache.k.shape[0], _KEY_BLOCK):
        end = min(begin + _KEY_BLOCK, cache.k.shape[0])
        rows = torch.arange(begin, end, device=q.device)
        owners = users_of_rows(cache.layout, rows)
        cols = (rows - cache.layout.seq_offsets[owners.clamp(max=last)])[None, :]
        logits = alpha * torch.einsum("ihd,jhd->hij", q, cache.k[begin:end])
        if pos_table is not None:
            logits = logits + pos_table[position_index(position, cols, pos_table)]
        if time_table is not None:
            assert bias is not None and bias.row_timestamps is not None and bias.timestamps is not None
            boundaries = device_boundaries(bias.num_buckets, q.device)
            buckets = time_buckets(bias.row_timestamps[:, None], bias.timestamps[None, begin:end], boundaries)
            logits = logits + time_table[buckets.long()]
        seen = mask.visible(position, cols, position, cache.layout.contextual_seq_len) & (cols < position)
        seen = seen & (users[:, None] == owners[None, :]) & (users[:, None] <= last)
        out = out + torch.einsum("hij,jhd->ihd", F.silu(logits) * scale * seen, cache.v[begin:end])
    return out
