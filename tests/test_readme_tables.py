"""The tables of a README, made from recorded results."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import update_readme
from benchmarks.attention.measure import BACKWARD, CALL, COLUMNS, FORWARD
from hstu_plugin._versions import version_table
from hstu_plugin.adapters.quantized import RECORD_FORMAT
from hstu_plugin.adapters.recbole import report, settings

README = update_readme.ROOT / "README.md"


def block(name: str, content: str = "") -> str:
    return f"<!-- results:{name} begin -->\n{content}<!-- results:{name} end -->\n"


def comparison(ndcg: float = 0.125) -> dict[str, Any]:
    values = {"mean": {"ndcg@10": ndcg}, "std": {"ndcg@10": None}}
    return {
        "format": report.COMPARISON_FORMAT,
        "format_version": report.FORMAT_VERSION,
        "dataset": "tiny",
        "protocol": {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"}},
        "models": {"HSTU": {"seeds": [1], "test": values, "epochs": 3, "seconds_per_pass": 2.0}},
        "versions": {"torch": "2.13"},
        "machine": {"cpu": "a CPU", "threads": 2, "gpus": []},
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    report.write_json(tmp_path / "recbole_configs/results/tiny.json", comparison())
    report.write_json(tmp_path / "benchmarks/results/speed.json", comparison(0.25))
    return tmp_path


def test_blocks_are_replaced_and_the_rest_stays(root: Path) -> None:
    marked = [block("tiny", "stale row\n"), block("speed"), block("versions"), block("recipes")]
    text = "# Title\n\n" + "between\n".join(marked) + "the end"
    new = update_readme.updated(text, root)
    assert new.startswith("# Title\n\n<!-- results:tiny begin -->\n| model | seeds | NDCG@10 |")
    assert "| HSTU | 1 | 0.1250 | 3 | 2.0 |" in new
    assert "| HSTU | 1 | 0.2500 | 3 | 2.0 |" in new
    assert "stale row" not in new
    assert "between\n" in new
    assert new.endswith("<!-- results:recipes end -->\nthe end")
    for row in version_table():
        assert f"| {' | '.join(row.values())} |\n" in new
    for name, path in settings.recipes().items():
        assert f"| `{name}` | {settings.describe_recipe(path)} |\n" in new
    assert update_readme.updated(new, root) == new


@pytest.mark.parametrize(("std", "shown"), [(0.001, "**0.1250** ± 0.0010"), (None, "**0.1250**")])
def test_summary_puts_recorded_beside_published(root: Path, std: float | None, shown: str) -> None:
    recorded = comparison()
    recorded["models"]["HSTU"]["test"] = {
        part: dict.fromkeys(("hit@10", "ndcg@10"), value) for part, value in (("mean", 0.125), ("std", std))
    }
    report.write_json(root / "recbole_configs/results/tiny.json", recorded)
    published = {"tiny": {"title": "Tiny", "source": "a paper", "hit@10": 0.2, "ndcg@10": 0.1}}
    (root / "benchmarks/published.yaml").write_text(json.dumps(published))
    new = update_readme.updated(block("summary"), root)
    assert f"| Tiny | 1 | {shown} | 0.2000 | {shown} | 0.1000 | a paper |" in new
    assert "- `tiny`: 3 epochs; " in new


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no markers", "expected markers"),
        (
            block("other"),
            "results:other: expected one of versions, recipes, summary, passes, cpu-passes, attention, quantized, "
            "int4, mfalcon, cost, streaming, balance, distributed, speed, tiny",
        ),
        ("one\n<!-- results:tiny begin -->", "line 2: <!-- results:tiny begin --> has no partner"),
        ("<!-- results:tiny end -->", "results:tiny end --> has no partner"),
        ("<!-- results:tiny begin --><!-- results:speed end -->", "results:tiny begin --> has no partner"),
        (f"<!-- results:tiny begin -->{block('speed')}<!-- results:tiny end -->", "tiny begin --> has no partner"),
        (block("tiny") * 2, "results:tiny is marked twice"),
    ],
)
def test_markers_that_make_no_sense(root: Path, text: str, message: str) -> None:
    with pytest.raises(update_readme.MarkerError, match=message):
        update_readme.updated(text, root)


FACTS: dict[str, Any] = {
    "versions": {"torch": "2.13"},
    "commit": "0123456789",
    "machine": {"cpu": "a CPU", "threads": 2, "gpus": []},
}


def quantised(seed: int, before: float, after: float) -> dict[str, Any]:
    table = {"format": "int4", "ranges": "search"}
    metrics = {"hit@10": before, "mrr@10": 0.1, "click.ne": 2.0}
    return {
        "format": RECORD_FORMAT, "format_version": 1, "dataset": "tiny", "model": "HSTU", "seed": seed, "split": "test",
        "report": {
            "tables": [table], "bytes_before": 800, "bytes_after": 100,
            "metrics_before": metrics, "metrics_after": metrics | {"hit@10": after, "click.ne": 2.02},
        },
        **FACTS,
    }  # fmt: skip


def test_quantised_models_are_means_over_seeds(root: Path) -> None:
    with pytest.raises(ValueError, match=r"results:quantized: expected benchmarks/results/quantized-\*.json"):
        update_readme.updated(block("quantized"), root)
    for seed, before, after in ((1, 0.2, 0.19), (2, 0.4, 0.4)):
        report.write_json(root / f"benchmarks/results/quantized-tiny-{seed}.json", quantised(seed, before, after))
    new = update_readme.updated(block("quantized"), root)
    assert (
        "| tiny, HSTU | 2 | int4, searched ranges | 8.00x | HR@10 | 0.3000 | 0.2950 | -1.67% (-5.00% to +0.00%) |"
        in new
    )
    assert "| click NE | 2.0000 | 2.0200 | +1.00% (+1.00% to +1.00%) |" in new
    assert "MRR" not in new
    assert "- tiny, HSTU, int4, searched ranges: a CPU, torch 2.13, commit 0123456\n" in new
    report.write_json(root / "benchmarks/results/quantized-other.json", {"format": "other"})
    with pytest.raises(ValueError, match=r"quantized-other\.json: expected a file of format"):
        update_readme.updated(block("quantized"), root)


def test_speed_of_quantised_tables(root: Path) -> None:
    with pytest.raises(ValueError, match=r"results:int4: expected benchmarks/results/int4-gather.json or int4-host"):
        update_readme.updated(block("int4"), root)
    row = {"dim": 128, "ids": 1000, "table_rows": 50_000, "p50_ms": 0.5, "mb": 8.0}
    gather = {**row, "op": "gather", "way": "triton", "gb_per_s": 1500.0, "share_of_copy": 0.5}
    host = {**row, "op": "host", "transfer_ms": 0.25}
    hosted = [
        host | {"way": way, "layers": layers, "pipelined_ms": ms}
        for way, layers, ms in (
            ("mfalcon-int4-read", 8, 0.2), ("mfalcon-float16", 8, 0.6), ("mfalcon-int4", 8, 0.4), ("int4", 0, 0.1),
            ("mfalcon-int4", 2, 0.3),
        )
    ]  # fmt: skip
    for op, version, rows in (("gather", 1, [gather, gather | {"share_of_bound": 0.6}]), ("host", 2, hosted)):
        record = {"format": "hstu-plugin/int4-benchmark", "format_version": version, "rows": rows, **FACTS}
        report.write_json(root / f"benchmarks/results/int4-{op}.json", record)
    new = update_readme.updated(block("int4"), root)
    for bound in ("-", "60%"):
        assert f"| Triton | 128 | 1,000 of 50,000 rows | 0.500 | 1,500 | **50%** | {bound} |" in new
    size, times = "128 | 1,000 | 8.0", "0.25 | 0.50"
    lines = [
        f"| rows alone | copied | int4 | {size} | {times} | 0.10 | 10,000 | - |",
        f"| M-FALCON, 8 layers | copied | float16 | {size} | {times} | 0.60 | 1,667 | **1.00x** |",
        f"| M-FALCON, 8 layers | copied | int4 | {size} | {times} | 0.40 | 2,500 | **1.50x** |",
        f"| M-FALCON, 8 layers | read by the GPU | int4 | {size} | {times} | 0.20 | 5,000 | **3.00x** |",
        f"| M-FALCON, 2 layers | copied | int4 | {size} | {times} | 0.30 | 3,333 | - |",
    ]
    assert "\n".join(lines) in new
    assert new.count("- a CPU, torch 2.13, commit 0123456\n") == 2


def test_training_on_several_gpus_beside_the_other_doors(root: Path) -> None:
    at = {"device": "a GPU", "command": "a command", "note": "A note."}
    sizes = {"variant": "ultra", "num_layers": 8, "embedding_dim": 512, "users": 32, "rows": 10_000_000}
    sizes |= {"max_seq_len": 2048, "shortest": 0}
    run = {
        "sizes": sizes, "seconds_per_step": 0.05, "seconds_per_step_p20_p80": [0.04, 0.06],
        "samples_per_second": 1200.0, "mfu": 0.25, "matrix_flops_per_second": 8e14, **FACTS, **at,
    }  # fmt: skip
    scaling = [{"processes": ranks, "efficiency": share} for ranks, share in ((1, 1.0), (2, 0.931))]
    records: dict[str, Any] = {
        name: {"runs": [run | {"world_size": 1}, run | {"world_size": 2}], "scaling": scaling, **at}
        for name in ("distributed", "mfu-ultra")
    }
    records["mfu-ultra"]["runs"] = [run | {"world_size": 1, "sizes": sizes | {"shortest": 2048}}]
    done = {"step": 1106, "options": {"run": {"seed": 7}}, **FACTS, **at}
    values = {f"{task}/{metric}": 0.5 for task in ("click", "long_view", "like") for metric in ("auc", "gauc", "ne")}
    records["torchx-kuairand"] = done | {"metrics": values | {"long_view/auc": 0.75}}
    records["torchx-ml-1m"] = done | {"metrics": {"hr@10": 0.3219, "ndcg@10": 0.1853}}
    doors = {part: {"hit@10": value, "ndcg@10": value} for part, value in (("mean", 0.3178), ("std", 0.0038))}
    # A second seed: the table has their mean.
    other = {"run": {"seed": 8, "output_dir": "elsewhere"}}
    records["torchx-ml-1m-2"] = done | {"options": other, "metrics": {"hr@10": 0.3119, "ndcg@10": 0.1853}}
    records["ml-1m"] = {"models": {"HSTU": {"seeds": [1, 2, 3], "test": doors}}}
    tasks = {
        task: {metric: {"mean": 0.5, "std": None} for metric in ("auc", "gauc", "ne")}
        for task in ("click", "long_view", "like")
    }
    records["kuairand"] = {"models": {"ultra-hstu": {"seeds": [1], "test": tasks}}}
    shape = {"users": 8, "history": 512, "candidates": 256, "dim": 64, "layers": 2}
    contenders = {
        "jagged eager": {"ms": 7.218},
        "exported": {"ms": 5.8, "relative_error": 2e-7, "fresh_process": True},
        "compiled ahead of time": {"failed": "SIGSEGV; compiled: loading", "fresh_process": True},
    }
    records["export"] = {"sizes": shape, "dtype": "float32", "contenders": contenders, **FACTS, **at}
    for name, record in records.items():
        report.write_json(root / f"benchmarks/results/{name}.json", record)
    new = update_readme.updated(block("distributed"), root)
    step = (
        "| ultra, 8 layers, d 512, L {}2048, 32 users a GPU, 10M rows | {} | 50.0 (40.0 to 60.0) | 1,200 | {} | 25.0%"
    )
    for length, gpus, efficiency in (("jagged to ", 1, "-"), ("jagged to ", 2, "93.1%"), ("", 1, "-")):
        assert step.format(length, gpus, efficiency) in new
    assert "| ml-1m | HR@10 | 0.3169 ± 0.0050 (2 seeds) | 0.3178 ± 0.0038 (3 seeds) |" in new
    assert "| kuairand | long view AUC | 0.7500 (1 seed) | 0.5000 (1 seed) |" in new
    assert "- `ml-1m`: seeds 7, 8; 1,106 steps;" in new
    assert "- `kuairand`: seed 7; 1,106 steps; a GPU, torch 2.13, commit 0123456; `a command`. A note.\n" in new
    for row in ("jagged eager | 7.22 | -", "exported | 5.80 | 2e-07", "compiled ahead of time | - | SIGSEGV"):
        assert f"| {row} |\n" in new
    for change in ({"commit": "another"}, {"options": {"run": {"seed": 8}, "optim": {"dense_lr": 1.0}}}):
        report.write_json(root / "benchmarks/results/torchx-ml-1m-2.json", records["torchx-ml-1m-2"] | change)
        with pytest.raises(ValueError, match=r"torchx-ml-1m-2.json: expected commit and options of torchx-ml-1m"):
            update_readme.updated(block("distributed"), root)


def test_a_name_recorded_in_both_folders(root: Path) -> None:
    report.write_json(root / "benchmarks/results/tiny.json", comparison())
    with pytest.raises(update_readme.MarkerError, match="recorded twice"):
        update_readme.updated(block("tiny"), root)


def test_a_file_that_is_no_comparison(root: Path) -> None:
    (root / "benchmarks/results/speed.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(report.ReportError, match=r"speed\.json: expected a file of format"):
        update_readme.updated(block("speed"), root)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "README.md"
    stale = block("versions", "stale row\n")
    file.write_text(stale)
    assert update_readme.main([str(file), "--check"]) == 1
    assert "stale; run `make readme`" in capsys.readouterr().out
    assert file.read_text() == stale
    assert update_readme.main([str(file)]) == 0
    assert "2.13.*" in file.read_text()
    assert update_readme.main([str(file), "--check"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    file.write_text(block("nothing"))
    for words, message in (([str(file)], "results:nothing"), ([str(tmp_path / "none.md")], "No such file")):
        with pytest.raises(SystemExit) as exit_info:
            update_readme.main([*words, "--check"])
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(not README.is_file(), reason="there is no README.md")
def test_the_readme_is_up_to_date() -> None:
    assert update_readme.main(["--check"]) == 0


def test_speeds_stand_beside_those_of_the_same_run(tmp_path: Path) -> None:
    """What was timed later, alone, stands behind the table."""

    def row(taken_at: str, contender: str, direction: str, speed: float) -> dict[str, str]:
        known = {"group": "causal", "mode": CALL, "case": "2x64", "device": "GPU", "torch": "2", "triton": "3"}
        numbers = {"tflops_convention": str(speed), "matmul_tflops": "700"}
        return {
            **known,
            **numbers,
            "taken_at": taken_at,
            "commit": taken_at,
            "contender": contender,
            "direction": direction,
        }

    rows = [row("1", "triton", FORWARD, 50), row("1", "triton", BACKWARD, 40)]
    rows += [row("2", "triton", FORWARD, 100), row("2", "triton", BACKWARD, 80)]
    rows += [row("2", "theirs", FORWARD, 90), row("2", "theirs", BACKWARD, 70), row("3", "triton", FORWARD, 110)]
    rows += [row("2", "no backward", FORWARD, 60)]
    rows += [row("4", "triton", FORWARD, 95), row("4", "triton", BACKWARD, 85)]
    path = tmp_path / "benchmarks/results/attention.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    text = update_readme.updated(block("attention"), tmp_path)
    assert "| B x L x H x D | triton | theirs | no backward |\n" in text
    assert "| 2x64 | 100 / 80 | 90 / 70 | 60 / - |\n" in text
    assert "Ours in later runs without the others (GPU, torch 2, Triton 3, commit 3; GPU" in text
    assert text.count(": 2x64 95 to 110 / 85.") == 1
