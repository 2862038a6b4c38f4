"""Operators of HSTU and ULTRA-HSTU on jagged batches. Depends on torch alone; see ``kernels/README.md``."""

from hstu_kernels.attention import (
    AttentionPlan,
    hstu_attention,
    hstu_extend_attention,
    hstu_target_attention,
    plan_attention,
)
from hstu_kernels.backend import Backend, UnsupportedBackend, resolve_backend
from hstu_kernels.bias import RelativeBias, next_event_timestamps
from hstu_kernels.counts import visible_pairs
from hstu_kernels.gated_norm import gated_linear, gated_norm
from hstu_kernels.layer import LayerOptions, LayerWeights, hstu_layer
from hstu_kernels.layout import JaggedLayout, LayerKV
from hstu_kernels.mask import AttentionMask, KeyRange
from hstu_kernels.projection import norm_linear_silu

__all__ = [
    "AttentionMask",
    "AttentionPlan",
    "Backend",
    "JaggedLayout",
    "KeyRange",
    "LayerKV",
    "LayerOptions",
    "LayerWeights",
    "RelativeBias",
    "UnsupportedBackend",
    "gated_linear",
    "gated_norm",
    "hstu_attention",
    "hstu_extend_attention",
    "hstu_layer",
    "hstu_target_attention",
    "next_event_timestamps",
    "norm_linear_silu",
    "plan_attention",
    "resolve_backend",
    "visible_pairs",
]
