"""Jagged pointwise (SiLU) attention of HSTU."""

from hstu_kernels.attention.api import AttentionPlan, hstu_attention, hstu_target_attention, plan_attention
from hstu_kernels.attention.extend import hstu_extend_attention

__all__ = ["AttentionPlan", "hstu_attention", "hstu_extend_attention", "hstu_target_attention", "plan_attention"]
