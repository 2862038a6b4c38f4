"""Cached scoring by the kernel that is for Hopper alone, on such a GPU: fp64 budget, bits, neighbours, races."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from hstu_kernels import AttentionMask, JaggedLayout, LayerKV, hstu_target_attention
from hstu_kernels.testing import AttentionCase, BiasKind, make_inputs, poisoned_empty, split_targets
from tests.ops import hopper_cases

pytestmark = hopper_cases.MARKS

ALPHA, SCALE = 128**-0.5, 0.01
# Histories and targets: none, single ones, whole blocks, tiles and stretches, one more and one less.
HISTORIES = (0, 1, 63, 64, 127, 128, 129, 2047, 2048, 2049, 4096, 4200, 6200, 0, 300)
TARGETS = (5, 1, 64, 65, 0, 128, 129, 3, 200, 127, 1, 40, 300, 0, 256)


class Batch:
    """Targets and cached histories of random numbers."""

    def __init__(
        self,
        histories: tuple[int, ...],
        targets: tuple[int, ...],
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        heads: int = 2,
    ) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)

        def rows(count: int) -> Tensor:
            return torch.randn(count, heads, 128, device="cuda", generator=generator).to(dtype)

        self.x = [rows(sum(targets)) for _ in range(3)]
        kept = JaggedLayout.from_lengths(torch.tensor(histories, device="cuda"))
        self.cache = LayerKV(rows(sum(histories)), rows(sum(histories)), kept)
        self.layout = JaggedLayout.from_lengths(torch.tensor(targets, device="cuda"))

    def whole(self) -> Tensor:
        return self._ours(None)

    def in_stretches(self) -> Tensor:
        from hstu_kernels.attention.triton.target_launch import SPLIT_ROWS, _add_stretches

        stretches = max(1, -(-self.cache.layout.max_seq_len // SPLIT_ROWS))
        sums = torch.full((stretches, *self.x[2].shape), float("nan"), device="cuda")
        self._ours(sums)
        out = torch.full_like(self.x[2], float("nan"))
        offsets = (self.layout.seq_offsets, self.cache.layout.seq_offsets)
        _add_stretches(sums, out, offsets, self.layout.batch_size, SCALE, SPLIT_ROWS)
        return out

    def theirs(self) -> Tensor:
        """By the kernel that runs everywhere."""
        from hstu_kernels.attention.triton.target_launch import triton_target_attention
        from hstu_kernels.attention.triton.tiles import Tile

        return triton_target_attention(
            *self.x,
            self.cache,
            self.layout,
            AttentionMask(),
            alpha=ALPHA,
            scale=SCALE,
            bias=None,
            tile=Tile(64, 64, 4, 3),
        )

    def _ours(self, sums: Tensor | None) -> Tensor:
        from hstu_kernels.attention.triton.hopper_target_launch import hopper_target_attention
        from hstu_kernels.attention.triton.target_launch import SPLIT_ROWS

        out = torch.full_like(self.x[2], float("nan"))
        assert hopper_target_attention(
            (*self.x, self.cache.k, self.cache.v),
            self.cache.layout,
            self.layout,
            alpha=ALPHA,
            scale=SCALE,
            out=out,
            sums=sums,
            split_rows=SPLIT_ROWS,
        )
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("repeated", [1, 40], ids=["stretches", "whole"])
def test_stays_in_the_budget_and_is_what_a_call_runs(
    dtype: torch.dtype, repeated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hstu_kernels.attention.triton import target_launch as door

    launches = []
    launch = door.hopper_target_attention

    def counted(*args: object, **kwargs: object) -> bool:
        launches.append(kwargs["sums"] is None)
        return launch(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(door, "hopper_target_attention", counted)
    lengths = tuple(h + t for h, t in zip(HISTORIES, TARGETS, strict=True))
    case = AttentionCase(
        name="hopper",
        lengths=lengths + (150,) * repeated,
        num_targets=TARGETS + (130,) * repeated,
        bias=BiasKind.NONE,
        heads=4,
        qk_dim=128,
        v_dim=128,
    )
    exact = make_inputs(case, torch.float64, device="cuda")
    (high,), (low,) = split_targets(exact), split_targets(exact.to(dtype))

    def attend(part=low, backend="triton"):  # type: ignore[no-untyped-def]
        options = {"alpha": exact.alpha, "scale": exact.scale, "backend": backend}
        return hstu_target_attention(part.q, part.k, part.v, part.cache, part.layout, exact.mask, **options)

    expected = attend(high, "reference")
    budget = float((attend(backend="eager").double() - expected).abs().max())
    with poisoned_empty():
        got = attend()
    assert float((got.double() - expected).abs().max()) <= 2 * budget + 1e-12
    assert launches == [repeated == 40]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("draw", [128, 64])
def test_all_ways_give_the_bits_of_the_other_kernel(dtype: torch.dtype, draw: int) -> None:
    """Were there one different bit, no way could be chosen by the batch."""
    rng = random.Random(draw)
    for seed in range(6):
        histories = tuple(rng.choice((0, 1 + rng.randrange(90), 64 * rng.randrange(1, 40), 5000)) for _ in range(9))
        targets = tuple(rng.choice((0, 1 + rng.randrange(70), 128, 200)) for _ in range(9))
        batch = Batch(histories, targets, seed, dtype)
        expected = batch.theirs()
        assert torch.equal(batch.whole(), expected), (histories, targets)
        assert torch.equal(batch.in_stretches(), expected), (histories, targets)


def test_calls_that_differ_in_their_dtype_alone_do_not_share_a_launch() -> None:
    """Sums of stretches are float32 in both, so nothing but the inputs tells them apart."""
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        batch = Batch((5000, 300), (200, 90), 7, dtype)
        assert torch.equal(batch.in_stretches(), batch.theirs())


def test_a_call_repeats_its_bits_whatever_ran_before() -> None:
    """Twenty rounds with other inputs between them: a slot that is read too early holds the others' rows."""
    batch, other = Batch(HISTORIES, TARGETS), Batch((4096, 2300) * 9, (512, 260) * 9, 1)
    first, second = batch.whole(), other.whole()
    assert torch.equal(first, batch.theirs()) and torch.equal(second, other.theirs())
    for _ in range(20):
        assert torch.equal(batch.whole(), first)
        assert torch.equal(other.whole(), second)
        assert torch.equal(batch.in_stretches(), first)


def test_no_number_of_a_neighbour_is_seen() -> None:
    """Every other user full of what is no number, and every third target as well."""
    histories, targets = (70, 2100, 128, 129, 64, 4300, 1, 257), (70, 130, 3, 128, 64, 200, 1, 90)
    batch = Batch(histories, targets, 3)
    clean = (batch.whole(), batch.in_stretches())
    for x in (batch.cache.k, batch.cache.v):
        for part in x.split(histories)[1::2]:
            part.fill_(float("nan"))
    for x, bad in zip(batch.x, (float("nan"), float("inf"), float("nan")), strict=True):
        for i, part in enumerate(x.split(targets)):
            part[:: 1 if i % 2 else 3].fill_(bad)
    for got, expected in zip((batch.whole(), batch.in_stretches()), clean, strict=True):
        pairs = zip(got.split(targets), expected.split(targets), strict=True)
        for ours, theirs in list(pairs)[::2]:
            kept = torch.arange(len(ours), device="cuda") % 3 > 0
            assert torch.equal(ours[kept], theirs[kept])


def test_what_lies_behind_the_layouts_is_not_touched() -> None:
    """Buffers of fixed shapes, as graphs need them, and columns of wider matrices."""
    batch = Batch((300, 0, 150), (130, 5, 60), 4)
    expected = batch.whole()
    room = torch.full((195 + 400, 6, 128), 3.0, dtype=torch.bfloat16, device="cuda")
    wide = list(room.unflatten(1, (3, 2)).unbind(1))
    kept = torch.full((450 + 200, 4, 128), float("nan"), dtype=torch.bfloat16, device="cuda")
    kept_k, kept_v = kept.unflatten(1, (2, 2)).unbind(1)
    for big, small in zip((*wide, kept_k, kept_v), (*batch.x, batch.cache.k, batch.cache.v), strict=True):
        big[: len(small)] = small
    batch.x, batch.cache = wide, LayerKV(kept_k, kept_v, batch.cache.layout)
    got = batch.whole()
    assert torch.equal(got[:195], expected)
    assert bool(got[195:].isnan().all())


def test_graphs_replay_other_geometry_and_numbers() -> None:
    from hstu_kernels.attention.triton.target_launch import triton_target_attention

    first, second = Batch((900,) * 40, (256,) * 40, 5), Batch((1000, 800) * 20, (200, 312) * 20, 6)

    def attend() -> Tensor:
        return triton_target_attention(
            *first.x, first.cache, first.layout, AttentionMask(), alpha=ALPHA, scale=SCALE, bias=None
        )

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    graph.replay()
    assert torch.equal(out, first.theirs())
    for mine, new in zip(first.x, second.x, strict=True):
        mine.copy_(new)
    first.cache.k.copy_(second.cache.k)
    first.cache.v.copy_(second.cache.v)
    first.layout.seq_offsets.copy_(second.layout.seq_offsets)
    first.cache.layout.seq_offsets.copy_(second.cache.layout.seq_offsets)
    graph.replay()
    assert torch.equal(out, second.theirs())
