"""A layer of the operators one behind the other, and as one operation; shared by the legs of its tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hstu_kernels import (
    AttentionMask,
    JaggedLayout,
    RelativeBias,
    gated_linear,
    hstu_attention,
    norm_linear_silu,
)
from hstu_kernels.layer import LayerOptions, LayerWeights, hstu_layer

NAMES = ("x", "norm_weight", "norm_bias", "uvqk", "uvqk_bias", "gate_weight", "gate_bias", "output", "output_bias")
Leaves = dict[str, Tensor | None]


def make_options(**changes: Any) -> LayerOptions:
    """Two heads of unlike widths, dropout, everything stored."""
    plain = LayerOptions(
        heads=2,
        attention_dim=6,
        linear_dim=10,
        mask=AttentionMask(max_attn_len=7, global_prefix_len=2),
        alpha=0.4,
        scale=0.2,
        eps=1e-5,
        activated=2 * 2 * (6 + 10),
        dropout=0.3,
    )
    return replace(plain, **changes)


def production(**changes: Any) -> LayerOptions:
    """SiLU on U alone, the gate in three parts."""
    options = make_options(concat=True, **changes)
    return replace(options, activated=options.heads * options.linear_dim)


def make_leaves(
    options: LayerOptions,
    rows: int,
    *,
    width: int = 12,
    affine: bool,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    tables: tuple[int, int] | None = None,
) -> Leaves:
    """x and all parameters, drawn; ``tables``: entries of the position table and of the time table."""
    generator = torch.Generator().manual_seed(11)
    gated = options.heads * options.linear_dim
    columns = 2 * gated + 2 * options.heads * options.attention_dim
    shapes: dict[str, tuple[int, ...]] = {
        "x": (rows, width),
        "uvqk": (columns, width),
        "output": (width, gated * (3 if options.concat else 1)),
        "output_bias": (width,),
    }
    if affine:
        shapes |= {"norm_weight": (width,), "norm_bias": (width,), "gate_weight": (gated,), "gate_bias": (gated,)}
        shapes |= {"uvqk_bias": (columns,)}
    if tables is not None:
        shapes |= {"pos_table": (tables[0],), "time_table": (tables[1],)}
    # Rows and norms at unit scale, products near it.
    return {
        name: (torch.randn(shape, generator=generator, dtype=torch.float64) * _factor(name, shape))
        .to(device, dtype)
        .requires_grad_()
        for name, shape in shapes.items()
    }


def _factor(name: str, shape: tuple[int, ...]) -> float:
    return float(shape[-1]) ** -0.5 if name in ("uvqk", "output") else 1.0


def make_bias(leaves: Leaves, times: Tensor) -> RelativeBias | None:
    """Of the tables among ``leaves``, rows asking at their own time."""
    if leaves.get("pos_table") is None:
        return None
    return RelativeBias(leaves["pos_table"], leaves["time_table"], times, times)


def whole(
    leaves: Leaves, options: LayerOptions, layout: JaggedLayout, *, seed: Tensor, backend: str, times: Tensor
) -> Tensor:
    """One operation."""
    x, *weights = (leaves.get(name) for name in NAMES)
    assert x is not None
    bias = make_bias(leaves, times)
    return hstu_layer(x, LayerWeights(*weights), options, layout, bias=bias, seed=seed, backend=backend)  # type: ignore[arg-type]


def composed(
    leaves: Leaves, options: LayerOptions, layout: JaggedLayout, *, seed: Tensor, backend: str, times: Tensor
) -> Tensor:
    """Three operations and a sum."""
    x, norm_weight, norm_bias, uvqk, uvqk_bias, gate_weight, gate_bias, output, output_bias = (
        leaves.get(name) for name in NAMES
    )
    assert x is not None and uvqk is not None and output is not None
    heads, qk, uv = options.heads, options.attention_dim, options.linear_dim
    common: dict[str, Any] = {"eps": options.eps, "backend": backend}
    wide = norm_linear_silu(x, norm_weight, norm_bias, uvqk, uvqk_bias, activated=options.activated, **common)
    u, v, q, k = torch.split(wide, [heads * uv, heads * uv, heads * qk, heads * qk], 1)
    q, k, v = q.unflatten(1, (heads, qk)), k.unflatten(1, (heads, qk)), v.unflatten(1, (heads, uv))
    numbers: dict[str, Any] = {"alpha": options.alpha, "scale": options.scale, "bias": make_bias(leaves, times)}
    attended = hstu_attention(q, k, v, layout, options.mask, **numbers, backend=backend)
    of_gate: dict[str, Any] = {"dropout": options.dropout, "seed": seed, "concat": options.concat, **common}
    return x + gated_linear(attended.flatten(1), u, gate_weight, gate_bias, output, output_bias, **of_gate)


def results(out: Tensor, leaves: Leaves) -> dict[str, Tensor]:
    """The output, and the gradient of each leaf that wants one, under a drawn gradient."""
    back = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    return {"out": out.detach()} | dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), back), strict=True))
