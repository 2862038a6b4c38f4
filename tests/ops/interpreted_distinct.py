"""What `test_distinct.py` runs in a process of its own, with TRITON_INTERPRET=1 from its start."""

from __future__ import annotations

import os

import pytest
import torch

from hstu_kernels.int4.distinct import can_read_host_rows, choose_places, read_host_rows
from hstu_kernels.int4.triton.launch import triton_read_rows
from hstu_kernels.int4.triton.shape import ReadTile, read_shape

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_distinct.py"
torch.set_num_threads(1)


@pytest.mark.parametrize(("width", "unit"), [(64, 8), (260, 4), (66, 2), (7, 1)])
@pytest.mark.parametrize("asked", [1, 3, 50])
@pytest.mark.parametrize("tile", [ReadTile(), ReadTile(units=16, programs=3)], ids=["large", "small"])
def test_each_distinct_row_is_written_once(width: int, unit: int, asked: int, tile: ReadTile) -> None:
    generator = torch.Generator().manual_seed(width + asked)
    data = torch.randint(0, 256, (20, width), dtype=torch.uint8, generator=generator)
    ids = torch.randint(0, 20, (asked,), generator=generator)
    chosen = choose_places(ids, torch.full((20,), -7, dtype=torch.int32))
    count = torch.tensor([100])
    assert read_shape(data, tile).unit_bytes == unit
    out = triton_read_rows(data, ids, chosen, count, tile=tile)
    assert out.shape == (asked, width)
    assert torch.equal(out[chosen], data[ids])
    assert int(count) == 100 + ids.unique().numel()


def test_rows_that_nobody_chose_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: exact(*size, **options).fill_(99))
    data = torch.arange(4, dtype=torch.uint8)[:, None].repeat(1, 8)
    ids = torch.tensor([2, 2, 0, 2])
    chosen = choose_places(ids, torch.zeros(4, dtype=torch.int32))
    out = read_host_rows(data, ids, chosen, torch.zeros(1, dtype=torch.int64))
    unchosen = [place for place in range(4) if place not in chosen.tolist()]
    assert len(unchosen) == 2
    assert bool((out[unchosen] == 99).all())


def test_the_interpreter_serves_the_cpu() -> None:
    assert can_read_host_rows(torch.device("cpu"))
    none = torch.zeros(0, dtype=torch.int64)
    count = torch.zeros(1, dtype=torch.int64)
    assert read_host_rows(torch.zeros(3, 8, dtype=torch.uint8), none, none.int(), count).shape == (0, 8)
    assert int(count) == 0
