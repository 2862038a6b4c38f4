"""Floating-point operations of a model on given lengths: the arithmetic of its products, from its own mask.

A multiplication with an addition counts as two. Counted are the projections and, for every visible pair of rows and
every head, ``q . k`` and the weighted sum of ``v``; norms, SiLU, biases and dropout are not. What a kernel computes in
vain inside its tiles, or again in its backward, is not counted either: these are the operations the model asks for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hstu_kernels import AttentionMask, JaggedLayout
from hstu_kernels.counts import history_pairs, target_pairs
from hstu_plugin.config import HSTUConfig, Variant

# Each product of the forward has two of its size in the backward, for its two factors.
TRAINING_FACTOR = 3


@dataclass(frozen=True, slots=True)
class FlopCount:
    """``[B]`` float64 operations of each sequence. Whole numbers, exact up to 2**53."""

    linear: Tensor
    attention: Tensor

    @property
    def total(self) -> Tensor:
        return self.linear + self.attention

    def __add__(self, other: FlopCount) -> FlopCount:
        return FlopCount(self.linear + other.linear, self.attention + other.attention)

    def __mul__(self, factor: float | Tensor) -> FlopCount:
        return FlopCount(self.linear * factor, self.attention * factor)


def model_flops(config: HSTUConfig, layout: JaggedLayout) -> FlopCount:
    """One forward pass of the encoder over ``[contextual | history | targets]``."""
    history = layout.history_lengths
    return sequence_flops(config, history, layout.seq_lengths - history, contextual_seq_len=layout.contextual_seq_len)


def training_flops(config: HSTUConfig, layout: JaggedLayout) -> FlopCount:
    """One forward and backward pass."""
    return model_flops(config, layout) * TRAINING_FACTOR


def sequence_flops(
    config: HSTUConfig, history_lengths: Tensor, num_targets: Tensor | None = None, *, contextual_seq_len: int = 0
) -> FlopCount:
    """As `model_flops`, from ``[B]`` int64 lengths; ``history_lengths`` count the contextual rows, too."""
    return prefill_flops(config, history_lengths, contextual_seq_len=contextual_seq_len) + decode_flops(
        config,
        history_lengths,
        torch.zeros_like(history_lengths) if num_targets is None else num_targets,
        contextual_seq_len=contextual_seq_len,
    )


def prefill_flops(config: HSTUConfig, history_lengths: Tensor, *, contextual_seq_len: int = 0) -> FlopCount:
    """The rows of the histories alone."""
    total = _nothing(history_lengths)
    for layers, rows in _stretches(config, history_lengths, contextual_seq_len):
        pairs = history_pairs(config.mask, rows, contextual_seq_len)
        total = total + _layer(config, rows, pairs) * layers
    return total


def decode_flops(
    config: HSTUConfig, history_lengths: Tensor, num_targets: Tensor, *, contextual_seq_len: int = 0
) -> FlopCount:
    """``num_targets [B]`` candidates against cached histories, in any number of micro-batches."""
    total = _nothing(history_lengths)
    for layers, rows in _stretches(config, history_lengths, contextual_seq_len):
        pairs = target_pairs(config.mask, rows, num_targets, contextual_seq_len)
        total = total + _layer(config, num_targets, pairs) * layers
    return total


def scoring_flops(
    config: HSTUConfig,
    history_lengths: Tensor,
    num_targets: Tensor,
    *,
    micro_batch_size: int | None = None,
    contextual_seq_len: int = 0,
) -> FlopCount:
    """Scoring of candidates: with M-FALCON, or naively where ``micro_batch_size`` is given.

    Args:
        micro_batch_size: candidates of a user in one pass that encodes the history again.
    """
    prefill = prefill_flops(config, history_lengths, contextual_seq_len=contextual_seq_len)
    passes: float | Tensor = 1.0
    if micro_batch_size is not None:
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size: expected a number >= 1, got {micro_batch_size}")
        passes = torch.div(num_targets + micro_batch_size - 1, micro_batch_size, rounding_mode="floor").double()
    return prefill * passes + decode_flops(config, history_lengths, num_targets, contextual_seq_len=contextual_seq_len)


def full_attention(config: HSTUConfig) -> HSTUConfig:
    """The same model without window and truncation: what an ULTRA-HSTU is compared with."""
    return replace(config, mask=AttentionMask(), truncate_after_layers=0, truncate_to=0)


def _stretches(config: HSTUConfig, history_lengths: Tensor, contextual_seq_len: int) -> list[tuple[int, Tensor]]:
    """Numbers of layers, and the history rows that they see."""
    if not config.truncates:
        return [(config.num_layers, history_lengths)]
    kept = torch.minimum(history_lengths, history_lengths.new_tensor(contextual_seq_len + config.truncate_to))
    first = config.truncate_after_layers
    return [(first, history_lengths), (config.num_layers - first, kept)]


def _layer(config: HSTUConfig, rows: Tensor, pairs: Tensor) -> FlopCount:
    heads, qk, uv, width = config.num_heads, config.attention_dim, config.linear_dim, config.embedding_dim
    gated = 3 if config.variant is Variant.PRODUCTION else 1
    per_row = 2 * width * heads * (2 * uv + 2 * qk) + 2 * gated * heads * uv * width
    per_pair = 2 * heads * (qk + uv)
    return FlopCount(rows.double() * per_row, pairs.double() * per_pair)


def _nothing(like: Tensor) -> FlopCount:
    zeros = torch.zeros_like(like, dtype=torch.float64)
    return FlopCount(zeros, zeros)
