"""The gather kernel: in Triton's interpreter (a process of its own), compiled for three generations, and on a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu_kernels.attention.triton import OLDEST_TRITON, interpreting, triton_release
from hstu_kernels.int4 import PackedRows, RowFormat, gather_rows, pack_rows, unpack_rows
from hstu_kernels.int4.triton.shape import TILE, GatherTile, gather_shape, is_narrow
from tests.ops.int4_cases import GATHER_CASES, GatherCase, gather_inputs, gather_oracle
from tests.ops.interpreter import passes_interpreted

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET is set: kernels are not compiled"),
    pytest.mark.skipif((triton_release() or OLDEST_TRITON) < OLDEST_TRITON, reason="the kernels need Triton 3.4"),
]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that this PyTorch can use")

CASES = Path(__file__).with_name("interpreted_int4.py")
# Triton 3.7 passes several units of a row between threads, through 2 KB of shared memory.
PASSES_NOTHING = (triton_release() or (0, 0)) < (3, 7)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SERVED = [case for case in GATHER_CASES if case.format is not RowFormat.FP8]


def test_in_the_interpreter() -> None:
    passes_interpreted(CASES)


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile in earnest, not from an earlier run's files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compiled(
    capability: int,
    dim: int,
    *,
    row_format: RowFormat = RowFormat.INT4,
    out: str = "bf16",
    added: str | None = "bf16",
    tile: GatherTile = TILE,
    ids: str = "i64",
    scaled: bool = True,
) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hstu_kernels.int4.triton.gather import int4_gather_kernel as kernel

    shape = gather_shape(
        PackedRows(torch.empty(1, row_format.row_bytes(dim), dtype=torch.uint8), dim, row_format), tile
    )
    types = {
        "data_ptr": f"*{ {4: 'i32', 2: 'i16', 1: 'u8'}[shape.unit_bytes] }",
        "ids_ptr": "*i64",
        "out_ptr": f"*{out}",
        "action_ptr": f"*{added}",
        "position_ptr": f"*{added}",
        "total_rows": "i32",
        "num_rows": "i32",
        "num_actions": "i32",
        "num_positions": "i32",
        "item_scale": "fp32",
    }
    constants: dict[str, Any] = {"SHAPE": shape, "SCALED": scaled and added is not None}
    if added is None:
        constants |= dict.fromkeys(("action_ptr", "action_ids_ptr", "position_ptr", "position_ids_ptr"))
    signature = {a: "constexpr" if a in constants else types.get(a, f"*{ids}") for a in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if signature[a].startswith("*")}
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options=tile.launch_options(
            narrow=is_narrow(shape, [torch.empty(0, dtype=DTYPES[t]) for t in (out, added) if t])
        ),
    )


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dim", [128, 512])
def test_memory_is_accessed_in_wide_steps(capability: int, dim: int) -> None:
    kernel = compiled(capability, dim)
    code = kernel.asm["ptx"]
    # Eight bfloat16 of a row at once, written and read; nothing is passed between threads on the way.
    assert re.search(r"st\.global\.v4\.b32", code)
    assert re.search(r"ld\.global\.v4\.b32", code)
    if PASSES_NOTHING:
        assert kernel.metadata.shared == 0
    # One fused operation for each element, that of the exact product; other products and sums are rounded apart.
    elements = 8 * TILE.units // (32 * TILE.warps)
    assert counted(code, "fma") == elements
    assert counted(code, "add") == 2 * elements


@pytest.mark.usefixtures("own_cache")
def test_units_of_a_row_share_its_ids_and_its_scale() -> None:
    # Four units of a thread: three ids and a scale with bias for each row, codes and two terms for each unit.
    for words, rows in ((4, 1), (2, 2), (1, 4)):
        kernel = compiled(90, 128, tile=GatherTile(units=512, warps=4, words=words))
        assert kernel.asm["ptx"].count("ld.global") == 4 * rows + 3 * 4
        if words == 1 or PASSES_NOTHING:
            assert kernel.metadata.shared == 0


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("ids", ["i64", "i32"])
def test_all_threads_of_a_multiprocessor_fit(ids: str) -> None:
    for dim in (128, 512):
        for added in ("bf16", None):
            kernel = compiled(90, dim, ids=ids, added=added, scaled=False)
            registers = re.search(r"\.maxnreg (\d+)", kernel.asm["ptx"])
            assert registers is not None
            # 65,536 registers for 64 warps.
            assert int(registers[1]) == 32


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(("dim", "out", "added"), [(128, "fp32", "bf16"), (128, "bf16", "fp32"), (7, "bf16", "bf16")])
def test_what_does_not_fit_has_no_bound(dim: int, out: str, added: str) -> None:
    assert ".maxnreg" not in compiled(90, dim, out=out, added=added).asm["ptx"]


def counted(code: str, operation: str) -> int:
    """Elements that pass through a float32 operation; newer chips take two at once."""
    found = re.findall(rf"{operation}\S*\.f32(x2)?\s", code)
    return sum(2 if pair else 1 for pair in found)


OTHERS = [
    (7, RowFormat.INT4, "fp32", "fp32"),
    (50, RowFormat.INT4, "bf16", "fp32"),
    (12, RowFormat.INT4, "fp16", None),
    (1100, RowFormat.INT4, "bf16", "bf16"),
    (128, RowFormat.INT8, "bf16", "bf16"),
    (13, RowFormat.INT8, "fp16", "fp16"),
]


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(("dim", "row_format", "out", "added"), OTHERS, ids=str)
def test_other_shapes_compile(dim: int, row_format: RowFormat, out: str, added: str | None) -> None:
    code = compiled(90, dim, row_format=row_format, out=out, added=added).asm["ptx"]
    assert ".local" not in code, "values are spilled to local memory"


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", SERVED, ids=str)
def test_the_same_bits_on_a_gpu(case: GatherCase, dtype: torch.dtype) -> None:
    inputs = gather_inputs(case, "cuda")
    expected = gather_oracle(inputs, dtype)
    for backend in ("triton", "eager"):
        out = gather_rows(inputs.table, inputs.ids, dtype=dtype, backend=backend, **inputs.keywords())  # type: ignore[arg-type]
        assert torch.equal(out.cpu(), expected), backend


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("row_format", list(RowFormat))
def test_packing_on_a_gpu_gives_the_same_bytes(row_format: RowFormat) -> None:
    values = torch.randn(1000, 67, generator=torch.Generator().manual_seed(0)) ** 3
    on_cpu, on_cuda = pack_rows(values, row_format), pack_rows(values.cuda(), row_format)
    assert torch.equal(on_cuda.data.cpu(), on_cpu.data)
    assert torch.equal(unpack_rows(on_cuda).cpu(), unpack_rows(on_cpu))


@pytest.mark.cuda
@on_gpu
def test_rows_beyond_two_gib() -> None:
    rows = (1 << 31) // RowFormat.INT4.row_bytes(512) + 1000
    if torch.cuda.mem_get_info()[0] < 4 << 30:
        pytest.skip("needs 4 GiB of free GPU memory")
    data = torch.zeros(rows, RowFormat.INT4.row_bytes(512), dtype=torch.uint8, device="cuda")
    last = pack_rows(torch.randn(5, 512, device="cuda"))
    data[-5:] = last.data
    ids = torch.arange(rows - 5, rows, device="cuda")
    out = gather_rows(PackedRows(data, 512), ids, dtype=torch.float32, backend="triton")
    assert torch.equal(out, unpack_rows(last))


@pytest.mark.cuda
@on_gpu
def test_ids_are_checked_on_a_gpu_when_asked_for() -> None:
    inputs = gather_inputs(SERVED[0], "cuda")
    ids = inputs.ids.clone()
    ids[0] = inputs.table.num_rows
    with pytest.raises(ValueError, match="ids: expected ids in"):
        gather_rows(inputs.table, ids, check_ids=True)
    for backend in ("triton", "eager"):
        assert torch.isnan(gather_rows(inputs.table, ids, backend=backend)[0]).all()
