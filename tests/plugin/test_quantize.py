"""Quantising a model's tables: what is replaced, what stays, what the report says, and what is refused."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hstu_kernels import JaggedLayout
from hstu_kernels.int4 import RowFormat, RowRange, pack_rows, unpack_rows
from hstu_plugin import quantized_embedding
from hstu_plugin.config import HSTUConfig, RetrievalConfig, Similarity
from hstu_plugin.quantize import QuantizeConfig, count_accesses, quantize
from hstu_plugin.quantize_report import table_report
from hstu_plugin.quantized_embedding import QuantizedEmbedding, QuantizedLinear
from hstu_plugin.retrieval import HSTURetrieval
from hstu_plugin.sequence import JaggedSequence

FORMATS = list(RowFormat)


class Model(nn.Module):
    """Items looked up, positions added, all items scored by a tied output layer."""

    def __init__(self, items: int = 50, width: int = 16) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width, padding_idx=0)
        self.position_embedding = nn.Embedding(12, width)
        self.output = nn.Linear(width, items)
        self.output.weight = self.items.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.items(ids) + self.position_embedding(torch.arange(ids.shape[1]))
        scores: Tensor = self.output(x)
        return scores


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


IDS = torch.tensor([[1, 2, 3], [4, 0, 49]])


@pytest.mark.parametrize("row_format", FORMATS)
def test_a_model_computes_with_the_quantised_numbers(model: Model, row_format: RowFormat) -> None:
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.items.weight.copy_(unpack_rows(pack_rows(model.items.weight, row_format)))
    result = quantize(model, row_format)
    assert result.module is model
    assert not model.training
    torch.testing.assert_close(model(IDS), expected.eval()(IDS).detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(model.items(IDS), expected.items(IDS).detach())
    assert torch.equal(model.items.weight, expected.items.weight)


def test_a_tied_output_layer_keeps_no_second_table(model: Model) -> None:
    quantize(model)
    assert isinstance(model.items, QuantizedEmbedding)
    assert isinstance(model.output, QuantizedLinear)
    assert model.output.table is model.items
    assert model.output.bias is not None
    assert dict(model.named_parameters()).keys() == {"position_embedding.weight", "output.bias"}


def test_scores_do_not_depend_on_the_size_of_the_parts(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(model)
    whole = model(IDS)
    monkeypatch.setattr(quantized_embedding, "_CHUNK_ELEMENTS", 16 * 7)
    assert len(list(model.items.chunks())) == 8
    torch.testing.assert_close(model(IDS), whole, rtol=1e-6, atol=1e-6)


def test_a_table_at_two_places_stays_one() -> None:
    shared = nn.Embedding(20, 8)
    tied = nn.Embedding(20, 8)
    tied.weight = shared.weight
    model = nn.ModuleDict({"history": shared, "candidates": shared, "other": tied})
    report = quantize(model).report
    assert model["history"] is model["candidates"] is model["other"]
    assert [table.name for table in report.tables] == ["history"]


def test_a_table_alone_is_returned() -> None:
    table = nn.Embedding(20, 8)
    result = quantize(table, "int8")
    assert isinstance(result.module, QuantizedEmbedding)
    assert result.module(torch.tensor(3)).shape == (8,)
    assert "20, 8, int8" in repr(result.module)


def test_the_padding_row_stays_zero(model: Model) -> None:
    quantize(model)
    assert torch.equal(model.items(torch.tensor([0])), torch.zeros(1, 16))
    assert model.items.padding_idx == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_lookups_follow_casts_of_the_model(model: Model, dtype: torch.dtype) -> None:
    quantize(model)
    packed = model.items.packed.clone()
    cast = model.to(dtype)
    assert cast.items(IDS).dtype == cast.items.weight.dtype == dtype
    assert torch.equal(cast.items.packed, packed)
    assert cast(IDS).dtype == dtype


def test_the_retrieval_head_scores_a_quantised_table() -> None:
    torch.manual_seed(0)
    for similarity in Similarity:
        head = HSTURetrieval(HSTUConfig(embedding_dim=8, max_seq_len=8), RetrievalConfig(similarity=similarity)).eval()
        table = nn.Embedding(30, 8)
        quantised = quantize(table).module
        layout = JaggedLayout.from_lengths(torch.tensor([3, 0, 5]))
        ids = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])
        seq = JaggedSequence(quantised(ids), layout, torch.arange(8) * 1000)
        with torch.no_grad():
            users = head(seq)
            scores = head.scores(users, quantised)  # type: ignore[arg-type]
            dense = head.scores(users, quantised.weight)  # type: ignore[arg-type]
        torch.testing.assert_close(scores, dense, rtol=1e-6, atol=1e-6)
        assert torch.isneginf(scores[:, 0]).all()


def test_training_is_refused(model: Model) -> None:
    quantize(model)
    model.train()
    for use in (lambda: model.items(IDS), lambda: model.items.weight, lambda: model.output(torch.zeros(1, 16))):
        with pytest.raises(ValueError, match=r"module: expected a model in evaluation mode, .* call \.eval\(\)"):
            use()


def test_ids_outside_are_refused(model: Model) -> None:
    quantize(model)
    with pytest.raises(ValueError, match=r"ids: expected ids in \[0, 49\] for a table of 50 rows, got 50 to 50"):
        model.items(torch.tensor([50]))


def test_what_is_quantised_is_a_matter_of_names(model: Model) -> None:
    report = quantize(model).report
    assert [table.name for table in report.tables] == ["items"]
    assert report.kept == {"position_embedding": "skip: *position*"}
    torch.manual_seed(0)
    report = quantize(Model(), config=QuantizeConfig(tables=("pos*",), skip=())).report
    assert [table.name for table in report.tables] == ["position_embedding"]
    assert report.kept == {"items": "not among tables: pos*"}
    with pytest.raises(ValueError, match=r"expected an embedding table that matches .* found 'items' \(not among"):
        quantize(Model(), config=QuantizeConfig(tables=("user*",)))
    with pytest.raises(ValueError, match="found no embedding at all"):
        quantize(nn.Linear(2, 2))


def test_lookups_of_another_kind_are_left_alone() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return 2 * super().forward(ids)

    model = nn.ModuleDict({"plain": nn.Embedding(4, 2), "scaled": Scaled(4, 2), "bag": nn.EmbeddingBag(4, 2)})
    kept = quantize(model).report.kept
    assert kept == {"scaled": "Scaled has a lookup of its own", "bag": "pooled lookups are not served"}
    with pytest.raises(ValueError, match=r"expected embeddings without max_norm, got '' with 1.0"):
        quantize(nn.Embedding(4, 2, max_norm=1.0))


def test_a_weight_shared_with_something_else_is_refused() -> None:
    class Other(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

    table = nn.Embedding(4, 2)
    model = nn.ModuleDict({"table": table, "other": Other(table.weight)})
    with pytest.raises(ValueError, match=r"'other', a Other, holds it as well .* leave it out with skip"):
        quantize(model)
    assert model["table"] is table


def test_an_error_leaves_the_model_untouched(model: Model) -> None:
    model.extra = nn.Embedding(4, 2)
    with torch.no_grad():
        model.extra.weight[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"table 'extra': values: expected finite numbers, .* in rows 2"):
        quantize(model)
    assert isinstance(model.items, nn.Embedding)
    assert isinstance(model.output, nn.Linear)


def test_sizes_in_the_report() -> None:
    for width, ratio in ((128, 512 / 68), (512, 2048 / 260)):
        report = quantize(nn.Embedding(100, width)).report
        assert report.tables[0].ratio == pytest.approx(ratio)
        assert 7 <= report.tables[0].ratio <= 8
        assert (report.bytes_before, report.bytes_after) == (400 * width, 100 * (width // 2 + 4))


def test_ratios_and_worst_rows_by_hand() -> None:
    # Ranges of 255 and 510: scales of 1 and 2, and codes without any error.
    values = torch.tensor([[0.0, 255.0], [2.0, 2.0], [0.0, 510.0], [3.0, 258.0]])
    packed = pack_rows(values, "int8")
    damaged = packed.data.clone()
    damaged[3, 1], damaged[2, 1] = 128, 254
    packed = type(packed)(damaged, 2, packed.format)
    report = table_report("t", values, packed, ranges=RowRange.MIN_MAX, frequency=torch.tensor([1, 1, 0, 1]))
    errors = unpack_rows(packed).double() - values.double()
    assert [row.row for row in report.worst_rows] == [3, 2]
    assert [row.max_error for row in report.worst_rows] == [127.0, 2.0]
    assert report.worst_rows[1].sqnr_db == pytest.approx(20 * math.log10(510 / 2))
    assert report.sqnr_db == pytest.approx(10 * math.log10(float(values.square().sum() / errors.square().sum())))
    rows = torch.tensor([0, 1, 3])
    weighted = float(values[rows].square().sum() / errors[rows].square().sum())
    assert report.weighted_sqnr_db == pytest.approx(10 * math.log10(weighted))
    assert report.max_error == pytest.approx(float(errors.abs().max()))


def test_a_report_becomes_json(model: Model) -> None:
    with torch.no_grad():
        model.items.weight.fill_(0)
    report = quantize(model, evaluate=lambda _: {"hit@10": 0.5}).report
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["tables"][0]["sqnr_db"] is None
    assert plain["tables"][0]["format"] == "int4"
    assert plain["bytes_before"] == 50 * 16 * 4
    assert plain["metrics_after"] == {"hit@10": 0.5}


def test_metrics_before_and_after(model: Model) -> None:
    seen: list[Any] = []

    def evaluate(current: nn.Module) -> dict[str, float]:
        assert not current.training
        seen.append(type(current.items))
        return {"a": 2.0 if len(seen) == 1 else 1.5, "zero": 0.0}

    report = quantize(model, evaluate=evaluate).report
    assert seen == [nn.Embedding, QuantizedEmbedding]
    assert (report.metrics_before["a"], report.metrics_after["a"]) == (2.0, 1.5)
    changes = report.metric_changes()
    assert changes["a"] == -0.25
    assert math.isnan(changes["zero"])


def test_more_bits_and_a_search_lose_less(model: Model) -> None:
    found = {}
    for name, row_format, ranges in (
        ("int4", "int4", "min_max"),
        ("search", "int4", "search"),
        ("int8", "int8", "min_max"),
    ):
        report = quantize(copy.deepcopy(model), row_format, config=QuantizeConfig(ranges=RowRange(ranges))).report
        found[name] = report.tables[0].sqnr_db
    assert found["int4"] + 0.3 < found["search"] < found["int8"] - 20


def test_accesses_are_counted(model: Model) -> None:
    with count_accesses(model) as counts:
        model(IDS)
        model(torch.tensor([[1, 1]]))
    model(IDS)
    expected = torch.zeros(50, dtype=torch.int64)
    expected[[1, 2, 3, 4, 0, 49]] = torch.tensor([3, 1, 1, 1, 1, 1])
    assert torch.equal(counts["items"], expected)
    assert counts["position_embedding"].sum() == 5


def test_the_search_goes_to_the_rows_that_are_used(model: Model) -> None:
    counts = torch.zeros(50)
    counts[[7, 9, 11]] = torch.tensor([60.0, 35.0, 5.0])
    plain, searched = (pack_rows(model.items.weight, ranges=choice).data for choice in RowRange)
    without = quantize(copy.deepcopy(model), frequencies={"items": counts}).report.tables[0]
    config = QuantizeConfig(ranges=RowRange.SEARCH, search_coverage=0.95)
    report = quantize(model, config=config, frequencies={"items": counts}).report
    packed = model.items.packed
    assert torch.equal(packed[[7, 9]], searched[[7, 9]])
    others = [row for row in range(50) if row not in (7, 9)]
    assert torch.equal(packed[others], plain[others])
    assert not torch.equal(searched[11], plain[11])
    weighted = report.tables[0].weighted_sqnr_db
    assert weighted is not None
    assert without.weighted_sqnr_db is not None
    assert weighted > without.weighted_sqnr_db


def test_frequencies_that_fit_nothing_are_refused(model: Model) -> None:
    with pytest.raises(ValueError, match=r"frequencies\['items'\]: expected 50 counts >= 0, .* got \(49,\)"):
        quantize(model, frequencies={"items": torch.ones(49)})
    with pytest.raises(ValueError, match=r"frequencies\['items'\]: expected 50 counts >= 0"):
        quantize(model, frequencies={"items": -torch.ones(50)})
    with pytest.raises(ValueError, match="frequencies: expected counts for one of items, got them for item"):
        quantize(model, frequencies={"item": torch.ones(50)})


def test_the_configuration_is_checked() -> None:
    with pytest.raises(ValueError, match=r"search_coverage: expected a number in \(0, 1\], got 0"):
        QuantizeConfig(search_coverage=0)
    with pytest.raises(ValueError, match="tables: expected a sequence of patterns"):
        QuantizeConfig(tables="items")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ranges: expected one of"):
        QuantizeConfig(ranges="fine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype: expected one of int4, int8, fp8, got 'int3'"):
        quantize(nn.Embedding(2, 2), "int3")
