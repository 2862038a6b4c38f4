"""Jagged pointwise (SiLU) attention of HSTU."""

from hstu_kernels.attention.api import AttentionPlan, hstu_attention, hstu_target_attention, plan_attention

__all__ = ["AttentionPlan", "hstu_attention", "hstu_target_attention", "plan_attention"]
