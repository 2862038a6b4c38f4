"""The meaning of the gated norm, and its gradient, in plain PyTorch; any float dtype, statistics in float32 at least.

    n = (a - mean(a)) / sqrt(var(a) + eps);  h = n * weight + bias;  out = dropout(h * u)   or
    out = dropout(concat[u, a, h * u])

(HSTU, equation 3, in the two public forms.) Without a gate: ``out = h``, a layer norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hstu_kernels.dropout import kept

Gradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def gate_forward(
    a: Tensor,
    u: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    *,
    eps: float,
    dropout: float,
    concat: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """``out [L, W]`` or ``[L, 3 W]`` in ``dtype``, and ``mean``, ``rstd [L]`` in float32 at least."""
    wide = _wide(a)
    mean = wide.mean(1)
    centered = wide - mean[:, None]
    rstd = torch.rsqrt(centered.square().mean(1) + eps)
    h = _affine(centered * rstd[:, None], weight, bias)
    if u is None:
        return h.to(dtype), mean, rstd
    parts = [u.to(h.dtype), wide, h * u] if concat else [h * u]
    return torch.cat(_dropped(parts, seed, dropout), 1).to(dtype), mean, rstd


def gate_backward(
    grad: Tensor,
    a: Tensor,
    u: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    *,
    dropout: float,
    concat: bool,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    du: Tensor | None = None,
) -> Gradients:
    """Gradients of ``a``, ``u``, ``weight`` and ``bias``, each in its dtype.

    Args:
        mean: ``None`` where the rows of ``a`` are normed already, without ``weight`` and ``bias``.
        residual: ``[L, W]``, added to the gradient of ``a``. dtype: of that gradient.
        du: where the gradient of ``u`` goes: ``[L, W]``, which may be columns of a wider matrix.
    """
    wide = _wide(a)
    normed = wide if mean is None else (wide - mean[:, None]) * rstd[:, None]
    h = _affine(normed, weight, bias)
    direct: Tensor | float = 0.0
    of_u = None
    dh = grad.to(wide.dtype)
    if u is not None:
        parts = _dropped(torch.split(dh, a.shape[1], 1), seed, dropout)
        of_gated = parts[-1]
        of_u = of_gated * h
        if concat:
            of_u, direct = of_u + parts[0], parts[1]
        dh = of_gated * u
    dn = dh if weight is None else dh * weight
    slope = (dn * normed).mean(1, keepdim=True)
    da = rstd[:, None] * (dn - dn.mean(1, keepdim=True) - normed * slope) + direct
    dweight = None if weight is None else (dh * normed).sum(0).to(weight.dtype)
    dbias = None if bias is None else dh.sum(0).to(bias.dtype)
    if residual is not None:
        da = da + residual
    if of_u is not None and u is not None:
        du = of_u.to(u.dtype) if du is None else du.copy_(of_u)
    return da.to(dtype or a.dtype), du, dweight, dbias


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _affine(normed: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    h = normed if weight is None else normed * weight
    return h if bias is None else h + bias


def _dropped(parts: Sequence[Tensor], seed: Tensor | None, p: float) -> list[Tensor]:
    if p == 0 or seed is None:
        return list(parts)
    return [x * kept(seed, x.shape[0], x.shape[1], p, i) / (1 - p) for i, x in enumerate(parts)]
