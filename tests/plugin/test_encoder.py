"""HSTUEncoder: cached scoring, invariants, and the time from which rows measure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu_kernels import AttentionMask, JaggedLayout
from hstu_kernels.testing import make_timestamps
from hstu_plugin.config import HSTUConfig, Variant
from hstu_plugin.encoder import HSTUEncoder
from hstu_plugin.sequence import JaggedSequence

LENGTHS, TARGETS, CONTEXT = (16, 5, 0, 9), (5, 0, 0, 4), 2
MASKS = {
    "causal": AttentionMask(),
    "window": AttentionMask(max_attn_len=3),
    "semi-local": AttentionMask(max_attn_len=3, global_prefix_len=1, full_attn_tail_len=2),
    "window-targets": AttentionMask(max_attn_len=3, full_attn_tail_len=2, window_targets=True),
}
any_backend = pytest.mark.parametrize("backend", ["reference", "eager"])
any_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


def make_encoder(**options: Any) -> HSTUEncoder:
    torch.manual_seed(0)
    encoder = HSTUEncoder(
        HSTUConfig(
            **{"embedding_dim": 8, "num_heads": 2, "num_layers": 3, "max_seq_len": 16, "dropout": 0.3, **options}
        )
    ).double()
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


def select(seq: JaggedSequence, rows: Tensor, layout: JaggedLayout) -> JaggedSequence:
    assert seq.timestamps is not None
    return JaggedSequence(seq.values[rows], layout, seq.timestamps[rows])


def history_rows(seq: JaggedSequence) -> Tensor:
    ends = torch.repeat_interleave(seq.layout.history_lengths, seq.layout.seq_lengths)
    return seq.layout.row_indices(seq.values.shape[0]) < ends


def close(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-11, atol=1e-11)


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
    # One candidate of each user at a time, from the same cache.
    targets = seq.targets()
    for place in range(max(TARGETS)):
        counts = torch.tensor([int(place < n) for n in TARGETS])
        rows = targets.layout.row_indices(targets.values.shape[0]) == place
        part = select(targets, rows, JaggedLayout.from_lengths(counts))
        assert close(encoder.decode(part, cache).values, full.targets().values[rows])


@any_backend
def test_prefill_and_decode_equal_forward_with_request_timestamps(backend: str) -> None:
    encoder = make_encoder(backend=backend)
    seq = make_batch()
    assert seq.timestamps is not None
    requests = torch.full((4,), int(seq.timestamps.max()) + 77_000)
    full = encoder(seq, requests)
    history, cache = encoder.prefill(seq.history(), requests)
    assert close(history.values, full.history().values)
    assert close(encoder.decode(seq.targets(), cache).values, full.targets().values)


@any_backend
@any_mask
def test_raising_max_seq_len_changes_nothing_bitwise(mask: AttentionMask, backend: str) -> None:
    encoder = make_encoder(mask=mask, backend=backend).float()
    seq = make_batch()
    seq = seq.with_values(seq.values.float())
    expected = encoder(seq).values
    for bound in (17, 4096):
        assert torch.equal(encoder(replace(seq, layout=replace(seq.layout, max_seq_len=bound))).values, expected)


@any_backend
@any_mask
def test_a_sequence_alone_equals_itself_in_a_batch(mask: AttentionMask, backend: str) -> None:
    encoder = make_encoder(mask=mask, backend=backend)
    seq = make_batch()
    together = encoder(seq).values
    ids = seq.layout.sequence_ids(sum(LENGTHS))
    for user in range(4):
        layout = JaggedLayout.from_lengths(
            torch.tensor(LENGTHS[user : user + 1]),
            num_targets=torch.tensor(TARGETS[user : user + 1]),
            contextual_seq_len=CONTEXT,
        )
        assert close(encoder(select(seq, ids == user, layout)).values, together[ids == user])


@any_backend
@any_mask
def test_permuting_candidates_permutes_outputs(mask: AttentionMask, backend: str) -> None:
    encoder = make_encoder(mask=mask, backend=backend)
    seq = make_batch()
    order = torch.arange(sum(LENGTHS))
    order[11:16] = torch.tensor([14, 11, 15, 13, 12])
    order[26:30] = torch.tensor([29, 27, 26, 28])
    assert close(encoder(select(seq, order, seq.layout)).values, encoder(seq).values[order])


@any_backend
@any_mask
def test_history_never_depends_on_targets(mask: AttentionMask, backend: str) -> None:
    encoder = make_encoder(mask=mask, backend=backend)
    seq = make_batch()
    history = history_rows(seq)
    assert seq.timestamps is not None
    changed = JaggedSequence(
        torch.where(history[:, None], seq.values, make_batch(5).values),
        seq.layout,
        torch.where(history, seq.timestamps, seq.timestamps + 10**7),
    )
    expected = encoder(seq).values
    assert torch.equal(encoder(changed).values[history], expected[history])
    assert not close(encoder(changed).values, expected)
    assert close(encoder(seq.history()).values, expected[history])


@any_backend
def test_zero_targets_equal_no_targets(backend: str) -> None:
    encoder = make_encoder(backend=backend)
    seq = make_batch().history()
    zeros = replace(seq, layout=replace(seq.layout, num_targets=torch.zeros(4, dtype=torch.int64)))
    assert close(encoder(zeros).values, encoder(seq).values)


@any_backend
def test_causal_rows_do_not_see_the_future(backend: str) -> None:
    """Changing event 6 leaves rows before 5 alone; row 5 predicts event 6 and may know its time, not its item."""
    encoder = make_encoder(backend=backend)
    layout = JaggedLayout.from_lengths(torch.tensor([9]))
    seq = JaggedSequence(make_batch().values[:9], layout, 1_700_000_000 + 1000 * torch.arange(9))
    values = seq.values.clone()
    values[6] = values[6].flip(0)
    changed = (encoder(seq.with_values(values)).values - encoder(seq).values).detach()
    assert float(changed[:6].abs().max()) == 0
    assert bool((changed[6:].abs().amax(1) > 1e-6).all())


@any_backend
def test_empty_batches(backend: str) -> None:
    encoder = make_encoder(backend=backend)
    nothing = torch.zeros(0, 8, dtype=torch.float64)
    no_times = torch.zeros(0, dtype=torch.int64)
    for lengths in ([], [0, 0]):
        layout = JaggedLayout.from_lengths(torch.tensor(lengths, dtype=torch.int64))
        seq = JaggedSequence(nothing, layout, no_times)
        requests = torch.zeros(len(lengths), dtype=torch.int64)
        assert encoder(seq, requests).values.shape == (0, 8)
        out, cache = encoder.prefill(seq)
        assert out.values.shape == (0, 8)
        assert encoder.decode(seq, cache).values.shape == (0, 8)


# The time from which a row measures.


def one_user() -> JaggedSequence:
    layout = JaggedLayout.from_lengths(torch.tensor([4]))
    return JaggedSequence(make_batch().values[:4], layout, torch.tensor([1000, 2000, 50_000, 50_060]))


@any_backend
def test_request_time_of_the_last_row(backend: str) -> None:
    encoder = make_encoder(backend=backend)
    seq = one_user()
    without = encoder(seq).values
    own = encoder(seq, torch.tensor([50_060])).values
    later = encoder(seq, torch.tensor([90_000])).values
    assert close(own, without)
    assert close(later[:3], without[:3])
    assert not close(later[3:], without[3:])


@any_backend
def test_request_time_equals_the_time_of_the_next_event(backend: str) -> None:
    """What a row learned to ask in training it asks in use: the last row of a prefix with the request time given."""
    encoder = make_encoder(backend=backend)
    seq = one_user()
    prefix = select(seq, torch.arange(3), JaggedLayout.from_lengths(torch.tensor([3])))
    assert close(encoder(prefix, torch.tensor([50_060])).values, encoder(seq).values[:3])


@any_backend
def test_event_time_knows_nothing_of_the_request(backend: str) -> None:
    encoder = make_encoder(backend=backend, row_time="event")
    seq = one_user()
    assert seq.timestamps is not None
    expected = encoder(seq).values
    assert close(encoder(seq, torch.tensor([90_000])).values, expected)
    # Nothing of the next event's time either.
    moved = replace(seq, timestamps=seq.timestamps + torch.tensor([0, 0, 0, 5000]))
    assert close(encoder(moved).values[:3], expected[:3])
    asks_next = make_encoder(backend=backend)
    assert not close(asks_next(moved).values[:3], asks_next(seq).values[:3])
    assert not close(asks_next(seq).values, expected)


@any_backend
def test_only_differences_of_time_count(backend: str) -> None:
    encoder = make_encoder(backend=backend)
    seq = make_batch()
    assert seq.timestamps is not None
    later = replace(seq, timestamps=seq.timestamps + 10**8)
    assert torch.equal(encoder(later).values, encoder(seq).values)


def test_request_times_skip_users_without_history() -> None:
    encoder = make_encoder()
    layout = JaggedLayout.from_lengths(torch.tensor([2, 0, 2]))
    seq = JaggedSequence(make_batch().values[:4], layout, torch.tensor([1000, 2000, 3000, 4000]))
    changed = encoder(seq, torch.tensor([9000, 123_456, 9000])).values
    assert close(changed, encoder(seq, torch.tensor([9000, 0, 9000])).values)


# Refusals.


@pytest.mark.parametrize("call", ["forward", "prefill"])
def test_missing_timestamps_are_refused(call: str) -> None:
    encoder = make_encoder()
    with pytest.raises(ValueError, match=r"^timestamps: .*time_bias=False"):
        getattr(encoder, call)(replace(one_user(), timestamps=None))


def test_decode_without_request_timestamps_is_refused() -> None:
    encoder = make_encoder()
    seq = one_user()
    _, cache = encoder.prefill(seq)
    with pytest.raises(ValueError, match=r"^timestamps: .*time_bias=False"):
        encoder.decode(replace(seq, timestamps=None), cache)


def test_timestamps_are_not_needed_without_time_bias() -> None:
    encoder = make_encoder(time_bias=False)
    seq = make_batch()
    blind = replace(seq, timestamps=None)
    assert torch.equal(encoder(blind).values, encoder(seq).values)
    _, cache = encoder.prefill(blind.history())
    assert close(encoder.decode(blind.targets(), cache).values, encoder(seq).targets().values)


@pytest.mark.parametrize(
    "requests",
    [torch.tensor([5]), torch.tensor([[1], [2], [3], [4]]), torch.tensor([1.0, 2.0, 3.0, 4.0])],
    ids=["other-batch", "2d", "float"],
)
def test_request_timestamps_are_checked(requests: Tensor) -> None:
    with pytest.raises((ValueError, TypeError), match=r"^request_timestamps: expected"):
        make_encoder()(make_batch(), requests)


def test_prefill_refuses_targets() -> None:
    with pytest.raises(ValueError, match=r"^seq: expected histories without targets"):
        make_encoder().prefill(make_batch())


def test_decode_refuses_the_cache_of_another_depth() -> None:
    encoder = make_encoder()
    _, cache = encoder.prefill(one_user())
    with pytest.raises(ValueError, match=r"^cache: expected one entry for each of 3 layers"):
        encoder.decode(one_user(), cache[:2])


def test_decode_refuses_the_cache_of_other_users() -> None:
    encoder = make_encoder()
    _, cache = encoder.prefill(make_batch().history())
    with pytest.raises(ValueError, match=r"^cache: expected 1 sequences"):
        encoder.decode(one_user(), cache)


def test_encoder_holds_no_state_of_a_request() -> None:
    encoder = make_encoder()
    before = set(encoder.__dict__), {name: set(module.__dict__) for name, module in encoder.named_modules()}
    first = encoder(make_batch()).values
    encoder(make_batch(3))
    _, cache = encoder.prefill(make_batch(4).history())
    encoder.decode(make_batch(4).targets(), cache)
    assert (set(encoder.__dict__), {name: set(m.__dict__) for name, m in encoder.named_modules()}) == before
    assert torch.equal(encoder(make_batch()).values, first)
