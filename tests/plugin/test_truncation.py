"""Attention truncation: what the later layers see, and that training, evaluation and cached scoring agree on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu_kernels import AttentionMask, JaggedLayout, next_event_timestamps
from hstu_kernels.testing import make_timestamps
from hstu_plugin.config import HSTUConfig, LossType, RetrievalConfig, Variant
from hstu_plugin.encoder import HSTUEncoder
from hstu_plugin.retrieval import HSTURetrieval
from hstu_plugin.sequence import JaggedSequence

# Histories below, at and above the kept length, one of context alone, and a user without any row.
LENGTHS, TARGETS, CONTEXT, KEPT = (16, 6, 0, 9, 3), (5, 0, 0, 3, 1), 2, 4
MASKS = {
    "causal": AttentionMask(),
    "window": AttentionMask(max_attn_len=3),
    "prefix": AttentionMask(max_attn_len=3, global_prefix_len=2),
    "tail": AttentionMask(max_attn_len=3, full_attn_tail_len=2),
    "window-targets": AttentionMask(max_attn_len=3, full_attn_tail_len=2, window_targets=True),
}
any_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
any_backend = pytest.mark.parametrize("backend", ["reference", "eager"])


def make_encoder(**options: Any) -> HSTUEncoder:
    torch.manual_seed(0)
    config = {"embedding_dim": 8, "num_heads": 2, "num_layers": 4, "max_seq_len": 16, "dropout": 0.3}
    config |= {"truncate_after_layers": 2, "truncate_to": KEPT}
    encoder = HSTUEncoder(HSTUConfig(**{**config, **options})).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.7)
    return encoder.eval()


def make_batch(seed: int = 0) -> JaggedSequence:
    layout = JaggedLayout.from_lengths(
        torch.tensor(LENGTHS), num_targets=torch.tensor(TARGETS), contextual_seq_len=CONTEXT
    )
    rows = sum(LENGTHS)
    values = torch.randn(rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return JaggedSequence(values, layout, make_timestamps(layout, rows, seed=seed))


def close(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-10, atol=1e-10)


def by_hand(encoder: HSTUEncoder, seq: JaggedSequence) -> JaggedSequence:
    """Two layers on everything, a cut written out user by user, two layers on what is left."""
    assert seq.timestamps is not None
    times = seq.timestamps
    asked = next_event_timestamps(times, seq.layout)
    x, (first, second, third, fourth) = seq.values, encoder.layers
    for layer in (first, second):
        x = layer(x, seq.layout, times, asked)
    kept: list[int] = []
    lengths = []
    begin = 0
    for length, targets in zip(LENGTHS, TARGETS, strict=True):
        end = begin + length - targets
        rows = [*range(begin, min(begin + CONTEXT, end)), *range(max(begin + CONTEXT, end - KEPT), begin + length)]
        lengths.append(len(rows))
        kept += rows
        begin += length
    rows_kept = torch.tensor(kept)
    layout = JaggedLayout.from_lengths(
        torch.tensor(lengths), num_targets=torch.tensor(TARGETS), contextual_seq_len=CONTEXT
    )
    x, times, asked = x[rows_kept], times[rows_kept], asked[rows_kept]
    for layer in (third, fourth):
        x = layer(x, layout, times, asked)
    return JaggedSequence(x, layout, times)


@any_backend
@any_mask
def test_forward_equals_two_encoders_with_a_cut_between(mask: AttentionMask, backend: str) -> None:
    encoder = make_encoder(mask=mask, backend=backend)
    seq = make_batch()
    got, expected = encoder(seq), by_hand(encoder, seq)
    assert close(got.values, expected.values)
    assert torch.equal(got.layout.seq_offsets, expected.layout.seq_offsets)
    assert got.timestamps is not None and expected.timestamps is not None
    assert torch.equal(got.timestamps, expected.timestamps)
    assert int(encoder.output_rows(seq).sum()) == got.values.shape[0] < seq.values.shape[0]


@any_backend
@any_mask
@pytest.mark.parametrize("variant", list(Variant), ids=str)
def test_prefill_and_decode_equal_forward(variant: Variant, mask: AttentionMask, backend: str) -> None:
    encoder = make_encoder(variant=variant, mask=mask, backend=backend)
    seq = make_batch()
    full = encoder(seq)
    history, cache = encoder.prefill(seq.history())
    assert close(history.values, full.history().values)
    assert close(encoder.decode(seq.targets(), cache).values, full.targets().values)
    # The later layers cache the kept rows only.
    whole = sum(LENGTHS) - sum(TARGETS)
    kept = sum(min(n - t, CONTEXT) + min(max(n - t - CONTEXT, 0), KEPT) for n, t in zip(LENGTHS, TARGETS, strict=True))
    assert [kv.k.shape[0] for kv in cache] == [whole, whole, kept, kept]


def test_an_event_beyond_the_cut_still_counts_through_the_first_layers() -> None:
    encoder = make_encoder()
    seq = make_batch()
    changed = seq.values.clone()
    changed[CONTEXT] = changed[CONTEXT].flip(0)
    got, expected = encoder(seq.with_values(changed)), encoder(seq)
    assert got.values.shape == expected.values.shape
    assert not close(got.targets().values[:5], expected.targets().values[:5])


def test_nothing_is_cut_from_short_histories() -> None:
    encoder, whole = make_encoder(truncate_to=11), make_encoder(truncate_after_layers=0, truncate_to=0)
    seq = make_batch()
    assert close(encoder(seq).values, whole(seq).values)


@any_backend
def test_raising_max_seq_len_changes_nothing_bitwise(backend: str) -> None:
    encoder = make_encoder(backend=backend).float()
    seq = make_batch()
    seq = seq.with_values(seq.values.float())
    raised = replace(seq, layout=replace(seq.layout, max_seq_len=4096))
    assert torch.equal(encoder(raised).values, encoder(seq).values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncate_after_layers": 4}, r"^truncate_after_layers: expected a number below num_layers \(4\)"),
        ({"truncate_after_layers": -1}, "^truncate_after_layers: expected an int >= 0"),
        ({"truncate_to": 0}, "^truncate_to: expected a number of history rows > 0"),
        ({"truncate_after_layers": 0}, "^truncate_to: expected .* or 0 for both, got 4"),
    ],
)
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_encoder(**options)


# Generative training.


def make_retrieval(**options: Any) -> HSTURetrieval:
    torch.manual_seed(0)
    config = HSTUConfig(
        **{"embedding_dim": 8, "num_layers": 2, "max_seq_len": 16, "dropout": 0.0, "truncate_after_layers": 1}
        | {"truncate_to": KEPT, **options}
    )
    return HSTURetrieval(config, RetrievalConfig(loss=LossType.FULL_SOFTMAX)).double()


def test_loss_is_the_mean_over_the_rows_that_are_left() -> None:
    model = make_retrieval()
    items = torch.randn(20, 8, dtype=torch.float64)
    ids = torch.randint(1, 20, (12,))
    layout = JaggedLayout.from_lengths(torch.tensor([9, 3]))
    times = 1_700_000_000 + torch.cumsum(torch.randint(1, 99_999, (12,)), 0)
    seq = JaggedSequence(items[ids], layout, times)
    positives = torch.randint(1, 20, (12,))
    changed = positives.clone()
    changed[:5] = (changed[:5] % 19) + 1  # the rows that are cut off
    assert torch.equal(model.loss(seq, positives, items), model.loss(seq, changed, items))
    for row in (5, 8, 9, 11):
        changed = positives.clone()
        changed[row] = changed[row] % 19 + 1
        assert not torch.equal(model.loss(seq, positives, items), model.loss(seq, changed, items))


def test_dropped_rows_get_gradients_through_the_first_layers() -> None:
    model = make_retrieval()
    items = torch.randn(20, 8, dtype=torch.float64)
    values = items[torch.arange(1, 10)].requires_grad_()
    seq = JaggedSequence(values, JaggedLayout.from_lengths(torch.tensor([9])), torch.arange(9) * 1000)
    model.loss(seq, torch.arange(2, 11), items).backward()
    assert values.grad is not None
    assert float(values.grad.abs().amax(1).min()) > 0


def test_user_vectors_are_those_of_the_latest_rows() -> None:
    model = make_retrieval().eval()
    seq = replace(make_batch(), layout=JaggedLayout.from_lengths(torch.tensor([16, 0, 18])))
    users = model(seq)
    alone = JaggedSequence(
        seq.values[16:],
        JaggedLayout.from_lengths(torch.tensor([18])),
        None if seq.timestamps is None else seq.timestamps[16:],
    )
    assert close(users[2:], model(alone))
    assert torch.equal(users[1], torch.zeros(8, dtype=torch.float64))
