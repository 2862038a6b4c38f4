"""The forward that is for Hopper alone, compiled without a GPU."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.assembled import resources, waits_for_products

triton = pytest.importorskip("triton", reason="Triton is not installed")
hopper = pytest.importorskip("hstu_kernels.attention.triton.hopper_launch", reason="Triton is not installed")

pytestmark = [
    pytest.mark.skipif(not hopper.available(), reason="the Gluon interface of this Triton is not the one it needs"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compiled(dtype: torch.dtype, width: int, tile: hopper.HopperTile) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from hstu_kernels.attention.triton.hopper_forward import hopper_fwd_kernel

    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    signature = {"out_ptr": f"*{name}", "work_ptr": "*i64"}
    for argument, rows in (("q_desc", 64), ("k_desc", tile.block_n), ("v_desc", tile.block_n), ("out_desc", 64)):
        layout = hopper.shared_layout(rows, width, dtype)
        signature[argument] = f"tensordesc<{name}[{rows}, {width}],{layout!r}>"
    numbers = ("items", "q_head_stride", "k_head_stride", "v_head_stride")
    signature |= dict.fromkeys(numbers, "i32") | {"alpha": "fp32", "scale": "fp32"}
    constants = {"HEADS": 4, "D": width, "BLOCK_N": tile.block_n, "STAGES": tile.stages}
    signature |= dict.fromkeys(constants, "constexpr")
    divisible = [["tt.divisibility", 16]]
    attributes = {
        (i,): divisible
        for i, argument in enumerate(hopper_fwd_kernel.arg_names)
        if argument.endswith(("_ptr", "_stride"))
    }
    source = GluonASTSource(fn=hopper_fwd_kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


@pytest.mark.parametrize(("width", "tile"), [(w, t) for w, tiles in hopper.TILES.items() for t in tiles], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fetches_by_the_copy_engine_and_fits(
    dtype: torch.dtype, width: int, tile: hopper.HopperTile, tmp_path: Path
) -> None:
    kernel = compiled(dtype, width, tile)
    code = kernel.asm["ptx"]
    # q twice, k and v, 64 columns at a time.
    assert code.count("cp.async.bulk.tensor.2d.shared") == 4 * width // 64
    # Results of whole groups, in one instruction for each of the two.
    assert code.count("cp.async.bulk.tensor.2d.global") == 2
    assert code.count("setmaxnreg") >= 3
    assert "tanh.approx.f32" in code
    assert kernel.metadata.shared <= 227 * 1024
    assert kernel.metadata.global_scratch_size == 0, "a launch by addresses alone has no memory to offer"
    used = resources(kernel, tmp_path)
    assert used["STACK"] == 0
    # Twelve warps of a program: 65,536 registers of a multiprocessor.
    assert used["REG"] <= 168
    # Of each group: the first product; in the loop and between two tiles, the one before and its own; the very last.
    assert waits_for_products(kernel, tmp_path) == 2 * 6


@functools.cache
def compiled_biased(dtype: torch.dtype, reach: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from hstu_kernels.attention.triton.hopper_biased import hopper_biased_kernel
    from hstu_kernels.attention.triton.hopper_biased_launch import BLOCK_N, STAGES, WIDTH

    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    signature = {"out_ptr": f"*{name}", "work_ptr": "*i64", "pos_ptr": "*fp32"}
    layout = hopper.shared_layout(BLOCK_N, WIDTH, dtype)
    signature |= dict.fromkeys(
        ("q_desc", "k_desc", "v_desc", "out_desc"), f"tensordesc<{name}[{BLOCK_N}, {WIDTH}],{layout!r}>"
    )
    numbers = ("items", "q_head_stride", "k_head_stride", "v_head_stride")
    signature |= dict.fromkeys(numbers, "i32") | {"alpha": "fp32", "scale": "fp32"}
    constants = {"HEADS": 4, "D": WIDTH, "STAGES": STAGES, "REACH": reach}
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(hopper_biased_kernel.arg_names)
        if argument.endswith(("_ptr", "_stride"))
    }
    source = GluonASTSource(fn=hopper_biased_kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


@pytest.mark.parametrize("reach", [4095, 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_bias_fits_beside_the_sums(dtype: torch.dtype, reach: int, tmp_path: Path) -> None:
    kernel = compiled_biased(dtype, reach)
    code = kernel.asm["ptx"]
    assert code.count("cp.async.bulk.tensor.2d.shared") == 8
    assert code.count("cp.async.bulk.tensor.2d.global") == 2
    assert code.count("setmaxnreg") >= 3
    # Two products of q and k, the first and the others, and two of weights and v, in each group.
    assert code.count("wgmma.mma_async") == 2 * 2 * (8 + 4)
    assert kernel.metadata.shared <= 227 * 1024
    assert kernel.metadata.global_scratch_size == 0, "a launch by addresses alone has no memory to offer"
    used = resources(kernel, tmp_path)
    assert used["STACK"] == 0
    assert used["REG"] <= 168


@functools.cache
def compiled_target(out: str) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from hstu_kernels.attention.triton.hopper_target import hopper_target_kernel
    from hstu_kernels.attention.triton.hopper_target_launch import BLOCK_N, STAGES, WIDTH

    signature = {"out_ptr": f"*{out}", "work_ptr": "*i64"}
    for argument in ("q_desc", "k_desc", "v_desc", "cache_k_desc", "cache_v_desc", "out_desc"):
        rows = 64 if argument in ("q_desc", "out_desc") else BLOCK_N
        layout = hopper.shared_layout(rows, WIDTH, torch.bfloat16)
        signature[argument] = f"tensordesc<bf16[{rows}, {WIDTH}],{layout!r}>"
    strides = [name for name in hopper_target_kernel.arg_names if name.endswith("_stride")]
    if out == "fp32":
        signature["out_desc"] = "constexpr"
    signature |= dict.fromkeys((*strides, "pieces", "piece_blocks", "total_rows"), "i32")
    signature |= {"alpha": "fp32", "scale": "fp32"}
    sizes = {"BLOCK_N": BLOCK_N, "STAGES": STAGES, "SPLIT_BLOCKS": 2048 // BLOCK_N}
    constants = {"HEADS": 4, "D": WIDTH, **sizes, **({"out_desc": None} if out == "fp32" else {})}
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(hopper_target_kernel.arg_names)
        if argument.endswith(("_ptr", "_stride"))
    }
    source = GluonASTSource(fn=hopper_target_kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


@pytest.mark.parametrize("out", ["bf16", "fp32"])
def test_cached_scoring_fetches_by_the_copy_engine_and_fits(out: str, tmp_path: Path) -> None:
    kernel = compiled_target(out)
    code = kernel.asm["ptx"]
    # q twice, own keys and values, cached ones, 64 columns at a time.
    assert code.count("cp.async.bulk.tensor.2d.shared") == 12
    # Results of whole groups; sums of stretches are written piece by piece.
    assert code.count("cp.async.bulk.tensor.2d.global") == (2 if out == "bf16" else 0)
    assert code.count("setmaxnreg") >= 3
    assert kernel.metadata.shared <= 227 * 1024
    assert kernel.metadata.global_scratch_size == 0, "a launch by addresses alone has no memory to offer"
    used = resources(kernel, tmp_path)
    assert used["STACK"] == 0
    assert used["REG"] <= 168


@pytest.mark.parametrize("tile", hopper.TILES[128], ids=str)
def test_rows_of_another_sequence_are_cleared_before_the_copy_engine_may_write_again(tile: hopper.HopperTile) -> None:
    """What a thread wrote to shared memory: a fence, then all warps of the group, then the product."""
    code = compiled(torch.bfloat16, 128, tile).asm["ptx"]
    same_stretch = r"(?:(?!wgmma\.mma).)*?"
    pattern = rf"st\.shared{same_stretch}fence\.proxy\.async{same_stretch}bar\.sync"
    after = [code[found.end() :] for found in re.finditer(pattern, code, flags=re.DOTALL)]
    # Once for each group; nothing is written behind the fence.
    assert len(after) >= 2
    for rest in after[-2:]:
        assert not re.match(r"[^\n]*\n(?:(?!bra).)*st\.shared", rest, flags=re.DOTALL)
