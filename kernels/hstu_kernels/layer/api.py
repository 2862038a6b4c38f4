"""Validate, resolve, call."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hstu_kernels.attention.api import AttentionPlan
from hstu_kernels.attention.passes import attention_passes
from hstu_kernels.backend import Backend
from hstu_kernels.bias import RelativeBias
from hstu_kernels.dispatch import choose_backend, product_dtype
from hstu_kernels.dropout import new_seed
from hstu_kernels.gated_norm.api import check_norm
from hstu_kernels.layer.passes import Spec, run_layer
from hstu_kernels.layout import JaggedLayout
from hstu_kernels.mask import AttentionMask


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOptions:
    """What a layer computes and what it keeps for its backward.

    Attributes:
        heads, attention_dim, linear_dim: ``H``, ``Dqk``, ``Dv``.
        mask, alpha, scale: of the attention, as in `hstu_kernels.hstu_attention`.
        eps: of both norms.
        activated: leading columns of the projection that get SiLU.
        concat: the gate's production form with three parts.
        dropout: probability behind the gate; 0 for none.
        store_normed: keep the normed rows where the norm has parameters; otherwise they are made again.
        store_uvqk: keep the projection before and behind SiLU; otherwise the product and SiLU run again.
        store_gated: keep what goes into the output projection; otherwise the gate runs again.
    """

    heads: int
    attention_dim: int
    linear_dim: int
    mask: AttentionMask
    alpha: float
    scale: float
    eps: float
    activated: int
    concat: bool = False
    dropout: float = 0.0
    store_normed: bool = True
    store_uvqk: bool = True
    store_gated: bool = True


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Parameters of a layer; norms without parameters and projections without bias have ``None``.

    Attributes:
        norm_weight, norm_bias: ``[D]`` of the norm of the input.
        uvqk: ``[2 H (Dv + Dqk), D]``, for U, V, Q, K in this order. uvqk_bias: ``[2 H (Dv + Dqk)]``.
        gate_weight, gate_bias: ``[H Dv]`` of the norm behind the attention.
        output: ``[D, H Dv]``, with ``concat`` ``[D, 3 H Dv]``. output_bias: ``[D]``.
    """

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    uvqk: Tensor
    uvqk_bias: Tensor | None
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    output: Tensor
    output_bias: Tensor | None


def hstu_layer(
    x: Tensor,
    weights: LayerWeights,
    options: LayerOptions,
    layout: JaggedLayout,
    *,
    bias: RelativeBias | None = None,
    plan: AttentionPlan | None = None,
    seed: Tensor | None = None,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """``x + dropout(norm(A) * U) W_o + b_o`` with ``U, V, Q, K = silu(norm(x) W + b)``, ``A = attention(Q, K, V)``.

    (HSTU, equations 1 to 3.) The same function as `norm_linear_silu`, `hstu_attention` and `gated_linear` in turn, but
    one node of autograd: the gradients of U, V, Q and K are written into one matrix, gradients are added up where they
    are made, and what is stored is what the backward reads.

    Stored for the backward, by row: the normed row (``D``), the attention's output (``H Dv``), statistics; where the
    first norm has parameters the input as well; the projection twice (``4 H (Dv + Dqk)``) and the gated row (``H Dv``,
    with ``concat`` three of them), unless ``options`` say that they are made again.

    Args:
        x: ``[L, D]``.
        bias, plan, layout, backend: as in `hstu_kernels.hstu_attention`; the reference cannot serve.
        seed: ``[1]`` int64 that decides what dropout drops; drawn if ``None``.

    Returns:
        ``[L, D]`` in the wider of the dtypes of ``x`` and of the products, which run in that of the weights or in
        autocast's.

    Raises:
        TypeError, ValueError: inputs do not fit together; the message names the argument.
        UnsupportedBackend: an explicit backend cannot serve the call.
    """
    _check(x, weights, options)
    dtype = product_dtype(x, weights.uvqk.dtype)
    passes = attention_passes(
        layout,
        options.mask,
        alpha=options.alpha,
        scale=options.scale,
        bias=bias,
        plan=plan,
        backend=backend,
        like=x,
        dtype=dtype,
        widths=(options.attention_dim, options.linear_dim),
    )
    if options.dropout == 0:
        seed = None
    elif seed is None:
        seed = new_seed(x.device)
    w = weights
    spec = Spec(options, passes, choose_backend(backend, x.device, x.dtype), dtype)
    tables = (None, None) if bias is None else (bias.pos_table, bias.time_table)
    norms_and_products = (w.norm_weight, w.norm_bias, w.uvqk, w.uvqk_bias, w.gate_weight, w.gate_bias)
    return run_layer(spec, seed, x, *norms_and_products, w.output, w.output_bias, *tables)


def _check(x: Tensor, weights: LayerWeights, options: LayerOptions) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x: expected [L, D] of a floating-point dtype, got {tuple(x.shape)} {x.dtype}")
    check_norm(x, weights.norm_weight, weights.norm_bias)
    gated = options.heads * options.linear_dim
    columns = 2 * (gated + options.heads * options.attention_dim)
    expected = {"uvqk": (columns, x.shape[1]), "output": (x.shape[1], gated * (3 if options.concat else 1))}
    for name, shape in expected.items():
        weight: Tensor = getattr(weights, name)
        if weight.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {tuple(weight.shape)}")
        if weight.device != x.device:
            raise TypeError(f"{name}: expected a tensor on {x.device} as x, got one on {weight.device}")
    if not 0 <= options.activated <= columns:
        raise ValueError(f"activated: expected a number in [0, {columns}], got {options.activated}")
    if not 0 <= options.dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {options.dropout}")
