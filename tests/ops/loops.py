"""A second implementation that shares nothing with the package: who sees whom, rab and attention in plain loops."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import torch
from torch import Tensor

from hstu_kernels import AttentionMask
from hstu_kernels.testing import AttentionInputs

getcontext().prec = 60


def sees(mask: AttentionMask, row: int, key: int, history_end: int, contextual_seq_len: int) -> bool:
    """The rules of the mask, one pair at a time."""
    if row == key:
        return True
    if key >= history_end:
        return False
    if row < contextual_seq_len:
        return key < contextual_seq_len or mask.contextual_sees_history
    if key > row:
        return False
    if key < contextual_seq_len + mask.global_prefix_len or mask.max_attn_len == 0:
        return True
    if row >= history_end:
        return not mask.window_targets or key >= history_end - mask.max_attn_len
    return row - key <= mask.max_attn_len or row >= history_end - mask.full_attn_tail_len


def exact_bucket(seconds: int, num_buckets: int) -> int:
    """``clamp(floor(ln(max(1, x)) / 0.301), 0, num_buckets)`` with 60 digits."""
    bucket = int((Decimal(max(1, seconds)).ln() / Decimal("0.301")).to_integral_value(rounding="ROUND_FLOOR"))
    return min(max(bucket, 0), num_buckets)


def loop_attention(inputs: AttentionInputs) -> Tensor:
    """``[L, H, Dv]``, element by element, in the precision of Python floats (fp64)."""
    q, k, v = inputs.q.double().tolist(), inputs.k.double().tolist(), inputs.v.double().tolist()
    out = torch.zeros(inputs.v.shape, dtype=torch.float64)
    offsets = inputs.layout.seq_offsets.tolist()
    counts = [0] * (len(offsets) - 1) if inputs.layout.num_targets is None else inputs.layout.num_targets.tolist()
    for sequence, targets in enumerate(counts):
        begin, end = offsets[sequence], offsets[sequence + 1]
        history_end = end - begin - targets
        for i in range(end - begin):
            for j in range(end - begin):
                if not sees(inputs.mask, i, j, history_end, inputs.layout.contextual_seq_len):
                    continue
                rab = _rab(inputs, begin, i, j, history_end)
                for head in range(inputs.q.shape[1]):
                    dot = sum(a * b for a, b in zip(q[begin + i][head], k[begin + j][head], strict=True))
                    logit = inputs.alpha * dot + rab
                    weight = logit / (1 + math.exp(-logit)) * inputs.scale
                    out[begin + i, head] += weight * torch.tensor(v[begin + j][head], dtype=torch.float64)
    return out


def _rab(inputs: AttentionInputs, begin: int, i: int, j: int, history_end: int) -> float:
    bias = inputs.bias
    rab = 0.0
    if bias is not None and bias.pos_table is not None:
        reach = (bias.pos_table.numel() + 1) // 2
        distance = min(j, history_end) - min(i, history_end)
        distance = max(-(reach - 1), min(reach - 1, distance))
        rab += float(bias.pos_table[distance + reach - 1])
    if bias is not None and bias.time_table is not None:
        assert bias.timestamps is not None
        asks_at = int(bias.timestamps[begin + i])
        if bias.row_timestamps is not None:
            asks_at = int(bias.row_timestamps[begin + i])
        elif i < history_end - 1:
            asks_at = int(bias.timestamps[begin + i + 1])
        bucket = exact_bucket(abs(asks_at - int(bias.timestamps[begin + j])), bias.time_table.numel() - 1)
        rab += float(bias.time_table[bucket])
    return rab
