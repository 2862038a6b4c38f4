"""Tables on disk: the way there and back, and files that cannot be used."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from hstu_kernels.int4 import RowFormat, pack_rows
from hstu_plugin.quantize import quantize
from hstu_plugin.quantized_embedding import QuantizedEmbedding, QuantizedLinear
from hstu_plugin.quantized_files import (
    FILE_FORMAT,
    TableFileError,
    apply_tables,
    load_tables,
    quantized_tables,
    save_tables,
)


def make() -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict({"item": nn.Embedding(9, 6), "users": nn.Embedding(5, 3), "out": nn.Linear(6, 9)})
    model["out"].weight = model["item"].weight
    return model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tables.safetensors"
    save_tables(path, quantized_tables(quantize(make()).module), notes={"checkpoint": "a.pth"})
    return path


@pytest.mark.parametrize("row_format", list(RowFormat))
def test_there_and_back(tmp_path: Path, row_format: RowFormat) -> None:
    quantised, path = quantize(make(), row_format).module, tmp_path / "t.safetensors"
    tables = quantized_tables(quantised)
    assert tables.keys() == {"item", "users"}
    save_tables(path, tables, notes={"from": "here"})
    loaded = load_tables(path)
    assert loaded.notes == {"from": "here"}
    again = apply_tables(make(), loaded.tables)
    assert not again.training
    ids, rows = torch.arange(9), torch.randn(2, 6)
    assert torch.equal(again["item"](ids), quantised["item"](ids))  # type: ignore[index]
    assert torch.equal(again["out"](rows), quantised["out"](rows))  # type: ignore[index]
    assert isinstance(again["item"], QuantizedEmbedding)  # type: ignore[index]
    assert isinstance(again["out"], QuantizedLinear)  # type: ignore[index]
    assert again["item"].format is row_format  # type: ignore[index]


def test_the_state_of_a_quantised_model_can_be_saved_as_any_other() -> None:
    first, second = quantize(make()).module, quantize(make()).module
    with torch.no_grad():
        second["item"].packed.zero_()  # type: ignore[index]
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(first["item"].packed, second["item"].packed)  # type: ignore[index]


def test_writing_replaces_a_file_as_a_whole(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("hstu_plugin.quantized_files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_tables(file, {"other": pack_rows(torch.ones(2, 2))})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_nothing_to_save_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tables: expected at least one table, got none"):
        save_tables(tmp_path / "t.safetensors", {})


def rewritten(file: Path, **changes: str) -> Path:
    """The same tensors with other metadata."""
    with safe_open(str(file), framework="pt") as opened:
        metadata, tensors = dict(opened.metadata()), {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
    save_file(tensors, str(file), {**metadata, **changes})
    return file


def test_files_of_another_kind_or_version_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(TableFileError, match=r"no.safetensors': there is no such file"):
        load_tables(tmp_path / "no.safetensors")
    with pytest.raises(TableFileError, match=f"expected a file of the format '{FILE_FORMAT}', got 'else'"):
        load_tables(rewritten(file, format="else"))
    for version in ("2", "", "x"):
        with pytest.raises(TableFileError, match=f"expected format version 1 or lower, got '{version}'; update"):
            load_tables(rewritten(file, format=FILE_FORMAT, format_version=version))
    plain = tmp_path / "plain.safetensors"
    save_file({"x": torch.zeros(2)}, str(plain))
    with pytest.raises(TableFileError, match="got None; hstu-quantize writes such files"):
        load_tables(plain)


def test_damaged_files_are_refused(file: Path) -> None:
    whole = file.read_bytes()
    for damaged in (whole[:-3], whole[:40], b"", b"PK" + whole):
        file.write_bytes(damaged)
        with pytest.raises(TableFileError, match=r"damaged, cut off or no safetensors file .*; write it again"):
            load_tables(file)


def described(**tables: dict[str, object]) -> str:
    return json.dumps(tables)


def test_tables_that_are_not_what_the_file_states_are_refused(file: Path) -> None:
    items = {"dtype": "int4", "rows": 9, "dim": 6}
    users = {"dtype": "int4", "rows": 5, "dim": 3}
    with pytest.raises(TableFileError, match="expected the tables item, found item, users"):
        load_tables(rewritten(file, tables=described(item=items)))
    with pytest.raises(TableFileError, match=r"table 'users': data: expected \[rows, 7\] for int8 rows of 3"):
        load_tables(rewritten(file, tables=described(item=items, users={**users, "dtype": "int8"})))
    with pytest.raises(TableFileError, match="table 'users': dtype: expected one of int4, int8, fp8, got 'int5'"):
        load_tables(rewritten(file, tables=described(item=items, users={**users, "dtype": "int5"})))
    with pytest.raises(TableFileError, match="table 'item': expected 8 rows as stated, got 9"):
        load_tables(rewritten(file, tables=described(item={**items, "rows": 8}, users=users)))
    for broken in ("", "[]", "{}x", described(item={}, users=users)):
        with pytest.raises(TableFileError, match="the description of the tables is damaged"):
            load_tables(rewritten(file, tables=broken))


def test_tables_of_another_type_are_refused(tmp_path: Path, file: Path) -> None:
    with safe_open(str(file), framework="pt") as opened:
        metadata = opened.metadata()
    save_file({"item": torch.zeros(9, 7), "users": torch.zeros(5, 6)}, str(file), metadata)
    with pytest.raises(TableFileError, match=r"table 'item': data: expected a uint8 tensor .*got torch\.float32"):
        load_tables(file)


def test_tables_that_fit_no_place_are_refused(file: Path) -> None:
    tables = load_tables(file).tables
    with pytest.raises(ValueError, match=r"tables: expected names of embeddings of this model \(other\), got 'item'"):
        apply_tables(nn.ModuleDict({"other": nn.Embedding(9, 6)}), tables)
    grown = make()
    grown["item"] = nn.Embedding(10, 6)
    with pytest.raises(
        ValueError, match=r"tables\['item'\]: expected \(10, 6\) as the model's, got \(9, 6\); the data"
    ):
        apply_tables(grown, tables)
    assert isinstance(grown["users"], nn.Embedding)
