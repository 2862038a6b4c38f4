"""The Triton kernels compiled, without a GPU, for three generations of NVIDIA chips, and a look at what came out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu_kernels import AttentionMask
from hstu_kernels.attention.triton import OLDEST_TRITON, interpreting, triton_release
from hstu_kernels.attention.triton.tiles import (
    KernelShape,
    Tile,
    TileSet,
    float32_precision,
    padded_width,
    tile_set,
)
from tests.ops.assembled import resources

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET is set: kernels are not compiled"),
    pytest.mark.skipif((triton_release() or OLDEST_TRITON) < OLDEST_TRITON, reason="the kernels need Triton 3.4"),
]

TABLES = {
    "rab_ptr": "*fp32",
    "pos_ptr": "*fp32",
    "time_ptr": "*fp32",
    "bounds_ptr": "*i64",
    "row_times_ptr": "*i64",
    "key_times_ptr": "*i64",
    "key_spans_ptr": "*i64",
    "row_spans_ptr": "*i64",
    "pos_sums_ptr": "*fp32",
    "pos_factor_ptr": "*fp32",
    "time_sums_ptr": "*fp32",
}
DESCRIPTORS = ("k_desc", "v_desc", "q_desc", "dout_desc")
ARRAYS = {
    "work_ptr": "*i64",
    "offsets_ptr": "*i64",
    "cache_offsets_ptr": "*i64",
    "batch_size": "i32",
    "slots": "i32",
    "total_rows": "i32",
    "sums_ptr": "*fp32",
    "alpha": "fp32",
    "scale": "fp32",
    "pieces": "i32",
    "partial_ptr": "*fp32",
}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SEMI_LOCAL = AttentionMask(max_attn_len=256, global_prefix_len=64, full_attn_tail_len=256, window_targets=True)
# Bytes of stack that a thread may use: the 64 x 128 tile of dk and dv spills 104 and is the fastest that was measured.
STACK_BOUND = 128


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile in earnest, not from an earlier run's files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def kernels() -> dict[str, Any]:
    from hstu_kernels.attention.triton.backward_keys import hstu_bwd_dkdv_kernel
    from hstu_kernels.attention.triton.backward_queries import hstu_bwd_dq_kernel
    from hstu_kernels.attention.triton.bias_grad import hstu_bwd_bias_kernel
    from hstu_kernels.attention.triton.forward import hstu_fwd_kernel
    from hstu_kernels.attention.triton.target import hstu_target_kernel

    return {
        "forward": hstu_fwd_kernel,
        "dq": hstu_bwd_dq_kernel,
        "dkdv": hstu_bwd_dkdv_kernel,
        "bias": hstu_bwd_bias_kernel,
        "target": hstu_target_kernel,
    }


def tile_of(tiles: TileSet, name: str) -> Tile:
    tile: Tile = getattr(tiles, "forward" if name == "target" else name)
    return tile


def compiled(
    name: str,
    capability: int,
    dtype: torch.dtype = torch.bfloat16,
    widths: tuple[int, int] = (128, 128),
    mask: AttentionMask = SEMI_LOCAL,
    *,
    bias: bool = False,
    descriptors: bool = False,
    precision: str = "ieee",
    longest: int = 0,
    windowed: bool | None = None,
) -> Any:
    """``windowed``: with the tile of such masks; ``None``: with that of ``mask``."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernels()[name]
    bias = bias or name == "bias"
    windowed = mask.max_attn_len > 0 if windowed is None else windowed
    tile = tile_of(tile_set(*widths, dtype, biased=bias, windowed=windowed, longest=longest), name)
    shape = KernelShape(
        heads=4,
        qk_dim=widths[0],
        v_dim=widths[1],
        block_qk=padded_width(widths[0]),
        block_v=padded_width(widths[1]),
        block_m=tile.block_m,
        block_n=tile.block_n,
        contextual=2,
        reach=1023 if bias else -1,
        buckets=128 if bias else -1,
        exact=dtype == torch.float32,
        descriptors=descriptors,
        precision=precision,
        assembly=True,
        own_in_registers=tile.own_in_registers if dtype.itemsize == 2 and capability == 90 else 0,
        warps=tile.num_warps if dtype.itemsize == 2 and capability == 90 else 0,
    )
    constants: dict[str, Any] = {"SHAPE": shape, "MASK": mask, "ENTRIES": 256 if bias else 0, "COPIES": 32}
    constants |= {"SPLIT_ROWS": 2048, "STAGES": tile.num_stages}
    if not bias:
        constants |= dict.fromkeys(TABLES)
    if not descriptors:
        constants |= dict.fromkeys(DESCRIPTORS)
    known = {**TABLES, **ARRAYS}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_stride"):
            signature[argument] = "i32"
        elif argument in DESCRIPTORS:
            block = tile.block_n if argument in ("k_desc", "v_desc") else tile.block_m
            width = widths[1] if argument in ("v_desc", "dout_desc") else widths[0]
            signature[argument] = f"tensordesc<{TYPES[dtype]}[{block}, {width}]>"
        else:
            signature[argument] = known.get(argument, f"*{TYPES[dtype]}")
    # What the launcher finds for tensors of a usual size: pointers and strides are multiples of 16.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*") or signature[argument] == "i32"
    }
    capped = {"maxnreg": tile.registers} if tile.registers and capability == 90 else {}
    used = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=used, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages, **capped},
    )


@pytest.mark.parametrize("name", ["forward", "dq", "dkdv", "bias", "target"])
@pytest.mark.parametrize(("capability", "instruction"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")], ids=str)
def test_tensor_cores_are_used(name: str, capability: int, instruction: str) -> None:
    code = compiled(name, capability).asm["ptx"]
    assert instruction in code
    assert "tanh.approx.f32" in code
    if name != "bias":
        assert "cp.async" in code, "operands are not copied ahead of their use"


@pytest.mark.parametrize("name", ["forward", "dq", "dkdv", "target"])
@pytest.mark.parametrize("capability", [90, 100])
def test_the_copy_engine_fetches_full_blocks(name: str, capability: int) -> None:
    kernel = compiled(name, capability, descriptors=True)
    assert "cp.async.bulk.tensor" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= 227 * 1024


@pytest.mark.parametrize("name", ["forward", "dq", "dkdv", "target"])
def test_hopper_code_fits_into_registers(name: str, tmp_path: Path) -> None:
    """As it runs there, with blocks by the copy engine."""
    kernel = compiled(name, 90, descriptors=True)
    assert kernel.metadata.shared <= 227 * 1024
    assert resources(kernel, tmp_path)["STACK"] <= STACK_BOUND


def test_own_operands_pass_shared_memory_by() -> None:
    """Those of dq that stay in registers: shared memory holds three stages of keys and values, and barriers."""
    kernel = compiled("dq", 90, descriptors=True)
    assert kernel.metadata.shared <= 3 * 2 * 64 * 128 * 2 + 256
    assert kernel.asm["ttgir"].count("ld.global.nc.b32") == 2


@pytest.mark.parametrize("name", ["forward", "dq", "dkdv"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_dk_and_dv_wait_before_they_write(name: str, capability: int) -> None:
    """dq lets them begin early, and nothing that they write is ahead of the wait for its end."""
    code = compiled(name, capability, descriptors=capability >= 90).asm["ptx"]
    there = capability == 90
    # Behind dq come dk and dv, behind these what adds up the pieces.
    assert code.count("griddepcontrol.launch_dependents") == (there and name != "forward")
    assert code.count("griddepcontrol.wait") == (there and name == "dkdv")
    if there and name == "dkdv":
        before, after = code.split("griddepcontrol.wait")
        assert "st.global" not in before
        assert "st.global" in after


@pytest.mark.parametrize("width", [64, 128])
def test_the_tile_of_long_batches_fits_into_registers(width: int, tmp_path: Path) -> None:
    plain = AttentionMask()
    short, long = (
        compiled("forward", 90, widths=(width, width), mask=plain, descriptors=True, longest=n) for n in (0, 1 << 20)
    )
    assert long.asm["ttgir"] != short.asm["ttgir"]
    assert long.metadata.shared <= 227 * 1024
    assert resources(long, tmp_path)["STACK"] == 0


@pytest.mark.parametrize("name", ["forward", "dq", "dkdv", "target"])
def test_a_bias_leaves_the_pipeline_alone(name: str) -> None:
    """Operands still come ahead of their use, and nothing of a block's size goes through shared memory for the bias."""
    plain, biased = (compiled(name, 90, bias=bias, descriptors=True) for bias in (False, True))
    assert biased.metadata.shared <= 227 * 1024
    for kernel in (plain, biased):
        assert kernel.asm["ttgir"].count("async_tma_copy_global_to_local") >= 4
    if name != "dq":
        # The position gradient of dq does turn its blocks there.
        assert whole_blocks_moved(biased) == whole_blocks_moved(plain)


def whole_blocks_moved(kernel: Any) -> int:
    """Conversions of float32 matrices between layouts."""
    return len(re.findall(r"convert_layout .*tensor<\d+x\d+xf32", kernel.asm["ttgir"]))


OTHERS = [
    ("forward", torch.float16, (64, 64)),
    ("dq", torch.float16, (64, 64)),
    ("dkdv", torch.float16, (64, 64)),
    ("bias", torch.float16, (64, 64)),
    ("forward", torch.bfloat16, (50, 36)),
    ("dkdv", torch.bfloat16, (50, 36)),
    ("dkdv", torch.bfloat16, (256, 256)),
    ("forward", torch.float32, (50, 50)),
]


@pytest.mark.parametrize(("name", "dtype", "widths"), OTHERS, ids=str)
def test_other_widths_and_types_compile_with_bias(name: str, dtype: torch.dtype, widths: tuple[int, int]) -> None:
    kernel = compiled(name, 90, dtype, widths, bias=True)
    assert kernel.metadata.shared <= 227 * 1024
    assert ("tanh.approx" in kernel.asm["ptx"]) == (dtype != torch.float32)


def test_float32_uses_tensor_cores_where_tf32_is_allowed() -> None:
    exact, fast = (compiled("forward", 90, torch.float32, precision=p).asm["ptx"] for p in ("ieee", "tf32"))
    assert "tf32" not in exact
    assert "tf32" in fast


@pytest.mark.parametrize("name", ["forward", "dq", "dkdv"])
def test_full_float32_of_narrow_heads_runs_on_tensor_cores(name: str, tmp_path: Path) -> None:
    assert (float32_precision(64, 64), float32_precision(16, 128)) == ("tf32x3", "ieee")
    kernel = compiled(name, 90, torch.float32, (64, 64), AttentionMask(), precision="tf32x3")
    assert re.search(r"wgmma\S*tf32", kernel.asm["ptx"])
    assert resources(kernel, tmp_path)["STACK"] <= 512


def test_causal_full_tiles_carry_no_mask() -> None:
    """With one and the same tile: others have other ways to fetch their own operands."""
    plain, masked = compiled("forward", 90, mask=AttentionMask(), windowed=True), compiled("forward", 90)
    assert len(plain.asm["ptx"]) < len(masked.asm["ptx"])
