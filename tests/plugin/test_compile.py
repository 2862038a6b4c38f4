"""The encoder as one compiled or exported graph, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hstu_kernels import AttentionMask, JaggedLayout
from hstu_plugin.config import HSTUConfig, Variant
from hstu_plugin.encoder import HSTUEncoder
from hstu_plugin.sequence import JaggedSequence


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Encode(torch.nn.Module):
    """Tensors in, rows out."""

    def __init__(self, variant: Variant, *, targets: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        mask = AttentionMask(max_attn_len=8, full_attn_tail_len=4)
        self.encoder = HSTUEncoder(
            HSTUConfig(embedding_dim=16, num_heads=2, max_seq_len=32, num_layers=2, variant=variant, mask=mask)
        )
        self.targets = targets

    def forward(self, x: Tensor, offsets: Tensor, counts: Tensor, at: Tensor) -> Tensor:
        layout = JaggedLayout(offsets, 32, counts if self.targets else None)
        return self.encoder(JaggedSequence(x, layout, at)).values


def batch(lengths: list[int]) -> tuple[Tensor, ...]:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    total = sum(lengths)
    counts = torch.tensor([min(2, n) for n in lengths])
    return torch.randn(total, 16), offsets, counts, torch.arange(total) * 977


@pytest.mark.parametrize(
    ("variant", "targets"), [(Variant.RESEARCH, True), (Variant.PRODUCTION, False)], ids=["research", "production"]
)
def test_training_compiles_into_one_graph(variant: Variant, targets: bool) -> None:
    module = Encode(variant, targets=targets).eval()
    graph = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    given = batch([9, 20, 3])
    results = []
    for call in (module, graph):
        module.zero_grad()
        out = call(*given)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_an_encoder_exports_and_serves_other_batches(strict: bool) -> None:
    module = Encode(Variant.RESEARCH, targets=True).eval()
    rows, size = torch.export.Dim("rows", min=3, max=1 << 31), torch.export.Dim("size", min=2)
    shapes = ({0: rows}, {0: size + 1}, {0: size}, {0: rows})
    with torch.no_grad():
        program = torch.export.export(module, batch([9, 20, 3]), strict=strict, dynamic_shapes=shapes).module()
        for lengths in ([9, 20, 3], [31, 4], [2, 3, 4, 5, 6]):
            given = batch(lengths)
            torch.testing.assert_close(program(*given), module(*given))
