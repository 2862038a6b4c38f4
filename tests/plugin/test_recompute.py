"""Selective rematerialisation: the same gradients, bit for bit, from fewer stored bytes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hstu_kernels import JaggedLayout, next_event_timestamps
from hstu_plugin.config import HSTUConfig, Recompute, Variant
from hstu_plugin.encoder import HSTUEncoder
from hstu_plugin.layer import HSTULayer
from hstu_plugin.sequence import JaggedSequence

ALL = tuple(Recompute)
CHOICES = [c for n in range(1, 4) for c in itertools.combinations(ALL, n)]
any_choice = pytest.mark.parametrize("recompute", CHOICES, ids="+".join)
LENGTHS = (30, 0, 17, 1)


def make_layers(recompute: tuple[Recompute, ...], **options: Any) -> tuple[HSTULayer, HSTULayer]:
    """The same layer without and with rematerialisation."""
    config: dict[str, Any] = {"embedding_dim": 16, "num_heads": 2, "max_seq_len": 32, "dropout": 0.3, **options}
    plain, saving = HSTULayer(HSTUConfig(**config)), HSTULayer(HSTUConfig(**config, recompute=recompute))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.5)
    saving.load_state_dict(plain.state_dict())
    return plain.double(), saving.double()


def make_arguments() -> tuple[JaggedLayout, Tensor, Tensor]:
    layout = JaggedLayout.from_lengths(torch.tensor(LENGTHS))
    times = 1_700_000_000 + torch.cumsum(torch.arange(sum(LENGTHS)) ** 2, 0)
    return layout, times, next_event_timestamps(times, layout)


def gradients(layer: HSTULayer, x: Tensor, *, amp: bool = False) -> list[Tensor]:
    """Output, gradient of the input, gradients of all parameters, and the next random numbers; from one seed."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        out = layer(x, *make_arguments())
    before = torch.rand(4)
    out.square().sum().backward()
    assert x.grad is not None
    grads = [p.grad for p in layer.parameters() if p.grad is not None]
    return [out.detach(), x.grad, *grads, before, torch.rand(4)]


def rows(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(sum(LENGTHS), 16, dtype=dtype, generator=torch.Generator().manual_seed(1))


@any_choice
@pytest.mark.parametrize("variant", list(Variant), ids=str)
def test_gradients_are_the_same_bits(variant: Variant, recompute: tuple[Recompute, ...]) -> None:
    plain, saving = make_layers(recompute, variant=variant, position_bias=True, time_bias=True)
    expected, got = gradients(plain, rows()), gradients(saving, rows())
    assert len(got) == len(expected) == 4 + len(list(plain.parameters()))
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@any_choice
def test_gradients_under_autocast_are_the_same_bits(recompute: tuple[Recompute, ...], backend: str) -> None:
    plain, saving = make_layers(recompute, backend=backend)
    plain, saving = plain.float(), saving.float()
    x = rows(torch.float32)
    for one, other in zip(gradients(plain, x, amp=True), gradients(saving, x, amp=True), strict=True):
        assert torch.equal(one, other)


def test_dropout_drops_the_same_places_twice() -> None:
    """With another mask in the backward, the gradient of a dropped place would not be zero."""
    _, saving = make_layers(ALL, dropout=0.5)
    with torch.no_grad():
        saving.output.weight.copy_(torch.eye(16))
        saving.output.bias.zero_()
    x = rows().requires_grad_()
    torch.manual_seed(3)
    change = saving(x, *make_arguments()) - x
    # One column of W_o meets one place of y: a dropped place gives it nothing.
    column = change[7]
    column.sum().backward()
    assert saving.output.weight.grad is not None
    dropped = column == 0
    assert 0 < int(dropped.sum()) < 16
    assert torch.equal(saving.output.weight.grad[:, dropped].abs().sum(), torch.zeros((), dtype=torch.float64))
    assert bool((saving.output.weight.grad[:, ~dropped] != 0).all())


def test_a_second_backward_through_a_kept_graph() -> None:
    _, saving = make_layers(ALL)
    x = rows().requires_grad_()
    loss = saving(x, *make_arguments()).square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


@pytest.mark.parametrize("frozen", ["uvqk", "output", "everything"])
def test_frozen_weights(frozen: str) -> None:
    plain, saving = make_layers(ALL)
    for layer in (plain, saving):
        module: nn.Module = layer if frozen == "everything" else layer.get_submodule(frozen)
        module.requires_grad_(False)
    for one, other in zip(gradients(plain, rows()), gradients(saving, rows()), strict=True):
        assert torch.equal(one, other)


def test_an_input_changed_in_place_is_refused() -> None:
    _, saving = make_layers(ALL)
    leaf = rows().requires_grad_()
    x = leaf * 1
    loss = saving(x, *make_arguments()).sum()
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace"):
        loss.backward()


class _Stored:
    """Counts the bytes of the storages that autograd keeps, parameters left out, each storage once."""

    def __init__(self, module: nn.Module) -> None:
        self.known = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.storages: dict[int, int] = {}
        self.held: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known and tensor.is_floating_point():
            self.storages[storage.data_ptr()] = storage.nbytes()
            self.held.append(tensor)
        return tensor

    @property
    def nbytes(self) -> int:
        return sum(self.storages.values())


def stored_bytes(layer: HSTULayer, monkeypatch: pytest.MonkeyPatch, *, amp: bool = False) -> int:
    """Of one forward of ``layer``; what the layer's own hooks let through is counted, too."""
    counter = _Stored(layer)
    original = torch.autograd.graph.saved_tensors_hooks

    def counted(pack: Any, unpack: Any) -> Any:
        def both(tensor: Tensor) -> Any:
            packed = pack(tensor)
            return counter.pack(packed) if isinstance(packed, Tensor) else packed

        return original(both, unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", counted)
    x = rows(torch.float32 if amp else torch.float64).requires_grad_() * 1
    with original(counter.pack, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        out = layer(x, *make_arguments())
    assert out.requires_grad
    return counter.nbytes


WIDTH = sum(LENGTHS) * 16 * 8
# Rows of width D in float64 that one layer stores: without rematerialisation X, normed X, UVQK before (4) and behind
# SiLU (4), A, normed A, the dropout's noise and what goes into W_o; statistics are small.
PLAIN = 14
SAVED = {Recompute.INPUT_NORM: 1, Recompute.UVQK: 8, Recompute.GATED_OUTPUT: 3}


@any_choice
def test_stored_bytes_shrink_by_what_is_named(
    recompute: tuple[Recompute, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, saving = make_layers(recompute, position_bias=False, time_bias=False)
    before, after = stored_bytes(plain, monkeypatch), stored_bytes(saving, monkeypatch)
    assert PLAIN * WIDTH <= before <= (PLAIN + 0.5) * WIDTH
    assert (before - after) / WIDTH == pytest.approx(sum(SAVED[name] for name in recompute), abs=0.3)


def test_stored_bytes_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, saving = make_layers(ALL, position_bias=False, time_bias=False)
    before = stored_bytes(plain.float(), monkeypatch, amp=True)
    after = stored_bytes(saving.float(), monkeypatch, amp=True)
    assert after < 0.35 * before


def test_forward_of_the_encoder_lets_keys_and_values_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that nobody asked for would keep U, V, Q and K of all layers alive until the end of the forward."""
    kept: list[Any] = []
    original = HSTULayer.prefill
    monkeypatch.setattr(HSTULayer, "prefill", lambda *args: kept.append(args) or original(*args))
    encoder = HSTUEncoder(HSTUConfig(embedding_dim=16, max_seq_len=32, time_bias=False, recompute=ALL))
    layout, _, _ = make_arguments()
    encoder(JaggedSequence(rows(torch.float32), layout))
    assert not kept


def test_compiled_layers_are_one_graph() -> None:
    torch.compiler.reset()
    plain, saving = make_layers(ALL, dropout=0.0)
    expected, got = gradients(plain, rows()), gradients(saving, rows())
    compiled = torch.compile(saving, fullgraph=True, backend="aot_eager")
    x = rows().requires_grad_()
    compiled(x, *make_arguments()).square().sum().backward()
    assert torch.equal(got[1], expected[1])
    assert x.grad is not None
    assert torch.allclose(x.grad, expected[1], rtol=1e-10, atol=1e-6 * float(expected[1].abs().max()))
    torch.compiler.reset()


def test_config_takes_names_in_any_order_once() -> None:
    config = HSTUConfig(recompute=("uvqk", "input_norm", "uvqk"))  # type: ignore[arg-type]
    assert config.recompute == (Recompute.INPUT_NORM, Recompute.UVQK)
    with pytest.raises(ValueError, match=r"^recompute: expected one of input_norm, uvqk, gated_output, got 'all'"):
        HSTUConfig(recompute=("all",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^recompute: expected a list"):
        HSTUConfig(recompute="uvqk")  # type: ignore[arg-type]
