"""The synthetic streaming experiment at a size of seconds: the data's laws, and that all sides run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import synthetic_streaming as streaming

CPU = torch.device("cpu")


def make(world: streaming.World, first: int, count: int) -> torch.Tensor:
    return streaming.make_records(world, first, count, torch.Generator().manual_seed(0), CPU)


def test_items_appear_over_time() -> None:
    world = streaming.World(items=1000, categories=10, records=1000, length=32)
    early, late = make(world, 0, 100), make(world, 900, 100)
    assert early.shape == (100, 32)
    # Of 100 items of a category, 40 exist at first and 46 after a tenth of the records.
    places = (early - 1) % 100
    assert int(places.max()) < 46 and int((places < 40).all(1).sum()) > 10
    assert int(((late - 1) % 100).max()) >= 94
    assert int(early.min()) >= 1 and int(late.max()) <= 1000


def test_a_record_has_few_categories_and_prefers_frequent_ones() -> None:
    world = streaming.World(items=1000, categories=10, records=4000, length=64)
    categories = (make(world, 0, 4000) - 1) // 100
    kinds = torch.tensor([row.unique().numel() for row in categories])
    assert (int(kinds.min()), int(kinds.max())) == (1, 5)
    # With alpha near 1 the first categories stay: one of them holds most of a record.
    sticky = streaming.World(items=1000, categories=10, records=4000, length=64, largest_alpha=1.0)
    shares = [
        torch.nn.functional.one_hot((make(w, 0, 2000) - 1) // 100, 10).sum(1).amax(1).double().mean()
        for w in (world, sticky)
    ]
    assert float(shares[1]) > float(shares[0]) + 3


def test_softmax_attention_is_causal_softmax() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(10, 2, 4, dtype=torch.float64) for _ in range(3))
    table = torch.randn(9, dtype=torch.float64)
    got = streaming.SoftmaxAttention(table, 0.7, 5)(q, k, v)
    for record in range(2):
        for i in range(5):
            for head in range(2):
                seen = range(record * 5, record * 5 + i + 1)
                logits = torch.stack([0.7 * q[record * 5 + i, head] @ k[j, head] for j in seen])
                weights = (logits + table[torch.arange(i + 1) - i + 4]).softmax(0)
                expected = weights @ v[list(seen), head]
                assert torch.allclose(got[record * 5 + i, head], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", streaming.MODELS)
def test_no_side_sees_the_future(name: str) -> None:
    torch.manual_seed(0)
    world = streaming.World(items=100, categories=10, length=8)
    side = streaming.Side(name, world, dim=8, layers=2, heads=2, dropout=0.0).eval()
    records = torch.randint(1, 101, (3, 8))
    changed = records.clone()
    changed[:, 5] = changed[:, 5] % 100 + 1
    before, after = side(records), side(changed)
    assert torch.allclose(before[:, :5], after[:, :5], rtol=0, atol=1e-6)
    assert float((before[:, 5:] - after[:, 5:]).detach().abs().amax(-1).min()) > 0


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_command(tmp_path: Path, jobs: str) -> None:
    path = tmp_path / "streaming.json"
    words = ["--records", "200", "--items", "100", "--length", "12", "--dim", "8", "--batch-size", "16"]
    words += ["--learning-rate", "1e-9", "--learning-rate", "1e-2", "--tuning-records", "100", "--jobs", jobs]
    words += ["--seed", "1", "--seed", "2", "--device", "cpu", "--output", str(path)]
    done = CliRunner().invoke(streaming.main, words)
    assert done.exit_code == 0, done.output
    report = json.loads(path.read_text(encoding="utf-8"))
    assert [run["model"] for run in report["runs"]] == [*streaming.MODELS, *streaming.MODELS]
    assert {run["records"] for run in report["runs"]} == {200}
    assert [(run["model"], run["records"]) for run in report["tuning"]] == [(m, 100) for m in streaming.MODELS] * 2
    for name, rate in report["learning_rates"].items():
        tried = [run for run in report["tuning"] if run["model"] == name]
        assert rate == max(tried, key=lambda run: run["hr@50"])["learning_rate"]
        assert {run["learning_rate"] for run in report["runs"] if run["model"] == name} == {rate}
    assert set(report["summary"]) == set(streaming.MODELS)
    for run in report["runs"]:
        assert 0 <= run["hr@10"] <= run["hr@50"] <= 1
        assert run["last_loss"] > 0
    assert report["world"]["records"] == 200
