"""Scaling of distributed training: ``python -m benchmarks.distributed --processes 1 2`` writes one result file.

Runs `hstu_plugin.adapters.torchrec.benchmark` once for each number of processes, on as many GPUs (NCCL) or, without a
GPU, CPU processes (gloo), and states the efficiency against the first. Sizes follow after ``--``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hstu_plugin.records import write_json

RESULTS = Path(__file__).parent / "results"
MODULE = "hstu_plugin.adapters.torchrec.benchmark"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS / "distributed.json")
    parser.add_argument("--add", type=Path, nargs="+", default=[], help="files of earlier runs, to stand before these")
    parser.add_argument("--commit", help="of a copy without history, into the record")
    parser.add_argument("sizes", nargs="*", help="options of the module, after --")
    parsed = parser.parse_args(arguments)
    earlier = [json.loads(path.read_text(encoding="utf-8")) for path in parsed.add]
    runs = [run(count, parsed.sizes) for count in parsed.processes]
    if parsed.commit:
        runs = [{**record, "commit": parsed.commit} for record in runs]
    runs = [*(record for file in earlier for record in file["runs"]), *runs]
    write_json(parsed.output, {"runs": runs, "scaling": scaling(runs)})
    print(json.dumps(scaling(runs), indent=1))
    return 0


def run(processes: int, sizes: Sequence[str]) -> dict[str, Any]:
    """One measurement; raises where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "record.json"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        subprocess.run([sys.executable, *launch, "-m", MODULE, "--output", str(output), *sizes], check=True)
        record: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return record


def scaling(runs: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Samples per second of each run, and its efficiency: by the first run's for each of its processes."""
    base = runs[0]["samples_per_second"] / runs[0]["world_size"]
    return [
        {
            "processes": record["world_size"],
            "samples_per_second": record["samples_per_second"],
            "efficiency": record["samples_per_second"] / record["world_size"] / base,
            "mfu": record["mfu"],
        }
        for record in runs
    ]


if __name__ == "__main__":
    sys.exit(main())
