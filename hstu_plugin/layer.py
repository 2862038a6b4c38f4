"""The HSTU layer: project, attend, gate (HSTU, equations 1 to 3; variants of section 2 of the public codebases)."""

from __future__ import annotations

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
    hstu_target_attention,
    norm_linear_silu,
)
from hstu_kernels.gated_norm.api import resolved_backend
from hstu_plugin.config import HSTUConfig, Variant

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
        return self.prefill(x, layout, timestamps, row_timestamps, plan)[0]

    def prefill(
        self,
        x: Tensor,
        layout: JaggedLayout,
        timestamps: Tensor | None,
        row_timestamps: Tensor | None,
        plan: AttentionPlan | None = None,
    ) -> tuple[Tensor, LayerKV]:
        """As `forward`, and the keys and values of all rows for later `decode` calls."""
        u, v, q, k = self._project(x)
        attended = hstu_attention(
            q,
            k,
            v,
            layout,
            self.config.mask,
            alpha=self.config.alpha,
            scale=self.config.attn_scale,
            bias=self.bias(timestamps, row_timestamps),
            backend=self.config.backend,
            plan=plan,
        )
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

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``u [L, H * Dv]``, ``v [L, H, Dv]``, ``q, k [L, H, Dqk]``."""
        config = self.config
        heads, qk, uv = config.num_heads, config.attention_dim, config.linear_dim
        if self._fused(x):
            activated = heads * uv if config.variant is Variant.PRODUCTION else self.uvqk.out_features
            norm = (self.input_norm.weight, self.input_norm.bias)
            mixed = norm_linear_silu(
                x,
                *norm,
                self.uvqk.weight,
                self.uvqk.bias,
                eps=config.norm_eps,
                activated=activated,
                backend=config.backend,
            )
        else:
            mixed = self._activate(self.uvqk(self.input_norm(x)))
        ends = [heads * uv, 2 * heads * uv, heads * (2 * uv + qk)]
        u, v, q, k = mixed.tensor_split(ends, dim=-1)
        return u, v.reshape(-1, heads, uv), q.reshape(-1, heads, qk), k.reshape(-1, heads, qk)

    def _fused(self, x: Tensor) -> bool:
        """Whether norms, SiLU and gate run in kernels of their own; otherwise they are PyTorch's."""
        return resolved_backend(x, self.config.backend) is Backend.TRITON

    def _activate(self, mixed: Tensor) -> Tensor:
        if self.config.variant is not Variant.PRODUCTION:
            return F.silu(mixed)
        gate, rest = mixed.tensor_split([self.config.num_heads * self.config.linear_dim], dim=-1)
        return torch.cat([F.silu(gate), rest], dim=-1)

    def _gate(self, x: Tensor, u: Tensor, attended: Tensor) -> Tensor:
        attended = attended.reshape(u.shape)
        if self._fused(attended):
            return x + gated_linear(
                attended,
                u,
                self.output_norm.weight,
                self.output_norm.bias,
                self.output.weight,
                self.output.bias,
                eps=self.config.norm_eps,
                dropout=self.config.dropout if self.training else 0.0,
                concat=self.config.variant is Variant.PRODUCTION,
                backend=self.config.backend,
            )
        y = self.output_norm(attended) * u
        if self.config.variant is Variant.PRODUCTION:
            y = torch.cat([u, attended, y], dim=-1)
        out: Tensor = x + self.output(F.dropout(y, self.config.dropout, self.training))
        return out
