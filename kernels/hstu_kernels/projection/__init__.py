"""The way into a layer: norm, one product for U, V, Q and K, and SiLU."""

from hstu_kernels.projection.api import norm_linear_silu

__all__ = ["norm_linear_silu"]
