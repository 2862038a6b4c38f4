"""How many pairs of rows a mask lets see each other, without looking at them."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu_kernels.layout import JaggedLayout
from hstu_kernels.mask import AttentionMask


def visible_pairs(mask: AttentionMask, layout: JaggedLayout) -> Tensor:
    """``[B]`` int64: the pairs (row, key) of each sequence for which `AttentionMask.visible` holds; exact."""
    history = layout.history_lengths
    return history_pairs(mask, history, layout.contextual_seq_len) + target_pairs(
        mask, history, layout.seq_lengths - history, layout.contextual_seq_len
    )


def history_pairs(mask: AttentionMask, history_lengths: Tensor, contextual_seq_len: int) -> Tensor:
    """``[B]`` int64: the pairs whose row is a contextual or a history row.

    Args:
        history_lengths: ``[B]`` int64, contextual and history rows; each 0 or at least ``contextual_seq_len``.
    """
    ends = history_lengths
    context = ends.clamp(max=contextual_seq_len)
    of_context = context * (ends if mask.contextual_sees_history else context)
    if mask.max_attn_len == 0:
        return of_context + _triangle(ends) - _triangle(context)
    # Row i sees i + 1 keys until prefix, window and itself together hold fewer.
    most = contextual_seq_len + mask.global_prefix_len + mask.max_attn_len + 1
    tail = torch.maximum(ends - mask.full_attn_tail_len, context)
    bend = torch.minimum(tail, context.clamp(min=most))
    windowed = _triangle(bend) - _triangle(context) + (tail - bend) * most
    return of_context + windowed + _triangle(ends) - _triangle(tail)


def target_pairs(mask: AttentionMask, history_lengths: Tensor, num_targets: Tensor, contextual_seq_len: int) -> Tensor:
    """``[B]`` int64: the pairs whose row is a target: ``num_targets [B]`` of them behind each history."""
    seen = history_lengths
    if mask.window_targets and mask.max_attn_len:
        reach = contextual_seq_len + mask.global_prefix_len + mask.max_attn_len
        seen = seen.clamp(max=reach)
    return num_targets * (seen + 1)


def _triangle(n: Tensor) -> Tensor:
    return torch.div(n * (n + 1), 2, rounding_mode="floor")
