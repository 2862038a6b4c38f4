"""Forward and backward of a layer, step by step; what is no longer needed is let go where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu_kernels.attention.passes import AttentionPasses
from hstu_kernels.backend import Backend
from hstu_kernels.gradients import without_autocast
from hstu_kernels.layer import steps

if TYPE_CHECKING:
    from hstu_kernels.layer.api import LayerOptions


@dataclass(frozen=True, slots=True)
class Spec:
    """Everything about a call that is no tensor of autograd's; ``dtype`` is that of the products."""

    options: LayerOptions
    attention: AttentionPasses
    backend: Backend
    dtype: torch.dtype


def run_layer(spec: Spec, seed: Tensor | None, *tensors: Tensor | None) -> Tensor:
    """``tensors``: x, then the parameters in the order of `LayerWeights`, then the two tables."""
    out: Tensor = _Layer.apply(spec, seed, *tensors)  # type: ignore[no-untyped-call]
    return out


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: Spec, seed: Tensor | None, *tensors: Tensor | None) -> Tensor:
        x, norm_weight, norm_bias, uvqk, uvqk_bias, gate_weight, gate_bias, output, output_bias, *tables = tensors
        assert x is not None and uvqk is not None and output is not None
        options, dtype = spec.options, spec.dtype
        weights = (uvqk, uvqk_bias, output, output_bias)
        ctx.spec, ctx.dtypes = spec, [None if t is None else t.dtype for t in tensors]
        uvqk, uvqk_bias, output, output_bias = (None if w is None else w.to(dtype) for w in weights)
        assert uvqk is not None and output is not None
        with without_autocast(x.device.type):
            normed, mean, rstd = steps.norm(spec, x, norm_weight, norm_bias)
            mixed, activated = steps.project(spec, normed, uvqk, uvqk_bias, keep_mixed=options.store_uvqk)
            u, q, k, v = steps.parts(activated, options)
            attended = spec.attention.forward(q, k, v, *tables)
            gated, gate_mean, gate_rstd = steps.gate(spec, attended, u, gate_weight, gate_bias, seed)
            out = steps.output(spec, x, gated, output, output_bias)
        # A norm without parameters has a gradient in terms of its output, so that x itself may go.
        plain = norm_weight is None and norm_bias is None
        ctx.save_for_backward(
            None if plain else x,
            normed if plain or options.store_normed else None,
            None if plain else mean,
            rstd,
            mixed,
            activated if options.store_uvqk else None,
            attended,
            gated if options.store_gated else None,
            gate_mean,
            gate_rstd,
            seed,
            norm_weight,
            norm_bias,
            uvqk,
            uvqk_bias,
            gate_weight,
            gate_bias,
            output,
            *tables,
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, normed, mean, rstd, mixed, activated, attended, gated, gate_mean, gate_rstd, *rest = ctx.saved_tensors
        seed, norm_weight, norm_bias, uvqk, uvqk_bias, gate_weight, gate_bias, output, *tables = rest
        spec: Spec = ctx.spec
        options = spec.options
        need_x, need_norm, need_shift, need_uvqk, need_uvqk_bias, _, _, need_output, need_output_bias = (
            ctx.needs_input_grad[2:11]
        )
        with without_autocast(grad.device.type):
            if normed is None:
                normed = steps.norm(spec, x, norm_weight, norm_bias)[0]
            if activated is None:
                mixed, activated = steps.project(spec, normed, uvqk, uvqk_bias, keep_mixed=True)
            u, q, k, v = steps.parts(activated, options)
            if gated is None:
                gated = steps.gate(spec, attended, u, gate_weight, gate_bias, seed)[0]
            narrow, doutput_bias = steps.narrow(spec, grad, summed=need_output_bias)
            doutput = narrow.t() @ gated if need_output else None
            del gated
            dgated = narrow @ output
            del narrow
            # One matrix for all four gradients: each step writes its columns, and the product reads it as it stands.
            dmixed = torch.empty_like(activated)
            du, *into = steps.parts(dmixed, options)
            of_gate = (gate_weight, gate_bias, gate_mean, gate_rstd, seed)
            dattended, dgate_weight, dgate_bias = steps.gate_backward(spec, dgated, attended, u, *of_gate, du)
            del dgated, u, du
            dpos, dtime = spec.attention.backward(
                dattended, q, k, v, *tables, needed=ctx.needs_input_grad[11:13], into=into
            )
            del dattended, activated, q, k, v, into
            dmixed = steps.silu_backward(spec, dmixed, mixed)
            del mixed
            duvqk = dmixed.t() @ normed if need_uvqk else None
            duvqk_bias = steps.column_sums(dmixed) if need_uvqk_bias else None
            dx = dnorm_weight = dnorm_bias = None
            if need_x or need_norm or need_shift:
                dnormed = dmixed @ uvqk
                del dmixed
                rows = normed if x is None else x
                of_norm = (norm_weight, norm_bias, mean, rstd)
                dx, dnorm_weight, dnorm_bias = steps.norm_backward(
                    spec, dnormed, rows, *of_norm, residual=grad, dtype=ctx.dtypes[0]
                )
        found = (duvqk, duvqk_bias, dgate_weight, dgate_bias, doutput, doutput_bias, dpos, dtime)
        gradients = (dx, dnorm_weight, dnorm_bias, *found)
        typed = (None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return None, None, *typed
