"""Inputs of a case, in several copies so that together they do not fit into the L2 cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.attention.cases import Case
from hstu_kernels import JaggedLayout, RelativeBias
from hstu_kernels.testing import make_bias

MOST_COPIES = 12


@dataclass(frozen=True, slots=True)
class Copy:
    """One set of inputs: ``q, k [L, H, Dqk]``, ``v, grad_out [L, H, Dv]``; q, k and v ask for gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """A case on a device. Tables are of unit scale in float32 and ask for gradients."""

    case: Case
    layout: JaggedLayout
    bias: RelativeBias | None
    alpha: float
    scale: float
    copies: list[Copy]

    @property
    def device(self) -> torch.device:
        return self.layout.device

    @property
    def tables(self) -> dict[str, Tensor]:
        """The tables of the bias that there are, by name."""
        if self.bias is None:
            return {}
        named = {"pos_table": self.bias.pos_table, "time_table": self.bias.time_table}
        return {name: table for name, table in named.items() if table is not None}


def make_batch(case: Case, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> Batch:
    """Unit-scale random inputs, enough copies to fill the L2 cache twice, and at least two."""
    layout = case.layout(device)
    longest = max(case.lengths)
    bias = make_bias(case.bias, case.layout(torch.device("cpu")), case.total_rows, num_buckets=128, table_reach=longest)
    if bias is not None:
        pos, time = (None if t is None else _leaf(t.float(), device) for t in (bias.pos_table, bias.time_table))
        times = None if bias.timestamps is None else bias.timestamps.to(device)
        bias = replace(bias, pos_table=pos, time_table=time, timestamps=times)
    generator = torch.Generator(device).manual_seed(seed)

    def draw(width: int) -> Tensor:
        return torch.randn(case.total_rows, case.heads, width, device=device, generator=generator).to(dtype)

    bytes_each = dtype.itemsize * case.total_rows * case.heads * 2 * (case.qk_dim + case.v_dim)
    copies = []
    for _ in range(min(MOST_COPIES, max(2, 1 + 2 * _cache_bytes(device) // bytes_each))):
        q, k, v = (_leaf(draw(width), device) for width in (case.qk_dim, case.qk_dim, case.v_dim))
        copies.append(Copy(q, k, v, draw(case.v_dim)))
    return Batch(case, layout, bias, case.qk_dim**-0.5, 1.0 / longest, copies)


def _leaf(x: Tensor, device: torch.device) -> Tensor:
    return x.to(device).detach().requires_grad_()


def _cache_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0
