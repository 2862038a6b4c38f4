"""A whole layer as one operation of autograd: what it stores and which passes over memory it makes are its own."""

from hstu_kernels.layer.api import LayerOptions, LayerWeights, hstu_layer

__all__ = ["LayerOptions", "LayerWeights", "hstu_layer"]
