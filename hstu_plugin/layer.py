"""The HSTU layer: project, attend, gate (HSTU, equations 1 to 3; variants of section 2 of the public codebases)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hstu_kernels import (
    AttentionPlan,
    Backend,
    JaggedLayout,
    LayerKV,
    RelativeBias,
    gated_linear,
    hstu_attention,
    hstu_extend_attention,
    hstu_target_attention,
    norm_linear_silu,
)
from hstu_kernels.attention.static import static_target_attention
from hstu_kernels.dispatch import choose_backend, product_dtype
from hstu_kernels.dropout import dropout
from hstu_kernels.layer import LayerOptions, LayerWeights, hstu_layer
from hstu_plugin.config import HSTUConfig, Recompute, Variant
from hstu_plugin.recompute import Autocast, Rebuilder, rerun, unchanged

_INIT_STD = 0.02


class HSTULayer(nn.Module):
    """One layer on flat rows ``[L, D]``.

    ``X~ = Norm(X); U, V, Q, K = split(phi(X~ W + b)); A = attention(Q, K, V); Y = (Norm(A) * U) W_o + b_o; X + Y``.
    """

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        self.config = config
        heads, qk, uv, width = config.num_heads, config.attention_dim, config.linear_dim, config.embedding_dim
        affine = config.variant is Variant.PRODUCTION
        self.input_norm = nn.LayerNorm(width, eps=config.norm_eps, elementwise_affine=affine)
        self.output_norm = nn.LayerNorm(heads * uv, eps=config.norm_eps, elementwise_affine=affine)
        self.uvqk = nn.Linear(width, heads * (2 * uv + 2 * qk), bias=affine)
        gated = 3 if config.variant is Variant.PRODUCTION else 1
        self.output = nn.Linear(gated * heads * uv, width)
        self.pos_table = nn.Parameter(torch.empty(2 * config.max_seq_len - 1)) if config.position_bias else None
        self.time_table = nn.Parameter(torch.empty(config.num_time_buckets + 1)) if config.time_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as the published research code does."""
        nn.init.normal_(self.uvqk.weight, std=_INIT_STD)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        if self.uvqk.bias is not None:
            nn.init.zeros_(self.uvqk.bias)
        for table in (self.pos_table, self.time_table):
            if table is not None:
                nn.init.normal_(table, std=_INIT_STD)

    def bias(self, timestamps: Tensor | None, row_timestamps: Tensor | None) -> RelativeBias | None:
        """The relative bias of this layer for keys at ``timestamps`` and rows that ask at ``row_timestamps``."""
        if self.pos_table is None and self.time_table is None:
            return None
        if self.time_table is None:
            return RelativeBias(self.pos_table)
        return RelativeBias(self.pos_table, self.time_table, timestamps, row_timestamps)

    def forward(
        self,
        x: Tensor,
        layout: JaggedLayout,
        timestamps: Tensor | None,
        row_timestamps: Tensor | None,
        plan: AttentionPlan | None = None,
    ) -> Tensor:
        """``[L, D] -> [L, D]`` over ``[contextual | history | targets]``; times are ``[L]`` int64 seconds."""
        bias = self.bias(timestamps, row_timestamps)
        # A compiler decides by itself what to store, and cannot trace what follows.
        recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if recorded and self._fused(x):
            return self._whole(x, layout, bias, plan)
        if not recorded or not self.config.recompute:
            u, v, q, k = self._project(x)
            return self._gate(x, u, self._attend(q, k, v, layout, bias, plan))
        rebuilder = Rebuilder()
        with rebuilder.watching():
            u, v, q, k = self._project_and_drop(x, rebuilder)
            attended = self._attend(q, k, v, layout, bias, plan)
            if Recompute.GATED_OUTPUT not in self.config.recompute:
                return self._gate(x, u, attended)
            norm, output = self.output_norm, self.output
            weights = (norm.weight, norm.bias, output.weight, output.bias)
            random = self.training and self.config.dropout > 0
            return x + rerun(self._gated_output, u, attended, *weights, random=random)

    def prefill(
        self,
        x: Tensor,
        layout: JaggedLayout,
        timestamps: Tensor | None,
        row_timestamps: Tensor | None,
        plan: AttentionPlan | None = None,
    ) -> tuple[Tensor, LayerKV]:
        """As `forward`, and the keys and values of all rows for later `decode` calls; stores what autograd stores."""
        u, v, q, k = self._project(x)
        attended = self._attend(q, k, v, layout, self.bias(timestamps, row_timestamps), plan)
        return self._gate(x, u, attended), LayerKV(k, v, layout, timestamps)

    def decode(self, x: Tensor, layout: JaggedLayout, request_timestamps: Tensor | None, cache: LayerKV) -> Tensor:
        """Targets ``[T, D] -> [T, D]`` against cached histories; equals the target rows of `forward`."""
        u, v, q, k = self._project(x)
        attended = hstu_target_attention(
            q,
            k,
            v,
            cache,
            layout,
            self.config.mask,
            alpha=self.config.alpha,
            scale=self.config.attn_scale,
            bias=self.bias(cache.timestamps, request_timestamps),
            backend=self.config.backend,
        )
        return self._gate(x, u, attended)

    def decode_static(
        self, x: Tensor, layout: JaggedLayout, request_timestamps: Tensor | None, cache: LayerKV
    ) -> Tensor:
        """As `decode`, over buffers that may be longer than what is in them; nothing is checked, no device is asked."""
        config = self.config
        u, v, q, k = self._project(x)
        attended = static_target_attention(
            q,
            k,
            v,
            cache,
            layout,
            config.mask,
            alpha=config.alpha,
            scale=config.attn_scale,
            bias=self.bias(cache.timestamps, request_timestamps),
            backend=self.backend_for(x),
        )
        return self._gate(x, u, attended)

    def extend(
        self,
        x: Tensor,
        layout: JaggedLayout,
        timestamps: Tensor | None,
        row_timestamps: Tensor | None,
        cache: LayerKV,
    ) -> tuple[Tensor, LayerKV]:
        """Rows ``[R, D]`` that continue the cached histories; equals the last rows of `prefill` over both.

        ``config.backend`` has no say here: there is one implementation, in plain PyTorch.

        Returns:
            their outputs, and the keys and values of these rows alone.
        """
        u, v, q, k = self._project(x)
        attended = hstu_extend_attention(
            q,
            k,
            v,
            cache,
            layout,
            self.config.mask,
            alpha=self.config.alpha,
            scale=self.config.attn_scale,
            bias=self.bias(timestamps, row_timestamps),
        )
        return self._gate(x, u, attended), LayerKV(k, v, layout, timestamps)

    def through(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """``[R, D] -> [R, D]`` with the caller's attention: ``attend(q, k, v)`` gives ``[R, H, Dv]``."""
        u, v, q, k = self._project(x)
        return self._gate(x, u, attend(q, k, v))

    def _whole(self, x: Tensor, layout: JaggedLayout, bias: RelativeBias | None, plan: AttentionPlan | None) -> Tensor:
        """`forward` as one operation of autograd."""
        config, recompute = self.config, self.config.recompute
        # Kernels rebuild the projection in a small part of the time that a step takes; it is most of what is stored.
        recompute = (Recompute.UVQK,) if recompute is None else recompute
        production = config.variant is Variant.PRODUCTION
        options = LayerOptions(
            heads=config.num_heads,
            attention_dim=config.attention_dim,
            linear_dim=config.linear_dim,
            mask=config.mask,
            alpha=config.alpha,
            scale=config.attn_scale,
            eps=config.norm_eps,
            activated=config.num_heads * config.linear_dim if production else self.uvqk.out_features,
            concat=production,
            dropout=config.dropout if self.training else 0.0,
            store_normed=Recompute.INPUT_NORM not in recompute,
            store_uvqk=Recompute.UVQK not in recompute,
            store_gated=Recompute.GATED_OUTPUT not in recompute,
        )
        before, behind, uvqk, output = self.input_norm, self.output_norm, self.uvqk, self.output
        norms = (behind.weight, behind.bias)
        weights = LayerWeights(before.weight, before.bias, uvqk.weight, uvqk.bias, *norms, output.weight, output.bias)
        return hstu_layer(x, weights, options, layout, bias=bias, plan=plan, backend=Backend.TRITON)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: JaggedLayout,
        bias: RelativeBias | None,
        plan: AttentionPlan | None,
    ) -> Tensor:
        config = self.config
        return hstu_attention(
            q,
            k,
            v,
            layout,
            config.mask,
            alpha=config.alpha,
            scale=config.attn_scale,
            bias=bias,
            backend=config.backend,
            plan=plan,
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``u [L, H * Dv]``, ``v [L, H, Dv]``, ``q, k [L, H, Dqk]``."""
        if self._fused(x):
            return self._split(self._fused_projection(x))
        return self._split(self._activate(self.uvqk(self.input_norm(x))))

    def backend_for(self, x: Tensor) -> Backend:
        """What serves this layer for rows like ``x``; with kernels norms, SiLU and gate are kernels, too."""
        config, weight = self.config, self.uvqk.weight
        widths = config.attention_dim, config.linear_dim
        return choose_backend(config.backend, x.device, product_dtype(x, weight.dtype), widths)

    def _fused(self, x: Tensor) -> bool:
        return self.backend_for(x) is Backend.TRITON

    def _fused_projection(self, x: Tensor) -> Tensor:
        config = self.config
        production = config.variant is Variant.PRODUCTION
        return norm_linear_silu(
            x,
            self.input_norm.weight,
            self.input_norm.bias,
            self.uvqk.weight,
            self.uvqk.bias,
            eps=config.norm_eps,
            activated=config.num_heads * config.linear_dim if production else self.uvqk.out_features,
            backend=Backend.TRITON,
        )

    def _project_and_drop(self, x: Tensor, rebuilder: Rebuilder) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `_project`, with recipes for what the config does not want stored."""
        autocast, chosen = Autocast.current(x.device.type), self.config.recompute or ()
        source = unchanged(x)
        normed = autocast.cast(self.input_norm(x))

        def normed_again() -> Tensor:
            with autocast.again():
                return autocast.cast(self.input_norm(source()))

        drop = Recompute.INPUT_NORM in chosen
        get_normed = rebuilder.drop(normed, normed_again) if drop else unchanged(normed)
        mixed: Tensor = self.uvqk(normed)
        rebuilder.close(normed)
        if Recompute.UVQK not in chosen:
            return self._split(self._activate(mixed))

        def mixed_again() -> Tensor:
            with autocast.again():
                again: Tensor = self.uvqk(get_normed())
                return again

        get_mixed = rebuilder.drop(mixed, mixed_again)
        activated = self._activate(mixed)
        rebuilder.close(mixed)
        rebuilder.drop(activated, lambda: self._activate(get_mixed()))
        return self._split(activated)

    def _activate(self, mixed: Tensor) -> Tensor:
        if self.config.variant is Variant.PRODUCTION:
            gated = self.config.num_heads * self.config.linear_dim
            gate, rest = torch.split(mixed, [gated, mixed.shape[-1] - gated], dim=-1)
            return torch.cat([F.silu(gate), rest], dim=-1)
        return F.silu(mixed)

    def _split(self, activated: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        heads, qk, uv = self.config.num_heads, self.config.attention_dim, self.config.linear_dim
        # Not `tensor_split`: its backward fills a whole matrix of zeros for each part and adds them up.
        u, v, q, k = torch.split(activated, [heads * uv, heads * uv, heads * qk, heads * qk], dim=-1)
        return u, v.reshape(-1, heads, uv), q.reshape(-1, heads, qk), k.reshape(-1, heads, qk)

    def _gate(self, x: Tensor, u: Tensor, attended: Tensor) -> Tensor:
        norm, output = self.output_norm, self.output
        return x + self._gated_output(u, attended, norm.weight, norm.bias, output.weight, output.bias)

    def _gated_output(
        self,
        u: Tensor,
        attended: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        output_weight: Tensor,
        output_bias: Tensor,
    ) -> Tensor:
        """``dropout(Norm(A) * U) W_o + b_o``; the weights are arguments so that it can run again in a backward."""
        attended = attended.reshape(u.shape)
        if self._fused(attended):
            return gated_linear(
                attended,
                u,
                norm_weight,
                norm_bias,
                output_weight,
                output_bias,
                eps=self.config.norm_eps,
                dropout=self.config.dropout if self.training else 0.0,
                concat=self.config.variant is Variant.PRODUCTION,
                backend=Backend.TRITON,
            )
        norm = self.output_norm
        y = F.layer_norm(attended, norm.normalized_shape, norm_weight, norm_bias, norm.eps) * u
        if self.config.variant is Variant.PRODUCTION:
            y = torch.cat([u, attended, y], dim=-1)
        return F.linear(dropout(y, self.config.dropout, self.training), output_weight, output_bias)
