"""The scaling benchmark at a tiny size, on gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import export
from benchmarks.distributed import scaling
from hstu_plugin.adapters.torchrec.benchmark import Sizes, _batch, _dealt, _flops, matrix_rate
from hstu_plugin.config import HSTUConfig

from .training import ROOT, environment

TINY = Sizes(users=3, max_seq_len=8, embedding_dim=8, num_layers=1, num_heads=1, rows=50, negatives=4)


def test_operations_are_counted_by_length() -> None:
    config = HSTUConfig(embedding_dim=8, num_layers=1, max_seq_len=8)
    batch = _batch(TINY, 0, 0, 1)
    lengths = batch.features["item_id"].lengths().tolist()
    # Projections of four widths in, one out; attention over i + 1 keys of row i, twice.
    layer = sum(2 * n * 8 * (4 * 8) + 2 * n * 8 * 8 + 2 * 2 * 8 * n * (n + 1) // 2 for n in lengths)
    loss = sum(2 * (n - 1) * 4 * 8 for n in lengths)
    assert _flops(config, batch, TINY) == pytest.approx(3 * (layer + loss), rel=0.05)
    assert matrix_rate(torch.device("cpu"), torch.float32) > 1e8


def test_ranks_have_shares_of_one_draw_that_weigh_alike() -> None:
    lengths = torch.randint(1, 2000, (48,), generator=torch.Generator().manual_seed(0))
    shares = [_dealt(lengths, rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat(shares).sort().values, lengths.sort().values)
    totals = [int(share.sum()) for share in shares]
    assert max(totals) - min(totals) < 0.02 * sum(totals)
    batches = [_batch(TINY, 0, rank, 2) for rank in range(2)]
    items = [batch.features["item_id"].values() for batch in batches]
    assert not torch.equal(*(own[:5] for own in items))
    assert torch.equal(*(batch.features["negative"].values() for batch in batches))


def test_efficiency() -> None:
    runs = [{"world_size": n, "samples_per_second": s, "mfu": 0.3} for n, s in ((1, 10.0), (2, 18.0))]
    assert [run["efficiency"] for run in scaling(runs)] == [1.0, 0.9]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV; compiled: loading"),
        ("sys.exit(3)", "exit code 3; compiled: loading"),
        ("time.sleep(60)", "no answer in 1 s"),
    ],
)
def test_a_process_that_dies_leaves_the_other_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    script = tmp_path / "fresh.py"
    script.write_text(
        f"import os, signal, sys, time\nprint('compiled: loading', file=sys.stderr, flush=True)\n{code}\n"
    )
    monkeypatch.setattr(export, "FRESH", script)
    if code.startswith("time"):
        monkeypatch.setattr(export, "_TIMEOUT_S", 1)
    record = {"correct": True, "contenders": {"exported": {"ms": 5.0, "relative_error": 1e-7}}}
    export._add(record, "compiled", export._fresh("compiled", tmp_path / "compiled.pt2", runs=1))
    assert record["contenders"]["compiled"] == {"failed": reason, "fresh_process": True}
    assert record["correct"] and record["contenders"]["exported"]["ms"] == 5.0


@pytest.mark.slow
def test_the_exported_scorer_beside_eager(tmp_path: Path) -> None:
    sizes = ["--users=3", "--history=16", "--candidates=4", "--dim=16", "--layers=1", "--runs=2"]
    output = tmp_path / "export.json"
    assert export.main([*sizes, "--device=cpu", "--without-compiler", f"--output={output}"]) == 0
    record = json.loads(output.read_text(encoding="utf-8"))
    assert record["correct"] and set(record["contenders"]) == {"jagged eager", "padded eager", "exported"}
    assert record["contenders"]["exported"]["fresh_process"] and record["contenders"]["exported"]["ms"] > 0


@pytest.mark.slow
def test_measures_two_processes(tmp_path: Path) -> None:
    sizes = ["--users=3", "--max-seq-len=8", "--embedding-dim=8", "--num-layers=1", "--num-heads=1", "--rows=50"]
    more = ["--negatives=4", "--steps=2", "--warmup=1"]
    output = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.distributed", "--processes", "2", "--output", str(output)]
    subprocess.run([*command, "--", *sizes, *more], cwd=ROOT, env=environment(), check=True, timeout=200)
    record = json.loads(output.read_text(encoding="utf-8"))
    (run,) = record["runs"]
    assert run["world_size"] == 2 and run["loss_is_finite"] and run["samples_per_second"] > 0 and run["mfu"] > 0
    low, high = run["seconds_per_step_p20_p80"]
    assert low <= run["seconds_per_step"] <= high and run["messages"]["all_to_all_bytes_per_second"] > 0
    assert "row_wise" in run["placement"] and os.path.exists(output)
