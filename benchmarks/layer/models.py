"""What is trained: our encoder on its backends, and the same layers around softmax attention, compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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


class _SoftmaxLayer(HSTULayer):
    """The projections and the gate of `HSTULayer` around causal softmax attention of padded rows."""

    def attend(self, x: Tensor, count: int) -> Tensor:
        u, v, q, k = self._project(x)
        q, k, v = (y.view(count, -1, *y.shape[1:]).transpose(1, 2) for y in (q, k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self._gate(x, u, out.transpose(1, 2).reshape(x.shape[0], -1))


class Softmax(nn.Module):
    """Compiled layers around flash attention; rows are padded to the longest, outside of what is compiled."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        config = replace(case.config, position_bias=False, time_bias=False, backend=Backend.EAGER)
        self.layers = nn.ModuleList(_SoftmaxLayer(config) for _ in range(config.num_layers))
        self.count = len(case.lengths)
        self._stack: Callable[[Tensor], Tensor] = torch.compile(self._run, dynamic=False)

    def _run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.attend(x, self.count)  # type: ignore[operator]
        return x

    def forward(self, batch: Batch) -> Tensor:
        rows, layout = batch.x.shape[0], batch.layout
        if rows == self.count * layout.max_seq_len:
            return self._stack(batch.x)
        at = layout.sequence_ids(rows) * layout.max_seq_len + layout.row_indices(rows)
        padded = batch.x.new_zeros(self.count * layout.max_seq_len, batch.x.shape[1]).index_copy(0, at, batch.x)
        return self._stack(padded).index_select(0, at)


def compiled(case: Case, backend: str) -> nn.Module:
    """Our encoder through ``torch.compile``."""
    model = Ours(case, backend)
    model.encoder.compile(fullgraph=True, dynamic=False)
    return model


CONTENDERS: dict[str, Callable[[Case], nn.Module]] = {
    "triton": lambda case: Ours(case, "triton"),
    "triton-compiled": lambda case: compiled(case, "triton"),
    "eager": lambda case: Ours(case, "eager"),
    "eager-compiled": lambda case: compiled(case, "eager"),
    "sdpa-compiled": Softmax,
}
