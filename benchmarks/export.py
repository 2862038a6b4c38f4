"""Latency of the exported retrieval scorer beside eager: ``python -m benchmarks.export`` writes one result file.

Contenders: the jagged model as it is, the padded scorer in eager PyTorch, its exported program, on a GPU the same
replayed as a CUDA graph, and the program compiled ahead of time (AOTInductor; needs g++). Programs are saved, and
loaded and timed in fresh processes that have none of our operators. A process that dies is recorded with how far it
came; the others keep their figures.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.export_fresh import median_ms, relative_error
from hstu_plugin._versions import runtime_versions, source_commit
from hstu_plugin.adapters.torchrec.compiled import compile_scorer, has_compiler
from hstu_plugin.adapters.torchrec.export import PaddedRetrievalScorer, export_scorer
from hstu_plugin.config import HSTUConfig, RetrievalConfig
from hstu_plugin.losses import normalise
from hstu_plugin.records import machine, write_json
from hstu_plugin.retrieval import HSTURetrieval
from hstu_plugin.sequence import JaggedSequence

RESULTS = Path(__file__).parent / "results"
FRESH = Path(__file__).with_name("export_fresh.py")
_NOW, _TOLERANCE, _TIMEOUT_S = 1_700_000_000, 1e-3, 300


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 1 where a contender is wrong or died."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "export.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="of a copy without history, into the record")
    for name, default in (("users", 8), ("history", 512), ("candidates", 256), ("dim", 256), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--without-compiler", action="store_true", help="leave AOTInductor out")
    given = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("highest")
    with tempfile.TemporaryDirectory() as folder:
        record, program = measure(given, Path(folder))
        # Compiling takes a minute, and may be cut off.
        write_json(given.output, record)
        if not given.without_compiler:
            _add_compiled(record, program, given, Path(folder))
            write_json(given.output, record)
    for name, found in record["contenders"].items():
        print(f"{name}: {found}")
    died = any("failed" in found for found in record["contenders"].values())
    return 0 if record["correct"] and not died else 1


def measure(given: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], torch.export.ExportedProgram]:
    """Milliseconds of the contenders that need no compiler, medians, and the exported program."""
    torch.manual_seed(0)
    config = HSTUConfig(
        embedding_dim=given.dim, num_layers=given.layers, num_heads=4, max_seq_len=given.history, dropout=0.0
    )
    core = HSTURetrieval(config, RetrievalConfig()).to(given.device).eval()
    inputs, device = _inputs(given), torch.device(given.device)
    scorer = PaddedRetrievalScorer(core)
    with torch.no_grad():
        wanted = _jagged(core, inputs)
        eager = {
            "jagged eager": {"ms": median_ms(lambda: _jagged(core, inputs), device, given.runs)},
            "padded eager": {
                "ms": median_ms(lambda: scorer(*inputs), device, given.runs),
                "relative_error": relative_error(scorer(*inputs), wanted),
            },
        }
    program = export_scorer(scorer, history_len=given.history, num_candidates=given.candidates)
    torch.export.save(program, folder / "exported.pt2")
    torch.save((inputs, wanted), folder / "case.pt")
    record = {
        "sizes": {name: getattr(given, name) for name in ("users", "history", "candidates", "dim", "layers")},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": "float32",
        "correct": True,
        "contenders": eager,
        "commit": given.commit or source_commit(),
        "versions": runtime_versions(),
        "machine": machine(),
    }
    _add(record, "exported", _fresh("exported", folder / "exported.pt2", given.runs))
    if device.type == "cuda":
        _add(record, "exported, as a CUDA graph", _fresh("replayed", folder / "exported.pt2", given.runs))
    return record, program


def _add_compiled(
    record: dict[str, Any], program: torch.export.ExportedProgram, given: argparse.Namespace, folder: Path
) -> None:
    name = "compiled ahead of time"
    if not has_compiler():
        record["contenders"][name] = {"not measured": "there is no C++ compiler"}
        return
    try:
        compile_scorer(program, folder / "compiled.pt2")
    except Exception as error:
        # Whatever PyTorch's compiler runs into here says nothing about the contenders above.
        record["contenders"][name] = {"not measured": f"{type(error).__name__}: {str(error)[:400]}"}
        return
    _add(record, name, _fresh("compiled", folder / "compiled.pt2", given.runs))


def _fresh(kind: str, file: Path, runs: int) -> dict[str, Any]:
    """What a new process finds: isolated, so that it does not see this project's folders."""
    command = [sys.executable, "-I", str(FRESH), str(file.with_name("case.pt")), str(runs), f"{kind}={file}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, cwd=file.parent, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer in {_TIMEOUT_S} s"}
    if done.returncode:
        # A negative code is the signal that ended the process.
        code = done.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return {"failed": f"{how}; {done.stderr[-2000:].strip()}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["contenders"][kind]
    return found


def _add(record: dict[str, Any], name: str, found: dict[str, Any]) -> None:
    record["contenders"][name] = {**found, "fresh_process": True}
    errors = [one["relative_error"] for one in record["contenders"].values() if "relative_error" in one]
    record["correct"] = all(error < _TOLERANCE for error in errors)


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


if __name__ == "__main__":
    sys.exit(main())
