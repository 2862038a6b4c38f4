"""Distinct rows of a request: one place for equal ids, and a kernel that reads pinned host memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hstu_kernels import UnsupportedBackend
from hstu_kernels.attention.triton import OLDEST_TRITON, interpreting, triton_release
from hstu_kernels.int4.distinct import can_read_host_rows, choose_places, read_host_rows
from tests.ops.interpreter import passes_interpreted

CASES = Path(__file__).with_name("interpreted_distinct.py")
needs_triton = pytest.mark.skipif((triton_release() or (0,)) < OLDEST_TRITON, reason="the kernels need Triton 3.4")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that this PyTorch can use")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, on_gpu])]


@pytest.mark.parametrize("device", DEVICES)
def test_equal_ids_share_a_place_that_holds_them(device: str) -> None:
    scratch = torch.full((50,), -1, dtype=torch.int32, device=device)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 50, (40 * seed,), generator=generator).to(device)
        places = choose_places(ids, scratch)
        assert places.dtype == torch.int32
        assert torch.equal(ids[places], ids)
        # One place for each: as many of them as there are distinct ids.
        assert places.unique().numel() == ids.unique().numel()
        assert torch.equal(places[places], places)


@needs_triton
@pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET is set: run the cases themselves")
def test_in_the_interpreter() -> None:
    passes_interpreted(CASES, seconds=300)


@needs_triton
@pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET is set")
@pytest.mark.parametrize(("capability", "unit"), [(80, 4), (90, 8), (90, 4), (90, 1)])
def test_the_kernel_compiles(capability: int, unit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hstu_kernels.int4.triton.distinct import distinct_rows_kernel as kernel
    from hstu_kernels.int4.triton.shape import READ, ReadShape

    word = {8: "i64", 4: "i32", 2: "i16", 1: "u8"}[unit]
    shape = ReadShape(unit_bytes=unit, row_units=65, block_units=READ.units)
    signature = {
        "out_ptr": f"*{word}",
        "data_ptr": f"*{word}",
        "ids_ptr": "*i64",
        "chosen_ptr": "*i32",
        "count_ptr": "*i64",
        "total_rows": "i32",
        "tiles": "i32",
        "SHAPE": "constexpr",
    }
    attributes = {(place,): [["tt.divisibility", 16]] for place in range(5)}
    source = ASTSource(fn=kernel, signature=signature, constexprs={"SHAPE": shape}, attrs=attributes)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": READ.warps})
    # Nothing spills, and a tile's loads are all under way at once.
    assert ".local" not in done.asm["ptx"]
    assert done.asm["ptx"].count("atom.") == 1


def test_without_triton_for_the_device_it_is_refused() -> None:
    if interpreting():
        pytest.skip("TRITON_INTERPRET is set: the CPU is served")
    assert not can_read_host_rows(torch.device("cpu"))
    ids = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(UnsupportedBackend, match="triton"):
        read_host_rows(torch.zeros(3, 8, dtype=torch.uint8), ids, ids.int(), ids.clone())


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("width", [64, 260, 66, 7, 1024])
def test_a_gpu_reads_pinned_rows(width: int) -> None:
    data = torch.randint(0, 256, (5000, width), dtype=torch.uint8).pin_memory()
    scratch = torch.zeros(5000, dtype=torch.int32, device="cuda")
    count = torch.zeros(1, dtype=torch.int64, device="cuda")
    distinct = 0
    for asked in (1, 37, 4000):
        ids = torch.randint(0, 5000, (asked,))
        there = ids.cuda()
        chosen = choose_places(there, scratch)
        out = read_host_rows(data, there, chosen, count)
        assert torch.equal(out[chosen.long()].cpu(), data[ids])
        distinct += ids.unique().numel()
        assert int(count) == distinct


@pytest.mark.cuda
@on_gpu
def test_pageable_rows_are_refused() -> None:
    ids = torch.zeros(1, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match="data: expected rows in pinned host memory"):
        read_host_rows(torch.zeros(3, 8, dtype=torch.uint8), ids, ids.int(), ids.clone())
