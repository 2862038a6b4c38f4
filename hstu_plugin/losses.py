"""Objectives of next-item prediction over jagged rows, and the samplers of their negatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hstu_plugin.config import LossType, NegativeSource, RetrievalConfig, Similarity

_NORM_EPS = 1e-6
_SHUT_OUT = -5e4
# Logits held at once: what fits in a CPU's cache, and what keeps a GPU busy.
_CPU_CHUNK, _GPU_CHUNK = 1 << 19, 1 << 26


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
        scalar; 0 when there is no row, with a path to ``users`` and ``items`` that gives them zero gradients.

    Raises:
        ValueError: uniform negatives are asked for, and the table holds no second item to draw.
    """
    if positives.numel() == 0:
        # Both sides: data-parallel training waits for the gradients of every parameter.
        return users.sum() + items[:0].sum()
    common = torch.promote_types(users.dtype, items.dtype)
    users, items = users.to(common), items.to(common)
    users = normalise(users, config.similarity)
    if config.loss is LossType.FULL_SOFTMAX:
        table = normalise(items, config.similarity)
        scaled = users / config.temperature
        loss: Tensor = _FullSoftmax.apply(scaled, table[1:], positives - 1)  # type: ignore[no-untyped-call]
        return loss

    if config.negatives is NegativeSource.UNIFORM and items.shape[0] < 3:
        raise ValueError(
            "items: expected at least 2 items beside the padding to draw negatives from, got "
            f"{items.shape[0] - 1}; use loss=full_softmax or a larger table"
        )
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


class _FullSoftmax(torch.autograd.Function):
    """Mean cross-entropy of ``users @ table.T``, chunk of rows by chunk, with the gradients taken on the way.

    The logits of all positions against all items are by far the largest tensor of a training; they exist one chunk at a
    time and once, in float32, which is also faster than three passes over all of them.
    """

    @staticmethod
    def forward(ctx: Any, users: Tensor, table: Tensor, positives: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        chunk = max(1, (_CPU_CHUNK if users.device.type == "cpu" else _GPU_CHUNK) // table.shape[0])
        total = torch.zeros((), dtype=torch.promote_types(users.dtype, torch.float32), device=users.device)
        grad_users = torch.empty_like(users) if wanted else None
        grad_table = torch.zeros_like(table) if wanted else None
        for begin in range(0, positives.numel(), chunk):
            rows = slice(begin, begin + chunk)
            some, asked = users[rows], positives[rows]
            logits = (some @ table.T).to(total.dtype)
            highest = logits.amax(1, keepdim=True)
            chosen = logits.gather(1, asked[:, None])
            weights = logits.sub_(highest).exp_()
            sums = weights.sum(1, keepdim=True)
            total += (sums.log() + highest - chosen).sum()
            if grad_users is not None and grad_table is not None:
                slope = weights.div_(sums).scatter_add_(1, asked[:, None], -torch.ones_like(chosen)).to(users.dtype)
                torch.mm(slope, table, out=grad_users[rows])
                grad_table.addmm_(slope.T, some)
        ctx.save_for_backward(grad_users, grad_table)
        return total / positives.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_users, grad_table = ctx.saved_tensors
        factor = (grad / grad_users.shape[0]).to(grad_users.dtype)
        return grad_users * factor, grad_table * factor, None


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
