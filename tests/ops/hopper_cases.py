"""What tests of the kernels for Hopper alone share: when they run, batches, and neighbours full of no numbers."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from hstu_kernels import AttentionMask, JaggedLayout, RelativeBias
from hstu_kernels.attention.triton import TritonPlan, plan_triton


def missing() -> str:
    if not torch.cuda.is_available():
        return "no NVIDIA GPU that this PyTorch can use"
    if torch.cuda.get_device_capability()[0] != 9:
        return "no Hopper GPU"
    hopper = pytest.importorskip("hstu_kernels.attention.triton.hopper_launch", reason="Triton is not installed")
    return "" if hopper.available() else "the Gluon interface of this Triton is not the one it needs"


REASON = missing()
MARKS = [pytest.mark.cuda, pytest.mark.skipif(bool(REASON), reason=REASON)]

# Empty ones, single rows, whole tiles and blocks, one more and one less.
LENGTHS = (0, 1, 63, 64, 65, 0, 127, 128, 129, 255, 256, 257, 640, 1000, 0)
NEIGHBOURS = (70, 100, 128, 129, 64, 300, 1, 257, 190)


def planned(lengths: tuple[int, ...], bias: RelativeBias | None = None) -> TritonPlan:
    layout = JaggedLayout.from_lengths(torch.tensor(lengths, device="cuda"))
    return plan_triton(layout, AttentionMask(), bias, sum(lengths))


def random_rows(rows: int, heads: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v."""
    generator = torch.Generator("cuda").manual_seed(seed)
    found = [torch.randn(rows, heads, 128, device="cuda", generator=generator).to(dtype) for _ in range(3)]
    return found[0], found[1], found[2]


def random_lengths(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.choice((0, 1 + rng.randrange(90), 64 * rng.randrange(1, 9), 1500)) for _ in range(9))


def count_launches(kind: type, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list that grows with each ``launch`` of an object of ``kind``."""
    launches: list[object] = []
    launch = kind.launch  # type: ignore[attr-defined]

    def counted(self: object, *args: object, **kwargs: object) -> bool:
        launches.append(self)
        return bool(launch(self, *args, **kwargs))

    monkeypatch.setattr(kind, "launch", counted)
    return launches


def spoil_every_other(x: tuple[Tensor, ...], lengths: tuple[int, ...]) -> list[slice]:
    """Fill every other sequence of q, k and v with what is no number; the rows of those that are left as they are."""
    start, kept = 0, []
    for i, length in enumerate(lengths):
        if i % 2:
            for t, bad in zip(x, (float("nan"), float("inf"), float("nan")), strict=True):
                t[start : start + length] = bad
        else:
            kept.append(slice(start, start + length))
        start += length
    return kept
