"""The sides of the streaming experiment: a Transformer, HSTU, and HSTU with softmax attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.streaming_world import World
from hstu_kernels import JaggedLayout
from hstu_plugin.config import HSTUConfig
from hstu_plugin.embedding import SequenceEmbedding, init_item_table
from hstu_plugin.encoder import HSTUEncoder
from hstu_plugin.sequence import JaggedSequence

MODELS = ("transformer", "hstu-softmax", "hstu")


class Side(nn.Module):
    """One model: item vectors in, a row for every position out. No side has a relative bias, as in the paper."""

    def __init__(
        self, name: str, world: World, *, dim: int, layers: int, heads: int, dropout: float, norm_eps: float
    ) -> None:
        super().__init__()
        self.name = name
        self.items = nn.Embedding(world.items + 1, dim, padding_idx=0)
        init_item_table(self.items.weight)
        self.config = HSTUConfig(
            embedding_dim=dim,
            num_layers=layers,
            num_heads=heads,
            max_seq_len=world.length,
            time_bias=False,
            position_bias=False,
            dropout=dropout,
            norm_eps=norm_eps,
        )
        self.embedding = SequenceEmbedding(self.config)
        self.encoder: nn.Module
        if name == "transformer":
            block = nn.TransformerEncoderLayer(
                dim, heads, 4 * dim, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            self.encoder = nn.TransformerEncoder(block, layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        else:
            self.encoder = HSTUEncoder(self.config)

    def forward(self, vectors: Tensor) -> Tensor:
        """Item vectors ``[B, n, D]`` to rows ``[B, n, D]``; row ``i`` sees the items up to ``i``."""
        count, length, _ = vectors.shape
        lengths = torch.full((count,), length, device=vectors.device)
        layout = JaggedLayout.from_lengths(lengths, max_seq_len=length)
        x = self.embedding(JaggedSequence(vectors.flatten(0, 1), layout)).values
        if self.name == "transformer":
            hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            rows: Tensor = self.encoder(x.view(count, length, -1), mask=hidden, is_causal=True)
            return rows
        assert isinstance(self.encoder, HSTUEncoder)
        attend: Callable[[Tensor, Tensor, Tensor], Tensor] = SoftmaxAttention(self.config.alpha, length)
        if self.name == "hstu":
            attend = PointwiseAttention(self.config.alpha, self.config.attn_scale, length)
        for layer in self.encoder.first_layers:
            x = layer.through(x, attend)
        return x.view(count, length, -1)


@dataclass(frozen=True, slots=True)
class PointwiseAttention:
    """Causal ``scale * SiLU(alpha * q . k) v`` over records of one length: `hstu_attention` as plain products."""

    alpha: float
    scale: float
    length: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (-1, self.length)).transpose(1, 2) for x in (q, k, v))
        weights = F.silu((q * self.alpha) @ k.transpose(-1, -2)).tril()
        return (weights @ (v * self.scale)).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True, slots=True)
class SoftmaxAttention:
    """Causal ``softmax(alpha * q . k) v`` over records of one length."""

    alpha: float
    length: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (-1, self.length)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.alpha)
        return out.transpose(1, 2).flatten(0, 1)
