"""The kernels around the attention compiled, without a GPU, for three generations of NVIDIA chips."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from hstu_kernels.attention.triton import OLDEST_TRITON, interpreting, triton_release

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET is set: kernels are not compiled"),
    pytest.mark.skipif((triton_release() or OLDEST_TRITON) < OLDEST_TRITON, reason="the kernels need Triton 3.4"),
]

CHIPS = pytest.mark.parametrize("capability", [80, 90, 100], ids=str)
WIDE = ("mean_ptr", "rstd_ptr", "dweight_ptr", "dbias_ptr", "weight_ptr", "bias_ptr", "residual_ptr", "sums_ptr")
SCALARS = {"eps": "fp32", "inverse": "fp32", "threshold": "i64"}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile in earnest, not from an earlier run's files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compiled(kernel: Any, capability: int, constants: dict[str, Any], warps: int = 4, stages: int = 3) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument == "seed_ptr":
            signature[argument] = "*i64"
        elif argument.endswith("_desc"):
            own = constants["BLOCK_M" if argument == "a_desc" else "BLOCK_N"]
            signature[argument] = f"tensordesc<bf16[{own}, {constants['BLOCK_K']}]>"
        elif argument.endswith("_ptr"):
            signature[argument] = "*fp32" if argument in WIDE else "*bf16"
        else:
            signature[argument] = SCALARS.get(argument, "i32")
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*") or argument.endswith("_stride")
    }
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )


@pytest.mark.parametrize(("width", "capability"), [(50, 90), (512, 80), (512, 90), (512, 100), (4096, 90)], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["norm", "gated"])
def test_rows_are_read_in_wide_pieces(gated: bool, width: int, capability: int) -> None:
    from hstu_kernels.gated_norm.triton.kernels import gate_bwd_kernel, gate_fwd_kernel
    from hstu_kernels.gated_norm.triton.launch import tile

    block_r, block_w, warps = tile(width)
    shape = {"WIDTH": width, "BLOCK_R": block_r, "BLOCK_W": block_w, "CONCAT": gated, "DROPOUT": gated}
    absent = {} if gated else dict.fromkeys(("u_ptr", "seed_ptr"))
    for kernel in (gate_fwd_kernel, gate_bwd_kernel):
        missing = {name: value for name, value in absent.items() if name in kernel.arg_names}
        if not gated and "du_ptr" in kernel.arg_names:
            # The form of a layer's first norm: rows that are normed already, and a gradient to add.
            missing |= {"du_ptr": None, "mean_ptr": None, "weight_ptr": None, "bias_ptr": None}
            missing |= {"dweight_ptr": None, "dbias_ptr": None}
        code = compiled(kernel, capability, shape | missing, warps)
        assert code.metadata.shared <= 99 * 1024
        if width % 8 == 0:
            assert "ld.global.v4" in code.asm["ptx"] or "ld.global.v2" in code.asm["ptx"]


@CHIPS
@pytest.mark.parametrize("activated", [2048, 512])
def test_silu_moves_sixteen_bytes_at_a_time(activated: int, capability: int) -> None:
    from hstu_kernels.projection.triton.kernels import silu_bwd_kernel, silu_fwd_kernel
    from hstu_kernels.projection.triton.launch import BLOCK

    for kernel in (silu_fwd_kernel, silu_bwd_kernel):
        code = compiled(kernel, capability, {"COLUMNS": 2048, "ACTIVATED": activated, "BLOCK": BLOCK}).asm["ptx"]
        assert "ld.global.v4.b32" in code
        assert "st.global.v4.b32" in code


@pytest.mark.parametrize("capability", [90, 100], ids=str)
@pytest.mark.parametrize("form", ["silu", "silu kept", "sum"])
def test_products_come_by_the_copy_engine_and_fit(form: str, capability: int) -> None:
    from hstu_kernels.projection.triton.product import product_kernel
    from hstu_kernels.projection.triton.product_launch import SILU_TILE, SUM_TILE

    tile, columns, activated = (SUM_TILE, 512, 0) if form == "sum" else (SILU_TILE, 2048, 2048)
    shape = {"COLUMNS": columns, "DEPTH": 512, "ACTIVATED": activated}
    shape |= {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth}
    absent: dict[str, Any] = {
        "silu": ("before_ptr", "residual_ptr"),
        "silu kept": ("residual_ptr",),
        "sum": ("before_ptr",),
    }
    constants = shape | dict.fromkeys(absent[form])
    code = compiled(product_kernel, capability, constants, tile.warps, tile.stages)
    assert code.metadata.shared <= 227 * 1024
    assert "cp.async.bulk.tensor" in code.asm["ptx"]
    assert ("wgmma" if capability == 90 else "tcgen05") in code.asm["ptx"]
    assert "st.global.v4" in code.asm["ptx"]


@CHIPS
def test_narrowing_moves_sixteen_bytes_at_a_time(capability: int) -> None:
    from hstu_kernels.gated_norm.triton.launch import tile
    from hstu_kernels.layer.triton.kernels import narrow_kernel

    block_r, block_w, warps = tile(512)
    shape = {"WIDTH": 512, "BLOCK_R": block_r, "BLOCK_W": block_w}
    code = compiled(narrow_kernel, capability, shape, warps).asm["ptx"]
    assert "ld.global.v4.b32" in code
