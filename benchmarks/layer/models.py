"""What is trained: our encoder on its backends, and the same layers around softmax attention, compiled.

Softmax attention multiplies as much as ours for each visible pair, so its layers are of equal work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention.cases import BACKWARD_FACTOR, jagged_lengths, visible_pairs
from hstu_kernels import Backend, JaggedLayout
from hstu_plugin.config import HSTUConfig, Variant
from hstu_plugin.encoder import HSTUEncoder
from hstu_plugin.layer import HSTULayer
from hstu_plugin.sequence import JaggedSequence


@dataclass(frozen=True, kw_only=True)
class Case:
    """A stack of layers and the lengths of a batch."""

    name: str
    config: HSTUConfig
    lengths: tuple[int, ...]


def cases(*, layers: int, variant: str, tiny: bool) -> list[Case]:
    """Width 512, heads 4 x 128; 16 sequences of 2048 rows, all alike or on average."""
    count, mean, longest, width, heads = (2, 12, 24, 32, 2) if tiny else (16, 2048, 4096, 512, 4)
    config = HSTUConfig(
        embedding_dim=width,
        num_heads=heads,
        num_layers=layers,
        max_seq_len=longest,
        variant=Variant(variant),
        dropout=0.1,
    )
    jagged = jagged_lengths(count, longest, mean / longest)
    return [
        Case(name="full", config=config, lengths=(mean,) * count),
        Case(name="jagged", config=config, lengths=jagged),
    ]


def training_flops(case: Case) -> float:
    """Of the products of a step: three times those of the linear layers' forward, 3.5 times attention's."""
    config, rows = case.config, sum(case.lengths)
    uv, qk = config.num_heads * config.linear_dim, config.num_heads * config.attention_dim
    gated = 3 if config.variant == "production" else 1
    linear = 2 * rows * config.embedding_dim * (2 * uv + 2 * qk + gated * uv)
    pairs = visible_pairs(JaggedLayout.from_lengths(torch.tensor(case.lengths)), config.mask)
    return config.num_layers * (3 * linear + (1 + BACKWARD_FACTOR) * 2 * pairs * (qk + uv))


@dataclass(frozen=True, slots=True)
class Batch:
    """``x``, ``grad [L, D]`` and ``timestamps [L]`` on the device."""

    x: Tensor
    grad: Tensor
    layout: JaggedLayout
    timestamps: Tensor


def make_batch(case: Case, device: torch.device, *, seed: int = 0) -> Batch:
    """Unit-scale rows; events a few minutes apart."""
    generator = torch.Generator(device).manual_seed(seed)
    rows, width = sum(case.lengths), case.config.embedding_dim
    x, grad = (torch.randn(rows, width, device=device, generator=generator) for _ in range(2))
    layout = JaggedLayout.from_lengths(torch.tensor(case.lengths, device=device), max_seq_len=max(case.lengths))
    return Batch(x, grad, layout, torch.arange(rows, device=device) * 300)


class Ours(nn.Module):
    """`HSTUEncoder` on one backend."""

    def __init__(self, case: Case, backend: str) -> None:
        super().__init__()
        self.encoder = HSTUEncoder(replace(case.config, backend=Backend(backend)))

    def forward(self, batch: Batch) -> Tensor:
        out: JaggedSequence = self.encoder(JaggedSequence(batch.x, batch.layout, batch.timestamps))
        return out.values


class Attention(Enum):
    """How `Softmax` attends."""

    PADDED = "flash attention of rows padded to the longest sequence"
    JAGGED = "flash attention of the flat rows, by sequence offsets"
    EXACT = "any kernel that computes in float32, of padded rows"


class Softmax(nn.Module):
    """The projections and gates of our layers around causal softmax attention; padding itself is not compiled."""

    def __init__(self, case: Case, attention: Attention, *, compiled: bool) -> None:
        super().__init__()
        config = replace(case.config, position_bias=False, time_bias=False, backend=Backend.EAGER)
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.num_layers))
        self.count, self.longest, self.attention = len(case.lengths), max(case.lengths), attention
        self._stack: Callable[[Tensor, Tensor], Tensor] = self._run
        if compiled:
            self._stack = torch.compile(self._run, fullgraph=True, dynamic=False)

    def _run(self, x: Tensor, offsets: Tensor) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.attention is Attention.JAGGED:
                return _flash_of_rows(q, k, v, offsets, self.longest)
            q, k, v = (y.view(self.count, self.longest, *y.shape[1:]).transpose(1, 2) for y in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)

        exact = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(exact if self.attention is Attention.EXACT else [SDPBackend.FLASH_ATTENTION]):
            for layer in self.layers:
                assert isinstance(layer, HSTULayer)
                x = layer.through(x, attend)
        return x

    def forward(self, batch: Batch) -> Tensor:
        rows, layout = batch.x.shape[0], batch.layout
        offsets = layout.seq_offsets.int()
        if self.attention is Attention.JAGGED or rows == self.count * self.longest:
            return self._stack(batch.x, offsets)
        at = layout.sequence_ids(rows) * self.longest + layout.row_indices(rows)
        padded = batch.x.new_zeros(self.count * self.longest, batch.x.shape[1]).index_copy(0, at, batch.x)
        return self._stack(padded, offsets).index_select(0, at)


def _flash_of_rows(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Causal softmax attention of flat rows ``[L, H, D]``; ``offsets [B + 1]`` int32."""
    if q.is_cuda:
        # What scaled_dot_product_attention calls for nested tensors, without their preparation.
        flash = torch.ops.aten._flash_attention_forward
        out: Tensor = flash(q, k, v, offsets, offsets, longest, longest, 0.0, True, False)[0]
        return out
    # The operator is CUDA's alone; elsewhere one call for each sequence.
    parts = []
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        own = (y[begin:end].transpose(0, 1)[None] for y in (q, k, v))
        parts.append(F.scaled_dot_product_attention(*own, is_causal=True)[0].transpose(0, 1))
    return torch.cat(parts)


def compiled(case: Case, backend: str) -> nn.Module:
    """Our encoder through ``torch.compile``."""
    model = Ours(case, backend)
    model.encoder.compile(fullgraph=True, dynamic=False)
    return model


CONTENDERS: dict[str, Callable[[Case], nn.Module]] = {
    "triton": lambda case: Ours(case, "triton"),
    "triton-stored": lambda case: Ours(replace(case, config=replace(case.config, recompute=())), "triton"),
    "triton-compiled": lambda case: compiled(case, "triton"),
    "eager": lambda case: Ours(case, "eager"),
    "eager-compiled": lambda case: compiled(case, "eager"),
    "sdpa-compiled": lambda case: Softmax(case, Attention.PADDED, compiled=True),
    "sdpa-varlen-compiled": lambda case: Softmax(case, Attention.JAGGED, compiled=True),
}


def exact(name: str, case: Case) -> nn.Module:
    """What gradients of the contender ``name`` are compared with, run in float32."""
    return Softmax(case, Attention.EXACT, compiled=False) if is_softmax(name) else Ours(case, "eager")


def plain(name: str, case: Case) -> nn.Module:
    """The same function in plain PyTorch; its error under autocast is the measure of what is allowed."""
    return Softmax(case, Attention.PADDED, compiled=False) if is_softmax(name) else Ours(case, "eager")


def is_softmax(name: str) -> bool:
    """Whether the contender computes softmax attention, another function than ours."""
    return name.startswith("sdpa")
