"""Speed of quantised embeddings: ``python -m benchmarks.int4 gather`` and ``python -m benchmarks.int4 host``.

``gather``: the dequantising gather from a table in the memory of the device, as a share of the copy bandwidth measured
in the same run; FBGEMM's INT4 lookup beside it where it is installed. ``host``: a table in host memory, bytes and
milliseconds of a request, float16 beside INT4. Each writes ``<output>.json``, ``<output>.csv`` and ``<output>.png``.
On a GPU the tests of the operator run first; when they fail, nothing is measured.
"""

from __future__ import annotations

import argparse
import csv
import io
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.int4_measure import Row, Timing, gather_times, host_times
from hstu_plugin._versions import runtime_versions, source_commit
from hstu_plugin.records import machine, write_json, write_text

FORMAT = "hstu-plugin/int4-benchmark"
FORMAT_VERSION = 1
RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    options = _parser().parse_args(argv)
    device = torch.device(options.device)
    timing = Timing(warmup=options.warmup, repeats=options.repeats)
    if device.type == "cuda":
        run_tests()
    if options.op == "gather":
        measured = gather_times(
            device,
            dims=options.dims,
            table_rows=options.table_rows,
            ids=options.ids,
            timing=timing,
            copy_bytes=options.copy_bytes,
            id_sets=options.id_sets,
        )
    else:
        measured = host_times(
            device,
            dim=options.dim,
            table_rows=options.table_rows,
            ids=options.ids,
            requests=options.requests,
            timing=timing,
        )
    rows = []
    for row in measured:
        rows.append(row)
        print(line(row), flush=True)
    output = options.output or RESULTS / f"int4-{options.op}"
    write(output, rows, {key: value for key, value in vars(options).items() if key != "output"})
    print(f"Wrote {output}.json, .csv and .png")


def run_tests() -> None:
    """The operator's tests, on this machine.

    Raises:
        SystemExit: one of them failed.
    """
    root = Path(__file__).resolve().parents[1]
    files = [*sorted((root / "tests/ops").glob("test_int4_*.py")), root / "tests/plugin/test_serving_tables.py"]
    print(f"Running {', '.join(file.name for file in files)} first", flush=True)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *map(str, files)], cwd=root, check=False)
    if done.returncode:
        raise SystemExit("The operator's tests failed on this machine: nothing is measured.")


def line(row: Row) -> str:
    """One measurement for people."""
    text = f"{row['op']} {row['way']:<24} D {row['dim']:<4} {row['p50_ms']:9.3f} ms  {row['mb']:9.1f} MB"
    if "share_of_copy" in row:
        share = f"{row['share_of_copy']:.1%} of {row['copy_gb_per_s']:.0f}"
        return f"{text}  {row['gb_per_s']:7.0f} GB/s, {share}"
    return f"{text}  pipelined {row['pipelined_ms']:.3f} ms, transfer {row['transfer_ms']:.3f} ms"


def write(output: Path, rows: Sequence[Row], options: dict[str, Any]) -> None:
    """The three files of a run; versions, commit and machine are in the JSON and in every row of the CSV."""
    versions, hardware = runtime_versions(), machine()
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": source_commit(),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in options.items()},
        "versions": versions,
        "machine": hardware,
        "rows": list(rows),
    }
    write_json(output.with_name(f"{output.name}.json"), record)
    facts = {
        "device": (hardware["gpus"] or [hardware["cpu"]])[0],
        "torch": versions.get("torch", ""),
        "triton": versions.get("triton", ""),
        "fbgemm": versions.get("fbgemm-gpu", ""),
        "commit": record["commit"] or "",
        "created": record["created"],
    }
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0], *facts], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        short = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        writer.writerow({**short, **facts})
    write_text(output.with_name(f"{output.name}.csv"), text.getvalue())
    _draw(output.with_name(f"{output.name}.png"), rows, facts["device"])


def _draw(path: Path, rows: Sequence[Row], device: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['way']}, D {row['dim']}" for row in rows]
    if rows[0]["op"] == "gather":
        values = [100 * row["share_of_copy"] for row in rows]
        axes.axvline(100, color="grey", linewidth=1)
        axes.set_xlabel("% of the copy bandwidth of the same run (packed bytes read + bfloat16 bytes written)")
    else:
        values = [row["p50_ms"] for row in rows]
        axes.plot(
            [row["transfer_ms"] for row in rows], names, "|", color="black", markersize=16, label="transfer alone"
        )
        axes.legend()
        axes.set_xlabel("ms of a request, table in host memory")
    bars = axes.barh(names, values)
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_title(f"{device}, {rows[0]['ids']:,} ids of {rows[0]['table_rows']:,} rows", loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int4", description=__doc__)
    commands = parser.add_subparsers(dest="op", required=True)
    gather = commands.add_parser("gather", help="from a table in the memory of the device")
    gather.add_argument("--dims", type=int, nargs="+", default=[128, 512])
    gather.add_argument("--table-rows", type=int, default=50_000_000)
    gather.add_argument("--ids", type=int, default=1_000_000)
    gather.add_argument("--copy-bytes", type=int, default=1 << 31)
    gather.add_argument("--id-sets", type=int, default=4)
    host = commands.add_parser("host", help="from a table in host memory")
    host.add_argument("--dim", type=int, default=512)
    host.add_argument("--table-rows", type=int, default=10_000_000)
    host.add_argument("--ids", type=int, default=16_384, help="of one request")
    host.add_argument("--requests", type=int, default=32, help="different ones")
    for command in (gather, host):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--warmup", type=int, default=10)
        command.add_argument("--repeats", type=int, default=50)
        command.add_argument("--output", type=Path, help="path without suffix")
    return parser


if __name__ == "__main__":
    main()
