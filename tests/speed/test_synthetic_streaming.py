"""The synthetic streaming experiment at a size of seconds: the data's laws, and that all sides run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import synthetic_streaming as streaming
from benchmarks.streaming_sides import MODELS, PointwiseAttention, Side, SoftmaxAttention
from benchmarks.streaming_world import World, batches, counting_hits, make_records
from hstu_kernels import AttentionMask, JaggedLayout, hstu_attention

CPU = torch.device("cpu")


def make(world: World, first: int, count: int) -> torch.Tensor:
    return make_records(world, first, count, torch.Generator().manual_seed(0), CPU)


def test_items_appear_over_time() -> None:
    world = World(items=1000, categories=10, records=1000, length=32)
    early, late = make(world, 0, 100), make(world, 900, 100)
    assert early.shape == (100, 32)
    # Of 100 items of a category, 40 exist at first and 46 after a tenth of the records.
    places = (early - 1) % 100
    assert int(places.max()) < 46 and int((places < 40).all(1).sum()) > 10
    assert int(((late - 1) % 100).max()) >= 94
    assert int(early.min()) >= 1 and int(late.max()) <= 1000


def test_a_record_has_few_categories_and_prefers_frequent_ones() -> None:
    world = World(items=1000, categories=10, records=4000, length=64)
    categories = (make(world, 0, 4000) - 1) // 100
    kinds = torch.tensor([row.unique().numel() for row in categories])
    assert (int(kinds.min()), int(kinds.max())) == (1, 5)
    # With alpha near 1 the first categories stay: one of them holds most of a record.
    sticky = World(items=1000, categories=10, records=4000, length=64, largest_alpha=1.0)
    shares = [
        torch.nn.functional.one_hot((make(w, 0, 2000) - 1) // 100, 10).sum(1).amax(1).double().mean()
        for w in (world, sticky)
    ]
    assert float(shares[1]) > float(shares[0]) + 3


def test_the_next_category_follows_the_rule() -> None:
    # alpha 1: the second item is of the first one's category with probability 1/2 + 1/2 * its prior, and the mean of a
    # squared share of a flat prior over m categories is 2 / (m * (m + 1)), taken m times.
    world = World(items=100, categories=10, records=40_000, length=2, largest_alpha=1.0)
    categories = (make(world, 0, 40_000) - 1) // 10
    again = (categories[:, 0] == categories[:, 1]).double().mean()
    expected = 0.5 + 0.5 * sum(2 / (m + 1) for m in range(1, 6)) / 5
    assert abs(float(again) - expected) < 4 * (expected * (1 - expected) / 40_000) ** 0.5


def test_batches_are_the_records_in_order() -> None:
    world = World(items=100, categories=10, records=50, length=4)
    made = list(batches(world, 3, 50, 8, torch.Generator().manual_seed(0), CPU))
    assert [first for first, _ in made] == [3, 11, 19, 27, 35, 43]
    assert [len(part) for _, part in made] == [8, 8, 8, 8, 8, 7]
    assert torch.equal(torch.cat([part for _, part in made]), make(world, 3, 47))


def test_counting_names_items_of_the_most_frequent_category() -> None:
    world = World(items=40, categories=4, records=11, length=5)
    # Categories 0 1 1 2 1: at place 2 both have been seen once and the lower one is named, behind it category 1 leads.
    records = torch.tensor([[1, 11, 12, 21, 13]])
    # At the last record all ten items of a category exist, at the first one four.
    assert counting_hits(world, records, 10, 2, 4).tolist() == [[0.0, 0.0, 0.4]]
    assert counting_hits(world, records, 0, 4, 3).tolist() == [[0.75]]
    assert counting_hits(world, records, 0, 4, 5).tolist() == [[1.0]]


def test_pointwise_attention_is_ours() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(15, 2, 4, dtype=torch.float64) for _ in range(3))
    layout = JaggedLayout.from_lengths(torch.full((3,), 5))
    expected = hstu_attention(q, k, v, layout, AttentionMask(), alpha=0.7, scale=0.2, backend="reference")
    assert torch.allclose(PointwiseAttention(0.7, 0.2, 5)(q, k, v), expected, rtol=0, atol=1e-12)


def test_softmax_attention_is_causal_softmax() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(10, 2, 4, dtype=torch.float64) for _ in range(3))
    got = SoftmaxAttention(0.7, 5)(q, k, v)
    for record in range(2):
        for i in range(5):
            for head in range(2):
                seen = range(record * 5, record * 5 + i + 1)
                logits = torch.stack([0.7 * q[record * 5 + i, head] @ k[j, head] for j in seen])
                expected = logits.softmax(0) @ v[list(seen), head]
                assert torch.allclose(got[record * 5 + i, head], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_no_side_sees_the_future(name: str) -> None:
    torch.manual_seed(0)
    world = World(items=100, categories=10, length=8)
    side = Side(name, world, dim=8, layers=2, heads=2, dropout=0.0, norm_eps=1e-10).eval()
    records = torch.randint(1, 101, (3, 8))
    changed = records.clone()
    changed[:, 5] = changed[:, 5] % 100 + 1
    before, after = side(side.items(records)), side(side.items(changed))
    assert torch.allclose(before[:, :5], after[:, :5], rtol=0, atol=1e-6)
    assert float((before[:, 5:] - after[:, 5:]).detach().abs().amax(-1).min()) > 0


def test_ranks_count_ties_against_the_side() -> None:
    table = torch.tensor([[3.0], [1.0], [2.0], [2.0]])
    users = torch.tensor([[1.0], [1.0], [1.0], [float("nan")]])
    assert streaming.ranks_of(users, table, torch.tensor([1, 3, 2, 1])).tolist() == [1, 3, 4, 5]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_command(tmp_path: Path, jobs: str) -> None:
    path = tmp_path / "streaming.json"
    words = ["--records", "300", "--records", "200", "--records", "400", "--items", "100", "--length", "12"]
    words += ["--learning-rate", "1e-9", "--learning-rate", "1e-2", "--tuning-records", "300", "--jobs", jobs]
    words += [
        "--batch-size",
        "16",
        "--dim",
        "8",
        "--seed",
        "1",
        "--seed",
        "2",
        "--device",
        "cpu",
        "--output",
        str(path),
    ]
    done = CliRunner().invoke(streaming.main, words)
    assert done.exit_code == 0, done.output
    report = json.loads(path.read_text(encoding="utf-8"))
    assert [run["model"] for run in report["runs"]] == [*MODELS] * 6
    assert [run["records"] for run in report["runs"]] == [300] * 6 + [200] * 6 + [400] * 6
    # A length beyond the longest that rates are tried on takes what was found there.
    assert [(run["model"], run["records"]) for run in report["tuning"]] == [
        (m, records) for records in (300, 200) for _ in range(2) for m in MODELS
    ]
    assert [(size["records"], size["tuning_records"]) for size in report["sizes"]] == [
        (200, 200),
        (300, 300),
        (400, 300),
    ]
    for size in report["sizes"]:
        for name, rate in size["learning_rates"].items():
            tried = [t for t in report["tuning"] if (t["model"], t["records"]) == (name, size["tuning_records"])]
            assert rate == max(tried, key=lambda run: run["hr@50"])["learning_rate"]
            runs = [run for run in report["runs"] if (run["model"], run["records"]) == (name, size["records"])]
            assert {run["learning_rate"] for run in runs} == {rate}
    for size in report["sizes"]:
        runs = [run for run in report["runs"] if run["records"] == size["records"]]
        of = {m: [run["hr@50"] for run in runs if run["model"] == m] for m in MODELS}
        assert size["models"]["hstu"]["hr@50"] == pytest.approx(sum(of["hstu"]) / 2)
        gap = next(gap for gap in size["gaps"] if gap["of"] == "hstu")
        assert gap["over"] == "hstu-softmax"
        assert gap["hr@50"]["least"] == min(a - b for a, b in zip(of["hstu"], of["hstu-softmax"], strict=True))
    for run in report["runs"]:
        assert 0 <= run["hr@10"] <= run["hr@50"] <= 1
        assert run["last_loss"] > 0
    assert "records" not in report["world"] and report["options"]["negatives"] == 256
    assert len([line for line in done.output.splitlines() if line.startswith("| 300 |")]) == 4
