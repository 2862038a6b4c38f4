"""README tables of cached scoring, cost, streaming and load balance, from small records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import balance_quality, cost_report, mfalcon, synthetic_streaming, update_readme
from benchmarks.ledger import append
from hstu_plugin.adapters.ranking import report
from hstu_plugin.records import write_json

ROOT = Path(__file__).parents[1]
WHERE = {"taken_at": "now", "commit": "0123456789ab", "device": "a GPU", "torch": "2.11", "triton": "3.6"}


def block(name: str) -> str:
    return f"<!-- results:{name} begin -->\n<!-- results:{name} end -->\n"


def table(name: str, root: Path) -> list[str]:
    return update_readme.updated(block(name), root).splitlines()[1:-1]


@pytest.mark.parametrize("name", ["mfalcon", "cost", "streaming", "balance"])
def test_what_is_not_recorded_leaves_no_table(name: str, tmp_path: Path) -> None:
    assert table(name, tmp_path) == []


def test_cached_scoring(tmp_path: Path) -> None:
    row = WHERE | {"model": "hstu", "layers": 8, "dim": 512, "dtype": "bfloat16", "history": 1024, "way": "graphs"}
    names = ("candidates", "transfers", "p50_ms", "p99_ms", "candidates_per_s", "samples")
    rows = [
        row | dict(zip(names, values, strict=True))
        for values in [
            (256, False, 9.0, 18.0, 1.0, 5),
            (256, False, 0.5, 1.0, 512_000.0, 140),
            (1024, False, 0.8, 1.6, 1_280_000.0, 11),
            (256, True, 0.75, 1.5, 341_333.0, 92),
        ]
    ]
    append(tmp_path / "benchmarks/results/mfalcon.csv", mfalcon.COLUMNS, rows)
    lines = table("mfalcon", tmp_path)
    # The newest row counts; what was not measured is a dash.
    assert "| 1024 | 256 | - | - | - | 512 k (0.50 / 1.00) |" in lines
    assert "| 1024 | 1024 | - | - | - | 1.28 M (0.80 / 1.60) |" in lines
    assert "| 1024 | 256 | - | - | - | 341 k (0.75 / 1.50) |" in lines
    assert len([line for line in lines if "a GPU, torch 2.11, commit 0123456; 8 layers, d 512" in line]) == 2
    assert len([line for line in lines if "; 11 to 140 requests a cell" in line]) == 1
    assert len([line for line in lines if "; 92 to 92 requests a cell" in line]) == 1


def test_cost(tmp_path: Path) -> None:
    row = WHERE | {"tokens": 1, "phase": "scoring", "events": 16384, "candidates": 1024, "layers": 18, "dim": 512}
    row |= {"heads": 4, "dtype": "bfloat16", "histories": 1, "window": 256, "tail": 256, "truncate_after": 3}
    rows = [row | {"model": "hstu", "gflops": 100, "ms": 40}, row | {"model": "ultra", "gflops": 5, "ms": 4}]
    rows = [r | {"truncate_to": 512} for r in rows]
    append(tmp_path / "benchmarks/results/cost.csv", cost_report.COLUMNS, rows)
    lines = table("cost", tmp_path)
    assert "| ULTRA-HSTU | 1 | 5 | 4.00 |  | -95.0 % |  | 10.00 |  |" in lines
    assert lines[-1] == "a GPU, torch 2.11, commit 0123456, Triton 3.6."


def test_streaming(tmp_path: Path) -> None:
    values = {"transformer": 0.1, "hstu-softmax": 0.2, "hstu": 0.3}
    runs = [
        {"model": m, "seed": seed, "hr@10": v, "hr@50": v + seed / 100, "counting@10": 0.4, "counting@50": 0.5}
        for m, v in values.items()
        for seed in (1, 2)
    ]
    about = {"records": 50_000, "tuning_records": 25_000, "learning_rates": dict.fromkeys(values, 0.001)}
    sizes = [about | synthetic_streaming.summarise(runs, tuple(values))]
    record = WHERE | {"runs": runs, "sizes": sizes}
    write_json(tmp_path / "benchmarks/results/synthetic-streaming.json", record)
    lines = table("streaming", tmp_path)
    assert "| 50,000 | hstu | 0.001 | 0.3000 ± 0.0000 | 0.3150 ± 0.0071 | +46.5% |" in lines
    assert "| 50,000 | counting |  | 0.4000 | 0.5000 | |" in lines
    assert lines[-1] == (
        "The order transformer < hstu-softmax < hstu holds with every seed for HR@50 at 50,000 records, "
        "for HR@10 at 50,000 records. "
        "2 seeds; rates tried on streams of at most 25,000 records. a GPU, torch 2.11, commit 0123456."
    )
    sizes[0]["gaps"][0]["hr@50"]["least"] = 0.0  # type: ignore[index]
    write_json(tmp_path / "benchmarks/results/synthetic-streaming.json", record)
    assert "for HR@50 nowhere, for HR@10 at 50,000 records. 2 seeds" in table("streaming", tmp_path)[-1]
    assert sizes[0]["gaps"][1]["hr@50"]["least"] > 0.0999  # type: ignore[index]


def test_balance(tmp_path: Path) -> None:
    runs = [
        WHERE
        | {
            "settings": {"recipe": "r", "ranks": 8, "alpha": 1.7, "way": "balanced", "seed": seed},
            "epochs": 3,
            "test": {"hit@10": 0.25, "ndcg@10": 0.125 * seed},
            "loads": {"mean": 1.01, "p95": 1.02, "worst": 1.03, "mean_load": 5.0, "events_kept": 0.75},
        }
        for seed in (1, 2)
    ]
    record = {"ways": {"balanced": balance_quality.group(runs)}, "runs": runs}
    write_json(tmp_path / "benchmarks/results/balance-quality.json", record)
    lines = table("balance", tmp_path)
    assert "| balanced | 2 | 0.2500 ± 0.0000 | 0.1875 ± 0.0884 | 1.010 | 1.030 | 0.750 |" in lines
    assert lines[-1].startswith("Recipe r, 3 epochs, 8 simulated ranks, alpha 1.7. a GPU")


def test_the_ablation_in_the_documentation_is_the_recorded_one() -> None:
    record = json.loads((ROOT / "benchmarks/results/kuairand-ablation.json").read_text(encoding="utf-8"))
    assert report.comparison_markdown(record) in (ROOT / "docs/ranking.md").read_text(encoding="utf-8")
