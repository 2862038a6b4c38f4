"""Packed rows: byte for byte FBGEMM's, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from hstu_kernels.int4 import PackedRows, RowFormat, RowRange, pack_rows, unpack_rows
from hstu_kernels.int4 import packing as packing_module

FORMATS = list(RowFormat)
INTEGER = [RowFormat.INT4, RowFormat.INT8]


def _golden() -> ModuleType:
    path = Path(__file__).parents[1] / "golden" / "int4_rows.py"
    spec = importlib.util.spec_from_file_location("int4_golden_rows", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


golden = _golden()
RECORDED = json.loads(golden.FILE.read_text(encoding="utf-8"))["cases"]
CASES = dict(golden.cases())


def decoded(packed: PackedRows) -> Tensor:
    """The values by the definition, element by element, in float64."""
    out = torch.zeros(packed.num_rows, packed.dim, dtype=torch.float64)
    for i, row in enumerate(packed.data.tolist()):
        tail = torch.tensor(row[-4:], dtype=torch.uint8)
        for j in range(packed.dim):
            if packed.format is RowFormat.FP8:
                code = torch.tensor([row[j]], dtype=torch.uint8).view(torch.float8_e4m3fn).double()
                out[i, j] = code * tail.view(torch.float32).double()
                continue
            code = (row[j // 2] >> (4 * (j % 2))) & 15 if packed.format is RowFormat.INT4 else row[j]
            scale, bias = tail.view(torch.float16).double().tolist()
            out[i, j] = code * scale + bias
    return out


def test_ten_thousand_rows_are_recorded() -> None:
    assert RECORDED.keys() == CASES.keys()
    assert sum(len(values) for values in CASES.values()) == sum(entry["rows"] for entry in RECORDED.values()) == 10_000


@pytest.mark.parametrize("row_format", INTEGER)
@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_recorded_from_fbgemm(name: str, row_format: RowFormat) -> None:
    values, entry = CASES[name], RECORDED[name]
    assert golden.digest(values) == entry["input_sha256"], "the rows themselves came out differently here"
    data = pack_rows(values, row_format).data
    assert bytes(data[golden.EXAMPLE].tolist()).hex() == entry[f"{row_format}_row_{golden.EXAMPLE}"]
    assert golden.digest(data) == entry[f"{row_format}_sha256"]


@pytest.mark.parametrize("row_format", INTEGER)
def test_bytes_equal_fbgemm_here(row_format: RowFormat) -> None:
    pytest.importorskip("fbgemm_gpu", reason="fbgemm-gpu is not installed; `make install-torchrec` adds it")
    generator = torch.Generator().manual_seed(3)
    drawn = {"drawn": torch.randn(2000, 96, generator=generator) ** 5, **CASES}
    back = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat
    for name, values in drawn.items():
        packed, theirs = pack_rows(values, row_format), golden.fbgemm_rows(values, row_format.bits)
        assert torch.equal(packed.data, theirs), name
        assert torch.equal(unpack_rows(packed), back(theirs, row_format.bits)), name


@pytest.mark.parametrize("width", [2, 6, 8, 50])
def test_bytes_equal_those_of_torch(width: int) -> None:
    """PyTorch's own 4-bit rows are of the same kind, and take every even width."""
    values = torch.randn(500, width, generator=torch.Generator().manual_seed(width)) ** 3
    assert torch.equal(pack_rows(values).data, torch.ops.quantized.embedding_bag_4bit_prepack(values))


@pytest.mark.parametrize("width", [1, 3, 5, 7, 33, 127])
def test_odd_widths_are_fbgemms_bytes_of_the_padded_row(width: int) -> None:
    pytest.importorskip("fbgemm_gpu", reason="fbgemm-gpu is not installed; `make install-torchrec` adds it")
    values = torch.randn(300, width, generator=torch.Generator().manual_seed(width))
    # Repeating an element leaves the range alone and fills FBGEMM's width, a multiple of four.
    padded = torch.cat([values, values[:, :1].expand(-1, -width % 4)], dim=1)
    theirs, ours = golden.fbgemm_rows(padded, 4), pack_rows(values).data
    assert ours.shape[1] == (width + 1) // 2 + 4
    assert torch.equal(ours[:, -4:], theirs[:, -4:])
    whole = width // 2
    assert torch.equal(ours[:, :whole], theirs[:, :whole])
    assert torch.equal(ours[:, whole], theirs[:, whole] & 15)


def test_a_row_by_hand() -> None:
    values = torch.tensor([[-1.0, 0.0, 1.0, 2.0, 6.5]])
    packed = pack_rows(values)
    # bias -1, scale 7.5 / 15: codes 0, 2, 4, 6, 15.
    assert packed.data.tolist() == [[0x20, 0x64, 0x0F, 0x00, 0x38, 0x00, 0xBC]]
    assert torch.equal(unpack_rows(packed), values)


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("width", [1, 2, 5, 16])
def test_unpacking_follows_the_definition(row_format: RowFormat, width: int) -> None:
    values = torch.randn(20, width, generator=torch.Generator().manual_seed(1))
    packed = pack_rows(values, row_format)
    assert packed.nbytes == 20 * row_format.row_bytes(width)
    assert torch.equal(unpack_rows(packed, torch.float64), decoded(packed).float().double())
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(unpack_rows(packed, dtype), decoded(packed).float().to(dtype))


@pytest.mark.parametrize(("row_format", "steps"), [(RowFormat.INT4, 15), (RowFormat.INT8, 255)])
def test_the_error_is_within_half_a_step(row_format: RowFormat, steps: int) -> None:
    values = torch.randn(500, 64, generator=torch.Generator().manual_seed(2)).double()
    error = (unpack_rows(pack_rows(values, row_format), torch.float64) - values).abs().amax(1)
    low, high = values.amin(1), values.amax(1)
    # Half a step, the rounding of the bias, and that of the scale, which grows to the last code.
    bound = (high - low) / steps / 2 + low.abs() * 2.0**-11 + (high - low) * 2.0**-11 + high.abs() * 2.0**-11
    assert bool((error <= bound).all())
    assert bool((error >= bound / 20).any()), "the bound says nothing"


def test_fp8_keeps_three_bits_of_mantissa() -> None:
    scales = 10.0 ** (torch.arange(500) % 40 - 20)
    values = torch.randn(500, 64, generator=torch.Generator().manual_seed(2)) * scales[:, None]
    back = unpack_rows(pack_rows(values, "fp8"))
    largest = values.abs().amax(1, keepdim=True)
    # Relative to the element down to the smallest normal code, 2^-6 of 448; a fixed step below it.
    bound = torch.maximum(values.abs() * 2.0**-4, largest / 448 * 2.0**-10) * 1.0001
    assert bool(((back - values).abs() <= bound).all())
    peak = values.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(back.gather(1, peak), values.gather(1, peak), rtol=1e-6, atol=0)


def test_fp8_of_zeros_and_of_the_smallest_and_largest_numbers() -> None:
    values = torch.tensor([[0.0, 0.0], [1e-45, 0.0], [3.4e38, -3.4e38], [-448.0, 1.0]])
    back = unpack_rows(pack_rows(values, "fp8"))
    assert torch.equal(back[[0, 1, 3]], torch.tensor([[0.0, 0.0], [0.0, 0.0], [-448.0, 1.0]]))
    torch.testing.assert_close(back[2], values[2])


@pytest.mark.parametrize("row_format", FORMATS)
def test_an_empty_table(row_format: RowFormat) -> None:
    packed = pack_rows(torch.empty(0, 7), row_format)
    assert packed.num_rows == 0
    assert unpack_rows(packed).shape == (0, 7)


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_float_types_are_packed_as_float32(row_format: RowFormat, dtype: torch.dtype) -> None:
    values = torch.randn(30, 12, generator=torch.Generator().manual_seed(5)).to(dtype)
    assert torch.equal(pack_rows(values, row_format).data, pack_rows(values.float(), row_format).data)


@pytest.mark.parametrize("row_format", FORMATS)
def test_the_size_of_a_chunk_changes_nothing(row_format: RowFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(101, 12, generator=torch.Generator().manual_seed(5))
    whole = pack_rows(values, row_format).data
    monkeypatch.setattr(packing_module, "CHUNK_ELEMENTS", 120)
    assert torch.equal(pack_rows(values, row_format).data, whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row_format", FORMATS)
def test_rows_that_are_not_finite_are_refused(
    row_format: RowFormat, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing_module, "CHUNK_ELEMENTS", 12)
    values = torch.zeros(30, 12)
    values[[4, 17], 3] = bad
    with pytest.raises(ValueError, match="values: expected finite numbers, got NaN or infinity in rows 4; repair"):
        pack_rows(values, row_format)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="in rows 4, 17; repair"):
        pack_rows(values, row_format)
    values[:] = bad
    with pytest.raises(ValueError, match="in rows 0, 1, 2, 3, 4 and 25 more;"):
        pack_rows(values, row_format)


BEYOND = {"minimum": (70_000.0, 80_000.0), "low": (-70_000.0, 0.0), "range": (0.0, 3e7)}


@pytest.mark.parametrize(
    ("row_format", "row"),
    [(RowFormat.INT4, row) for row in BEYOND.values()] + [(RowFormat.INT8, BEYOND["minimum"])],
    ids=[*BEYOND, "int8-minimum"],
)
def test_numbers_beyond_float16_are_refused(row_format: RowFormat, row: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=f"float16 .* {row_format} rows, got larger ones in rows 1; use dtype='fp8'"):
        pack_rows(torch.tensor([(1.0, 2.0), row]), row_format)
    assert torch.isfinite(unpack_rows(pack_rows(torch.tensor([row]), "fp8"))).all()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"values: expected a floating point tensor, got torch\.int64"):
        pack_rows(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"values: expected \[rows, D\] with D >= 1, got \(4,\)"):
        pack_rows(torch.zeros(4))
    with pytest.raises(ValueError, match=r"values: .*got \(4, 0\)"):
        pack_rows(torch.zeros(4, 0))
    with pytest.raises(ValueError, match="dtype: expected one of int4, int8, fp8, got 'int2'"):
        pack_rows(torch.zeros(2, 2), "int2")
    with pytest.raises(ValueError, match="ranges: expected one of min_max, search, got 'best'"):
        pack_rows(torch.zeros(2, 2), ranges="best")
    with pytest.raises(ValueError, match="ranges: expected 'min_max' for fp8"):
        pack_rows(torch.zeros(2, 2), "fp8", ranges="search")


def test_packed_rows_check_their_bytes() -> None:
    data = torch.zeros(3, 9, dtype=torch.uint8)
    assert PackedRows(data, 10, "int4").num_rows == 3  # type: ignore[arg-type]
    assert PackedRows(data, 9).format is RowFormat.INT4
    with pytest.raises(ValueError, match=r"data: expected \[rows, 10\] for int4 rows of 11 elements, got \(3, 9\)"):
        PackedRows(data, 11)
    with pytest.raises(TypeError, match=r"data: expected a uint8 tensor .* got torch\.float32"):
        PackedRows(data.float(), 10)
    with pytest.raises(ValueError, match="dim: expected an int >= 1, got 0"):
        PackedRows(data, 0)
    with pytest.raises(ValueError, match="data: expected contiguous rows"):
        PackedRows(torch.zeros(3, 18, dtype=torch.uint8)[:, ::2], 10)


def squared_error(values: Tensor, row_format: RowFormat, ranges: RowRange) -> Tensor:
    return (unpack_rows(pack_rows(values, row_format, ranges=ranges)) - values).double().square().sum(1)


@pytest.mark.parametrize("name", CASES)
def test_a_searched_range_is_never_worse(name: str) -> None:
    values = CASES[name]
    plain, searched = (squared_error(values, RowFormat.INT4, choice) for choice in RowRange)
    # The two sums of one and the same row may differ in their last bits.
    assert bool((searched <= plain * (1 + 1e-5)).all())


def test_a_searched_range_is_better_on_bell_shaped_rows() -> None:
    values = torch.randn(500, 128, generator=torch.Generator().manual_seed(0))
    plain, searched = (squared_error(values, RowFormat.INT4, choice).sum() for choice in RowRange)
    assert searched < 0.9 * plain


def test_a_searched_range_comes_near_the_best_of_a_fine_grid() -> None:
    values = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    low, high = values.aminmax(dim=1, keepdim=True)
    best = torch.full((40,), torch.inf, dtype=torch.float64)
    for i in range(40):
        for j in range(40):
            bias = (low + (high - low) * i / 80).half().float()
            scale = ((high - (high - low) * j / 80 - bias) / 15).half().float()
            codes = ((values - bias) / scale).round().clamp(0, 15)
            best = torch.minimum(best, (codes * scale + bias - values).double().square().sum(1))
    searched = squared_error(values, RowFormat.INT4, RowRange.SEARCH)
    assert float(searched.sum()) < 1.03 * float(best.sum())
