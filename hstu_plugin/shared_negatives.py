"""Next-item loss over looked-up vectors, for item tables too large, or too far away, to be held whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hstu_plugin.config import LossType, NegativeSource, RetrievalConfig
from hstu_plugin.losses import normalise

_SHUT_OUT = -5e4


def shared_negatives_loss(
    users: Tensor,
    positive_ids: Tensor,
    positives: Tensor,
    negative_ids: Tensor,
    negatives: Tensor,
    config: RetrievalConfig,
) -> Tensor:
    """Mean loss over the rows; as `next_item_loss`, with one set of negatives for all rows.

    With ``in_batch`` negatives and ``logq_correction``, the ``q`` of an item is its share among
    ``positive_ids``.

    Args:
        users: ``[R, D]`` encoder outputs. positive_ids: ``[R]`` int64. positives: ``[R, D]`` their vectors.
        negative_ids: ``[M]`` int64. negatives: ``[M, D]`` their vectors.
        config: similarity, temperature, loss (sampled softmax or BCE), correction.

    Returns:
        scalar float32; 0 when there is no row, with a path to all vectors that gives them zero gradients.

    Raises:
        ValueError: full softmax is asked for, or there is no negative.
    """
    if config.loss is LossType.FULL_SOFTMAX:
        raise ValueError(
            "loss: expected sampled_softmax or bce over drawn negatives, got full_softmax, which needs the whole table"
        )
    if positive_ids.numel() == 0:
        return (users.sum() + positives.sum() + negatives.sum()).float() * 0.0
    if negative_ids.numel() == 0:
        raise ValueError("negative_ids: expected at least one negative, got none")
    common = torch.promote_types(torch.promote_types(users.dtype, positives.dtype), negatives.dtype)
    users, positives, negatives = (normalise(x.to(common), config.similarity) for x in (users, positives, negatives))
    positive_logits = ((users * positives).sum(-1, keepdim=True) / config.temperature).float()
    negative_logits = (users @ negatives.T / config.temperature).float()
    if (
        config.negatives is NegativeSource.IN_BATCH
        and config.logq_correction
        and config.loss is LossType.SAMPLED_SOFTMAX
    ):
        unique, inverse, counts = torch.unique(positive_ids, return_inverse=True, return_counts=True)
        log_q = torch.log(counts / positive_ids.numel())
        positive_logits = positive_logits - log_q[inverse][:, None]
        negative_logits = negative_logits - log_q[torch.searchsorted(unique, negative_ids)]
    collides = negative_ids[None, :] == positive_ids[:, None]
    negative_logits = negative_logits.masked_fill(collides, _SHUT_OUT)
    if config.loss is LossType.SAMPLED_SOFTMAX:
        logits = torch.cat([positive_logits, negative_logits], dim=1)
        return F.cross_entropy(logits, torch.zeros_like(positive_ids))
    kept = ~collides
    negative = (F.softplus(negative_logits) * kept).sum(1) / kept.sum(1).clamp(min=1)
    return (F.softplus(-positive_logits.squeeze(1)) + negative).mean()
