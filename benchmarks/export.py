"""Latency of the exported retrieval scorer beside eager: ``python -m benchmarks.export`` writes one result file.

Contenders: the jagged model as it is, the padded scorer in eager PyTorch, its exported program, and the program
compiled ahead of time (AOTInductor; needs g++). All must agree with the jagged model before anything is timed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hstu_plugin._versions import runtime_versions, source_commit
from hstu_plugin.adapters.torchrec.export import PaddedRetrievalScorer, export_scorer
from hstu_plugin.config import HSTUConfig, RetrievalConfig
from hstu_plugin.losses import normalise
from hstu_plugin.records import machine, write_json
from hstu_plugin.retrieval import HSTURetrieval
from hstu_plugin.sequence import JaggedSequence

RESULTS = Path(__file__).parent / "results"
_NOW, _TOLERANCE = 1_700_000_000, 1e-3


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 1 where a contender is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "export.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="of a copy without history, into the record")
    for name, default in (("users", 8), ("history", 512), ("candidates", 256), ("dim", 256), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--runs", type=int, default=50)
    given = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("highest")
    record = measure(given)
    write_json(given.output, record)
    for name, found in record["contenders"].items():
        print(f"{name}: {found}")
    return 0 if record["correct"] else 1


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each contender, medians."""
    torch.manual_seed(0)
    config = HSTUConfig(
        embedding_dim=given.dim, num_layers=given.layers, num_heads=4, max_seq_len=given.history, dropout=0.0
    )
    core = HSTURetrieval(config, RetrievalConfig()).to(given.device).eval()
    inputs = _inputs(given)
    scorer = PaddedRetrievalScorer(core)
    found: dict[str, Any] = {}
    correct = True
    with torch.inference_mode():
        wanted = _jagged(core, inputs)
        found["jagged eager"] = {"ms": _median_ms(lambda: _jagged(core, inputs), given)}
    program = export_scorer(scorer, history_len=given.history, num_candidates=given.candidates)
    contenders: dict[str, Callable[..., Tensor]] = {"padded eager": scorer, "exported": program.module()}
    if shutil.which("g++"):
        with tempfile.TemporaryDirectory() as folder:
            package = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/scorer.pt2")
            contenders["compiled ahead of time"] = torch._inductor.aoti_load_package(package)
    else:
        found["compiled ahead of time"] = {"not measured": "there is no g++"}
    with torch.no_grad():
        for name, call in contenders.items():
            error = float((call(*inputs) - wanted).norm() / wanted.norm())
            correct &= error < _TOLERANCE
            found[name] = {"ms": _median_ms(lambda call=call: call(*inputs), given), "relative_error": error}  # type: ignore[misc]
    return {
        "sizes": {name: getattr(given, name) for name in ("users", "history", "candidates", "dim", "layers")},
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
        "dtype": "float32",
        "correct": correct,
        "contenders": found,
        "commit": given.commit or source_commit(),
        "versions": runtime_versions(),
        "machine": machine(),
    }


def _inputs(given: argparse.Namespace) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(given.history // 2, given.history + 1, (given.users,), generator=draw)
    history = torch.randn(given.users, given.history, given.dim, generator=draw) * 0.1
    candidates = torch.randn(given.users, given.candidates, given.dim, generator=draw)
    times = _NOW + torch.randint(1, 4000, (given.users, given.history), generator=draw).cumsum(1)
    return tuple(x.to(given.device) for x in (history, lengths, candidates, times, times[:, -1] + 900))


def _jagged(core: HSTURetrieval, inputs: tuple[Tensor, ...]) -> Tensor:
    history, lengths, candidates, times, asked_at = inputs
    users = core(JaggedSequence.from_padded(history, lengths, times), asked_at)
    items = normalise(candidates, core.retrieval.similarity)
    return torch.einsum("bd,bmd->bm", users, items) / core.retrieval.temperature


def _median_ms(call: Callable[[], Tensor], given: argparse.Namespace) -> float:
    taken = []
    for turn in range(given.runs + 5):
        _synchronise(given.device)
        begin = time.perf_counter()
        call()
        _synchronise(given.device)
        if turn >= 5:
            taken.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(taken)


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
