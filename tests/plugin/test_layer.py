"""HSTULayer: the three variants against straight-line code, dropout, widths and tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hstu_kernels import JaggedLayout, next_event_timestamps
from hstu_plugin.config import HSTUConfig, Variant
from hstu_plugin.layer import HSTULayer

LENGTHS = (5, 1, 0, 7)
ROWS = sum(LENGTHS)


def layout() -> JaggedLayout:
    return JaggedLayout.from_lengths(torch.tensor(LENGTHS))


def make_layer(variant: str, **options: Any) -> HSTULayer:
    torch.manual_seed(0)
    config = HSTUConfig(
        **{
            "embedding_dim": 6,
            "num_heads": 2,
            "attention_dim": 3,
            "linear_dim": 4,
            "max_seq_len": 8,
            "variant": variant,
            "dropout": 0.0,
            "position_bias": True,
            "time_bias": True,
            **options,
        }
    )
    layer = HSTULayer(config).double()
    # Weights of unit scale, norms and biases included: a forgotten one must show.
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def make_rows() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(ROWS, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    times = 1_700_000_000 + torch.cumsum(torch.tensor([0, 3, 500, 0, 86400, 7, 1, 60, 3600, 0, 10, 999]), 0)[:ROWS]
    times = torch.cat([times, times[-1:] + 5])[:ROWS]
    return x, times, next_event_timestamps(times, layout())


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def layer_norm(x: Tensor, norm: nn.LayerNorm, affine: bool) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
    return y * norm.weight + norm.bias if affine else y


def straight_line(layer: HSTULayer, x: Tensor, times: Tensor, asked_at: Tensor, variant: str) -> Tensor:
    """One layer as the papers write it, row by row, for two heads of widths 3 and 4."""
    affine = variant == "production"
    alpha = {"research": 1.0, "production": 3**-0.5, "ultra": 1 / 3}[variant]
    mixed = layer_norm(x, layer.input_norm, affine) @ layer.uvqk.weight.T
    if affine:
        mixed = mixed + layer.uvqk.bias
    u, v, q, k = mixed[:, :8], mixed[:, 8:16], mixed[:, 16:22], mixed[:, 22:28]
    if variant == "production":
        u = silu(u)
    else:
        u, v, q, k = silu(u), silu(v), silu(q), silu(k)
    attended = torch.zeros(ROWS, 8, dtype=torch.float64)
    begin = 0
    assert layer.pos_table is not None
    assert layer.time_table is not None
    for length in LENGTHS:
        for i in range(begin, begin + length):
            for j in range(begin, i + 1):
                seconds = max(1, abs(int(asked_at[i] - times[j])))
                bucket = int(torch.floor(torch.log(torch.tensor(float(seconds), dtype=torch.float64)) / 0.301))
                rab = layer.pos_table[j - i + 7] + layer.time_table[bucket]
                for h in range(2):
                    logit = alpha * (q[i, 3 * h : 3 * h + 3] @ k[j, 3 * h : 3 * h + 3]) + rab
                    attended[i, 4 * h : 4 * h + 4] += silu(logit) / 8 * v[j, 4 * h : 4 * h + 4]
        begin += length
    gated = layer_norm(attended, layer.output_norm, affine) * u
    if variant == "production":
        gated = torch.cat([u, attended, gated], dim=1)
    return x + gated @ layer.output.weight.T + layer.output.bias


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("variant", list(Variant), ids=str)
def test_variants_equal_straight_line_code(variant: str, backend: str) -> None:
    layer = make_layer(variant, backend=backend)
    x, times, asked_at = make_rows()
    with torch.no_grad():
        got = layer(x, layout(), times, asked_at)
        expected = straight_line(layer, x, times, asked_at, variant)
    assert float((expected - x).abs().max()) > 1
    assert torch.allclose(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("variant", list(Variant), ids=str)
def test_parameters_of_the_variants(variant: Variant) -> None:
    layer = HSTULayer(HSTUConfig(variant=variant, embedding_dim=6, num_heads=2, max_seq_len=8, num_time_buckets=12))
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    expected = {"uvqk.weight": (24, 6), "output.weight": (6, 6), "output.bias": (6,)}
    if variant is not Variant.ULTRA:
        expected |= {"pos_table": (15,), "time_table": (13,)}
    if variant is Variant.PRODUCTION:
        expected |= {"uvqk.bias": (24,), "output.weight": (6, 18)}
        expected |= {f"{norm}_norm.{part}": (6,) for norm in ("input", "output") for part in ("weight", "bias")}
    assert shapes == expected


@pytest.mark.parametrize("variant", list(Variant), ids=str)
def test_dropout_only_in_training(variant: str) -> None:
    layer = make_layer(variant, dropout=0.5)
    without = make_layer(variant)
    x, times, asked_at = make_rows()
    layer.eval()
    assert torch.equal(layer(x, layout(), times, asked_at), without(x, layout(), times, asked_at))
    layer.train()
    torch.manual_seed(0)
    first = layer(x, layout(), times, asked_at)
    second = layer(x, layout(), times, asked_at)
    assert not torch.allclose(first, second)


def test_dropout_stands_before_the_output_projection() -> None:
    """With nearly everything dropped, the residual and the output bias remain."""
    layer = make_layer("research", dropout=0.999999).train()
    torch.manual_seed(0)
    x, times, asked_at = make_rows()
    assert torch.allclose(layer(x, layout(), times, asked_at), x + layer.output.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", list(Variant), ids=str)
def test_every_parameter_gets_a_gradient(variant: str) -> None:
    layer = make_layer(variant)
    x, times, asked_at = make_rows()
    layer(x, layout(), times, asked_at).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 1e-6, name


@pytest.mark.parametrize(
    ("position", "time"), [(False, False), (True, False), (False, True)], ids=["none", "position", "time"]
)
def test_tables_exist_as_configured(position: bool, time: bool) -> None:
    layer = make_layer("research", position_bias=position, time_bias=time)
    assert (layer.pos_table is not None) is position
    assert (layer.time_table is not None) is time
    x, times, asked_at = make_rows()
    here, later = layer(x, layout(), times, asked_at), layer(x, layout(), times, asked_at + 10**6)
    assert torch.equal(here, later) is not time


def test_prefill_hands_out_the_keys_and_values_that_decode_needs() -> None:
    layer = make_layer("production")
    x, times, asked_at = make_rows()
    out, kv = layer.prefill(x, layout(), times, asked_at)
    assert torch.equal(out, layer(x, layout(), times, asked_at))
    assert kv.k.shape == (ROWS, 2, 3)
    assert kv.v.shape == (ROWS, 2, 4)
    assert kv.timestamps is times


@pytest.mark.parametrize("variant", list(Variant), ids=str)
def test_no_gradient_is_padded_with_zeros_to_the_width_of_the_projection(variant: str) -> None:
    # A slice's backward does that: for U, V, Q and K seven times the memory traffic of one concatenation.
    layer = make_layer(variant)
    mixed = torch.randn(3, layer.uvqk.out_features, dtype=torch.float64, requires_grad=True)
    u, v, q, k = layer._split(layer._activate(mixed))
    todo, names = [part.grad_fn for part in (u, v, q, k)], set()
    while todo:
        node = todo.pop()
        if node is not None:
            names.add(node.name())
            todo += [following for following, _ in node.next_functions]
    assert "SplitWithSizesBackward0" in names and "SliceBackward0" not in names
    assert [part.flatten(1).shape[1] for part in (u, v, q, k)] == [8, 8, 6, 6]


def test_initial_weights_follow_the_published_code() -> None:
    torch.manual_seed(0)
    layer = HSTULayer(HSTUConfig(embedding_dim=128, max_seq_len=5000, num_time_buckets=5000))
    assert layer.pos_table is not None
    assert layer.time_table is not None
    for weight in (layer.uvqk.weight, layer.pos_table, layer.time_table):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert abs(float(weight.detach().mean())) < 0.001
    # Xavier: uniform with bound sqrt(6 / (128 + 128)).
    assert float(layer.output.weight.detach().abs().max()) == pytest.approx((6 / 256) ** 0.5, rel=0.01)
    assert float(layer.output.bias.detach().abs().max()) == 0
