"""The gate behind the attention: ``dropout(norm(attended) * u)``, alone or with the output projection."""

from hstu_kernels.gated_norm.api import gated_linear, gated_norm

__all__ = ["gated_linear", "gated_norm"]
