"""Speed of quantised embeddings: ``python -m benchmarks.int4 gather``, ``sweep`` and ``host``.

``gather``: the dequantising gather from a table in the memory of the device, as a share of the copy bandwidth measured
in the same run; FBGEMM's INT4 lookup beside it where it is installed. ``sweep``: the same with other tiles, orders of
ids and table sizes, each checked by itself. ``host``: a table in host memory, bytes and milliseconds of a request, and
of M-FALCON requests that are fed from it; float16 beside INT4, copied, or read by the device. Each writes
``<output>.json``, ``<output>.csv`` and ``<output>.png``. On a GPU the operator's tests run before ``gather`` and
``host``; when they fail, nothing is measured. ``--skip-tests`` is for who has just run them; each way is compared with
the definition all the same.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.int4_gather import gather_times, sweep_times
from benchmarks.int4_host import HostCase, host_times
from benchmarks.int4_measure import Row
from hstu_plugin._versions import runtime_versions, source_commit
from hstu_plugin.records import machine, write_json, write_text

FORMAT = "hstu-plugin/int4-benchmark"
FORMAT_VERSION = 2
RESULTS = Path(__file__).parent / "results"
# What has to be right on a GPU before something is timed there.
TESTS = {
    "gather": ("tests/ops/test_int4_triton.py",),
    "host": (
        "tests/ops/test_distinct.py",
        "tests/plugin/test_serving_tables.py",
        "tests/plugin/test_mfalcon_serving.py",
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    options = _parser().parse_args(argv)
    device = torch.device(options.device)
    if options.op == "gather" and options.tile is not None and device.type != "cuda":
        raise SystemExit(f"--tile: expected --device cuda, whose Triton gather has tiles, got {device}")
    if device.type == "cuda" and options.op in TESTS and not options.skip_tests:
        run_tests(options.op)
    output = options.output or RESULTS / f"int4-{options.op}"
    kept = {key: value for key, value in vars(options).items() if key not in ("output", "commit")}
    rows: list[Row] = []
    try:
        for row in _measured(options, device):
            rows.append(row)
            print(line(row), flush=True)
    finally:
        # What was measured before an error is kept; the command fails all the same.
        if rows:
            write(output, rows, kept, options.commit)
            print(f"Wrote {output}.json, .csv and .png")


def _measured(options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    if options.op == "host":
        case = HostCase(
            dim=options.dim,
            table_rows=options.table_rows,
            ids=options.ids,
            requests=options.requests,
            history=options.history,
            layers=tuple(options.layers),
            backend=options.backend,
        )
        return host_times(device, case, seconds=options.seconds)
    sizes = {name: getattr(options, name) for name in ("dims", "table_rows", "ids", "copy_bytes", "id_sets")}
    if options.op == "sweep":
        return sweep_times(device, **sizes)
    return gather_times(device, **sizes, tile=options.tile)


def run_tests(op: str) -> None:
    """The tests of the operator on this GPU.

    Raises:
        SystemExit: one of them failed.
    """
    print(f"Running {', '.join(TESTS[op])} first", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", *TESTS[op]]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], check=False)
    if done.returncode:
        raise SystemExit("The operator's tests failed on this machine: nothing is measured.")


def line(row: Row) -> str:
    """One measurement for people."""
    text = f"{row['op']} {row['way']:<24} D {row['dim']:<4} {row['p50_ms']:9.3f} ms  {row['mb']:9.1f} MB"
    if row["op"] == "host":
        times = f"pipelined {row['pipelined_ms']:.3f} ms, transfer {row['transfer_ms']:.3f} ms"
        return f"{text}  {row['layers']} layers, {times}"
    shares = f"{row['share_of_copy']:6.1%} of copy, {row['share_of_bound']:6.1%} of bound"
    if row["op"] == "sweep":
        tile = f"{row['units']:>5} units, {row['warps']} warps, {row['words']} words"
        return f"{text}  {row['table_rows']:>9} rows, {tile}  {shares}"
    return f"{text}  {row['gb_per_s']:7.0f} GB/s, {shares}, host {row['host_us']:.0f} us"


def write(output: Path, rows: Sequence[Row], options: dict[str, Any], commit: str | None = None) -> None:
    """The three files of a run; versions, commit and machine are in the JSON and in every row of the CSV."""
    versions, hardware = runtime_versions(), machine()
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or source_commit(),
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
    names = [_name(row) for row in rows]
    if rows[0]["op"] == "host":
        values = [row["p50_ms"] for row in rows]
        axes.plot([row["pipelined_ms"] for row in rows], names, "|", color="black", markersize=16, label="overlapped")
        axes.legend()
        axes.set_xlabel("ms of a request, table in host memory")
    else:
        values = [100 * row["share_of_copy"] for row in rows]
        axes.axvline(100, color="grey", linewidth=1)
        axes.set_xlabel("% of the copy bandwidth of the same run\n(packed bytes read + bfloat16 bytes written)")
    bars = axes.barh(names, values)
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_title(f"{device}, {rows[0]['ids']:,} ids of {rows[0]['table_rows']:,} rows", loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _name(row: Row) -> str:
    name = f"{row['way']}, D {row['dim']}"
    if row["op"] == "host":
        return f"{name}, {row['layers']} layers" if row["layers"] else name
    return name if row["op"] != "sweep" else f"{name}, {row['units']}/{row['warps']}, {row['table_rows']:,}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int4", description=__doc__)
    commands = parser.add_subparsers(dest="op", required=True)
    gather = commands.add_parser("gather", help="from a table in the memory of the device")
    sweep = commands.add_parser("sweep", help="the same with other tiles, orders and sizes; Triton only")
    for command in (gather, sweep):
        command.add_argument("--dims", type=int, nargs="+", default=[128, 512])
        command.add_argument("--table-rows", type=int, default=50_000_000)
        command.add_argument("--ids", type=int, default=1_000_000)
        command.add_argument("--copy-bytes", type=int, default=1 << 31)
        command.add_argument("--id-sets", type=int, default=4)
    gather.add_argument("--tile", type=json.loads, metavar="JSON", help='such as {"units": 512}; default: built in')
    host = commands.add_parser("host", help="from a table in host memory; with M-FALCON behind it")
    host.add_argument("--dim", type=int, default=512)
    host.add_argument("--table-rows", type=int, default=4_000_000)
    host.add_argument("--ids", type=int, default=16_384, help="of one request: its candidates")
    host.add_argument("--requests", type=int, default=16, help="different ones")
    host.add_argument("--history", type=int, default=1024, help="events of the user, encoded before the request")
    host.add_argument("--layers", type=int, nargs="+", default=[8, 2], help="of each model to score with")
    fastest = "triton" if torch.cuda.is_available() else "auto"
    host.add_argument("--backend", default=fastest, help="of attention and gather")
    host.add_argument("--seconds", type=float, default=1.0, help="aim for each measurement")
    for command in (gather, host):
        command.add_argument("--skip-tests", action="store_true", help="they have just passed on this machine")
    for command in (gather, sweep, host):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--output", type=Path, help="path without suffix")
        command.add_argument("--commit", help="to record; default: that of this checkout")
    return parser


if __name__ == "__main__":
    # Ended by a time limit, it keeps what was measured.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
