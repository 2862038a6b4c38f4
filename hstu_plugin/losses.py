"""Objectives of next-item prediction over jagged rows, and the samplers of their negatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hstu_plugin.config import LossType, NegativeSource, RetrievalConfig, Similarity

_NORM_EPS = 1e-6
_SHUT_OUT = -5e4


def normalise(x: Tensor, similarity: Similarity) -> Tensor:
    """Vectors ``[..., D]`` as the similarity wants them: untouched for dot, of unit length for L2."""
    if similarity is Similarity.DOT:
        return x
    lengths: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / lengths.clamp(min=_NORM_EPS)


def next_item_loss(
    users: Tensor,
    positives: Tensor,
    items: Tensor,
    config: RetrievalConfig,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean loss over the rows.

    Args:
        users: ``[R, D]`` encoder outputs of the rows that have a positive.
        positives: ``[R]`` int64 item ids in ``[1, num_items)``; 0 is the padding id and never scored.
        items: ``[num_items, D]`` item table.
        config: similarity, temperature, loss and negatives.
        generator: source of the negatives; the default generator of the device when ``None``.

    Returns:
        scalar; 0 (with a gradient path) when there is no row.
    """
    if positives.numel() == 0:
        return users.sum() * 0
    users = normalise(users, config.similarity)
    if config.loss is LossType.FULL_SOFTMAX:
        table = normalise(items, config.similarity)
        # Dividing the users instead of the logits saves two passes over the largest tensor of the training.
        logits = (users / config.temperature) @ table[1:].T
        return F.cross_entropy(logits.float(), positives - 1)

    positive_items = normalise(items[positives], config.similarity)
    positive_logits = (users * positive_items).sum(-1, keepdim=True) / config.temperature
    if config.negatives is NegativeSource.UNIFORM:
        negatives = _uniform_negatives(positives, items.shape[0], config.num_negatives, generator)
        # Normalise the table, not each drawn row: with R * num_negatives draws that is far less work.
        table = normalise(items, config.similarity)
        # F.embedding: its backward sums repeated rows faster than that of an index.
        negative_logits = torch.bmm(F.embedding(negatives, table), users[:, :, None]).squeeze(2) / config.temperature
    else:
        chosen = _in_batch_negatives(positives, config.num_negatives, generator)
        negatives = positives[chosen]
        negative_logits = users @ positive_items.T / config.temperature
        negative_logits = negative_logits.gather(1, chosen)
        if config.logq_correction and config.loss is LossType.SAMPLED_SOFTMAX:
            counts = torch.bincount(positives, minlength=items.shape[0]).to(users.dtype)
            log_q = torch.log(counts / positives.numel())
            negative_logits = negative_logits - log_q[negatives]
            positive_logits = positive_logits - log_q[positives][:, None]
    # A negative that is the positive itself would be pushed both ways.
    collides = negatives == positives[:, None]
    negative_logits = negative_logits.masked_fill(collides, _SHUT_OUT)
    if config.loss is LossType.SAMPLED_SOFTMAX:
        logits = torch.cat([positive_logits, negative_logits], dim=1).float()
        return F.cross_entropy(logits, torch.zeros_like(positives))
    kept = (~collides).to(users.dtype)
    negative = (F.softplus(negative_logits) * kept).sum(1) / kept.sum(1).clamp(min=1)
    return (F.softplus(-positive_logits.squeeze(1)) + negative).mean()


def _uniform_negatives(
    positives: Tensor, num_items: int, num_negatives: int, generator: torch.Generator | None
) -> Tensor:
    """``[R, num_negatives]`` ids drawn uniformly from ``[1, num_items)``."""
    shape = (positives.numel(), num_negatives)
    return torch.randint(1, num_items, shape, generator=generator, device=positives.device)


def _in_batch_negatives(positives: Tensor, num_negatives: int, generator: torch.Generator | None) -> Tensor:
    """``[R, num_negatives]`` rows of the batch, drawn uniformly with replacement."""
    shape = (positives.numel(), num_negatives)
    return torch.randint(0, positives.numel(), shape, generator=generator, device=positives.device)
