"""Our rows in FBGEMM's lookup and back, and quantised collections in place of full-precision ones."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fbgemm_gpu", reason="fbgemm-gpu is not installed; `make install-torchrec` adds it")
torchrec = pytest.importorskip("torchrec", reason="torchrec is not installed; `make install-torchrec` adds it")

from torch.ao.quantization import PlaceholderObserver, QConfig  # noqa: E402
from torchrec.distributed.global_settings import get_propogate_device, set_propogate_device  # noqa: E402
from torchrec.distributed.quant_embedding import ShardedQuantEmbeddingCollection  # noqa: E402
from torchrec.modules.embedding_configs import EmbeddingConfig  # noqa: E402
from torchrec.modules.embedding_modules import EmbeddingCollection  # noqa: E402
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection  # noqa: E402
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor  # noqa: E402

from hstu_kernels.int4 import RowFormat, RowRange, pack_rows, unpack_rows  # noqa: E402
from hstu_plugin.adapters.torchrec.quant_sharding import shard_quantized  # noqa: E402
from hstu_plugin.adapters.torchrec.quantize import (  # noqa: E402
    from_tbe,
    from_tbe_rows,
    quantize_embeddings,
    tables_of_collection,
    to_tbe,
    to_tbe_rows,
)
from hstu_plugin.quantize import QuantizeConfig, count_accesses, quantize  # noqa: E402

from .training import ROOT, environment  # noqa: E402

INTEGER = [RowFormat.INT4, RowFormat.INT8]
WEIGHT_TYPES = {RowFormat.INT4: torch.quint4x2, RowFormat.INT8: torch.qint8}


def values(rows: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("alignment", [1, 4, 16])
@pytest.mark.parametrize("row_format", INTEGER)
@pytest.mark.parametrize("dim", [2, 16, 24, 50])
def test_rows_there_and_back(row_format: RowFormat, dim: int, alignment: int) -> None:
    packed = pack_rows(values(7, dim), row_format)
    rows = to_tbe_rows(packed, row_alignment=alignment)
    assert rows.shape[1] % alignment == 0
    assert rows.shape[1] - row_format.row_bytes(dim) in range(alignment)
    back = from_tbe_rows(rows, dim, row_format)
    assert torch.equal(back.data, packed.data)


@pytest.mark.parametrize("row_format", INTEGER)
@pytest.mark.parametrize("ranges", list(RowRange))
def test_fbgemm_looks_up_our_numbers(row_format: RowFormat, ranges: RowRange) -> None:
    tables = {
        name: pack_rows(values(rows, 24, rows), row_format, ranges=ranges) for name, rows in (("a", 40), ("b", 9))
    }
    lookup = to_tbe(tables)
    ids = torch.tensor([39, 0, 7, 7, 8, 0, 3], dtype=torch.int32)
    # One bag for each id: four of the first table, three of the second.
    out = lookup(ids, torch.tensor([0, 4, 7], dtype=torch.int32))
    expected = torch.cat([unpack_rows(tables["a"])[ids[:4]], unpack_rows(tables["b"])[ids[4:]]])
    assert torch.equal(out, expected)


@pytest.mark.parametrize("row_format", INTEGER)
def test_the_memory_of_fbgemm_is_what_we_write(row_format: RowFormat) -> None:
    packed = pack_rows(values(11, 24), row_format)
    lookup = to_tbe({"t": packed})
    (rows, _), *rest = lookup.split_embedding_weights(split_scale_shifts=False)
    assert not rest
    assert torch.equal(rows, to_tbe_rows(packed))
    assert torch.equal(from_tbe(lookup)["t"].data, packed.data)


def test_what_fbgemm_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype: expected int4 or int8, .* got fp8"):
        to_tbe_rows(pack_rows(values(3, 8), "fp8"))
    with pytest.raises(ValueError, match="dim: expected an even width for FBGEMM's int4 rows, got 7; use int8"):
        to_tbe({"t": pack_rows(values(3, 7))})
    with pytest.raises(ValueError, match=r"rows: expected uint8 \[rows, 12 or more\] .* got \(3, 8\)"):
        from_tbe_rows(torch.zeros(3, 8, dtype=torch.uint8), 16)
    with pytest.raises(ValueError, match="tables: expected tables on one device, got no table"):
        to_tbe({})


class Model(nn.Module):
    """Two tables of one width behind three features."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.embeddings = EmbeddingCollection(
            tables=[
                EmbeddingConfig(name="item", embedding_dim=dim, num_embeddings=50, feature_names=["seen", "offered"]),
                EmbeddingConfig(name="user", embedding_dim=dim, num_embeddings=20, feature_names=["user"]),
            ]
        )
        self.head = nn.Linear(dim, 3)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        found = self.embeddings(features)
        out: Tensor = self.head(torch.cat([found[key].values() for key in ("seen", "offered", "user")]))
        return out


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


FEATURES = KeyedJaggedTensor(
    keys=["seen", "offered", "user"],
    values=torch.tensor([1, 2, 49, 2, 7, 0, 19]),
    lengths=torch.tensor([2, 1, 0, 2, 1, 1]),
)


def numbers(model: nn.Module) -> Any:
    return {key: jagged.values() for key, jagged in model.embeddings(FEATURES).items()}  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("row_format", INTEGER)
def test_a_collection_is_swapped_for_torchrecs_own(model: Model, row_format: RowFormat) -> None:
    plain = copy.deepcopy(model)
    weights = {name: table.weight.detach() for name, table in plain.embeddings.embeddings.items()}
    result = quantize_embeddings(model, row_format, evaluate=lambda m: {"first": m(FEATURES)[0, 0].item()})
    assert result.module is model
    assert isinstance(model.embeddings, QuantEmbeddingCollection)
    theirs = plain.embeddings
    theirs.qconfig = QConfig(
        activation=PlaceholderObserver.with_args(dtype=torch.float32),
        weight=PlaceholderObserver.with_args(dtype=WEIGHT_TYPES[row_format]),
    )
    plain.embeddings = QuantEmbeddingCollection.from_float(theirs)
    expected = numbers(plain)
    for key, got in numbers(model).items():
        assert torch.equal(got, expected[key]), key
    tables = tables_of_collection(model.embeddings)
    for name, table in tables_of_collection(plain.embeddings).items():
        assert torch.equal(table.data, tables[name].data)
        assert torch.equal(table.data, pack_rows(weights[name], row_format).data)
    report = result.report
    assert [table.name for table in report.tables] == ["embeddings.embeddings.item", "embeddings.embeddings.user"]
    assert report.bytes_before == 70 * 24 * 4
    assert report.metrics_before["first"] != report.metrics_after["first"]


def test_searched_ranges_reach_fbgemm(model: Model) -> None:
    weight = model.embeddings.embeddings["item"].weight.detach().clone()
    with count_accesses(model) as counts:
        model(FEATURES)
    assert counts["embeddings.embeddings.item"].sum() == 5
    result = quantize_embeddings(model, config=QuantizeConfig(ranges=RowRange.SEARCH), frequencies=counts)
    searched = pack_rows(weight, ranges="search")
    assert torch.equal(tables_of_collection(model.embeddings)["item"].data, searched.data)  # type: ignore[arg-type]
    assert torch.equal(numbers(model)["seen"], unpack_rows(searched)[[1, 2, 49]])
    assert result.report.tables[0].weighted_sqnr_db is not None


def test_plain_quantisation_serves_a_collection_as_well(model: Model) -> None:
    weight = model.embeddings.embeddings["item"].weight.detach().clone()
    names = [table.name for table in quantize(model, "fp8").report.tables]
    assert names == ["embeddings.embeddings.item", "embeddings.embeddings.user"]
    assert torch.equal(numbers(model)["seen"], unpack_rows(pack_rows(weight, "fp8"))[[1, 2, 49]])


def test_a_collection_alone_is_returned() -> None:
    result = quantize_embeddings(Model().embeddings)
    assert isinstance(result.module, QuantEmbeddingCollection)
    assert [table.name for table in result.report.tables] == ["embeddings.item", "embeddings.user"]


def test_half_precision_rows(model: Model) -> None:
    quantize_embeddings(model, output_dtype=torch.float16)
    assert numbers(model)["user"].dtype == torch.float16


def test_what_cannot_be_quantised_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="model: expected an EmbeddingCollection, found none"):
        quantize_embeddings(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match=r"config: .* 'embeddings.embeddings.user' is not among tables: \*item"):
        quantize_embeddings(model, config=QuantizeConfig(tables=("*item",)))
    with pytest.raises(ValueError, match=r"table 'embeddings.embeddings.item': dtype: expected int4 or int8"):
        quantize_embeddings(model, "fp8")
    with pytest.raises(ValueError, match=r"table 'embeddings.embeddings.item': dim: expected an even width"):
        quantize_embeddings(Model(dim=7))
    with torch.no_grad():
        model.embeddings.embeddings["user"].weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"table 'embeddings.embeddings.user': values: expected finite"):
        quantize_embeddings(model)
    assert isinstance(model.embeddings, EmbeddingCollection)


def test_sharded_tables_over_two_processes(tmp_path: Path) -> None:
    outs = [tmp_path / f"rank-{rank}.json" for rank in range(2)]
    module = "tests.adapters.torchrec_door.quantize_ranks"
    running = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), "2", str(tmp_path / "store"), str(out)],
            cwd=ROOT,
            env=environment() | {"LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    for process in running:
        output = process.communicate(timeout=200)[0]
        assert process.returncode == 0, output[-3000:]
    for out in outs:
        found = json.loads(out.read_text(encoding="utf-8"))
        assert found["sharded"] == ["action", "item", "user"]
        for row_format in INTEGER:
            same = found[row_format]
            assert same["tables"] == ["action", "item", "user"]
            assert all(same[part] for part in ("bytes", "scores", "report", "after", "changed")), same
            assert same["before"] < 1e-6
        assert "values: expected finite" in found["refused"]


SHARDINGS = ["row_wise", "table_wise", {"item": "row_wise", "user": "table_wise"}]


@pytest.fixture
def torchrecs_device() -> Iterator[None]:
    before = get_propogate_device()
    yield
    set_propogate_device(before)


@pytest.mark.usefixtures("torchrecs_device")
@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("sharding", SHARDINGS, ids=str)
@pytest.mark.parametrize("row_format", INTEGER)
def test_quantised_tables_over_devices(model: Model, row_format: RowFormat, sharding: Any, devices: int) -> None:
    quantize_embeddings(model, row_format)
    expected = {key: value.clone() for key, value in numbers(model).items()}
    assert shard_quantized(model, num_devices=devices, device="cpu", sharding=sharding) is model
    assert isinstance(model.embeddings, ShardedQuantEmbeddingCollection)
    for key, value in numbers(model).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that this PyTorch can use")
@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
def test_quantised_tables_over_gpus(model: Model, sharding: str) -> None:
    quantize_embeddings(model.cuda())
    expected = {key: jagged.values() for key, jagged in model.embeddings(FEATURES.to("cuda")).items()}
    shard_quantized(model, num_devices=torch.cuda.device_count(), sharding=sharding)
    for key, jagged in model.embeddings(FEATURES.to("cuda")).items():
        assert torch.equal(jagged.values(), expected[key]), key


def test_what_cannot_be_spread_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match=r"model: expected a module that holds quantised .* got none"):
        shard_quantized(model, num_devices=2, device="cpu")
    quantize_embeddings(model)
    with pytest.raises(ValueError, match=r"model: expected a module that holds quantised .* got one alone"):
        shard_quantized(model.embeddings, num_devices=2, device="cpu")
    for wrong in ("column_wise", {"item": "row_wise"}):
        with pytest.raises(ValueError, match="sharding: expected one of table_wise, row_wise on cpu for each of item"):
            shard_quantized(model, num_devices=2, device="cpu", sharding=wrong)
    with pytest.raises(ValueError, match="sharding: expected one of cpu and cuda devices on meta"):
        shard_quantized(model, num_devices=2, device="meta")
