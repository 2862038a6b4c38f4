"""Tables of a README on quantised embeddings: what they cost (``quantized``) and how fast they are (``int4``)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from hstu_plugin.adapters.quantized import FORMAT_VERSION, RECORD_FORMAT

Cells = list[list[str]]
SPEED_FORMAT = "hstu-plugin/int4-benchmark"
RESULTS = "benchmarks/results"
# Of RecBole's metrics these; of a ranker's the last part of ``task.metric``.
SHOWN = {"hit@10": "HR@10", "ndcg@10": "NDCG@10", "auc": "AUC", "ne": "NE"}
# How rows of a host table travel, in the order of the table.
COPIED, READ = "copied", "read by the GPU"
WAYS = {
    "eager": "PyTorch operations",
    "triton": "Triton",
    "triton-action-position": "Triton, + action + position",
    "triton-action-position-int32": "Triton, + action + position, their ids int32",
    "fbgemm-tbe": "FBGEMM",
}


def quantized(root: Path) -> tuple[list[str], Cells, list[str]]:
    """Header, rows and remarks: size and metrics before and after, means over the seeds of a model and their spread.

    Raises:
        ValueError: nothing is recorded, or a file is of another format.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for path in sorted((root / RESULTS).glob("quantized-*.json")):
        record = _read(path, RECORD_FORMAT, (FORMAT_VERSION,))
        table = record["report"]["tables"][0]
        kind = (record["dataset"], record["model"], table["format"], table["ranges"], record["split"])
        groups.setdefault(kind, []).append(record)
    if not groups:
        raise ValueError(f"results:quantized: expected {RESULTS}/quantized-*.json, found none")
    rows, remarks = [], []
    for (dataset, model, row_format, ranges, _), records in groups.items():
        reports = [record["report"] for record in records]
        smaller = reports[0]["bytes_before"] / reports[0]["bytes_after"]
        what = f"{row_format}, {'searched ranges' if ranges == 'search' else 'plain ranges'}"
        for name in reports[0]["metrics_before"]:
            task, _, metric = name.rpartition(".")
            if metric not in SHOWN:
                continue
            before, after = (fmean(r[part][name] for r in reports) for part in ("metrics_before", "metrics_after"))
            shown = f"{task} {SHOWN[metric]}".strip()
            change = f"{after / before - 1:+.2%}" if before else "-"
            if len(reports) > 1 and all(r["metrics_before"][name] for r in reports):
                own = [r["metrics_after"][name] / r["metrics_before"][name] - 1 for r in reports]
                change += f" ({min(own):+.2%} to {max(own):+.2%})"
            cells = [f"{dataset}, {model}", str(len(records)), what, f"{smaller:.2f}x", shown]
            rows.append([*cells, f"{before:.4f}", f"{after:.4f}", change])
        remarks.append(f"{dataset}, {model}, {what}: {_origin(records)}")
    header = ["data, model", "seeds", "rows", "smaller", "metric", "full precision", "quantised", "change"]
    return header, rows, remarks


def speed(root: Path) -> tuple[tuple[list[str], Cells, list[str]], ...]:
    """The tables of ``int4-gather`` and, where it is recorded, of ``int4-host``.

    Raises:
        ValueError: nothing is recorded, or a file is of another format.
    """
    found = []
    for op, make in (("gather", _gather), ("host", _host)):
        path = root / RESULTS / f"int4-{op}.json"
        if path.is_file():
            record = _read(path, SPEED_FORMAT, (1, 2))
            found.append((*make(record["rows"]), [_origin([record])]))
    if not found:
        raise ValueError(f"results:int4: expected {RESULTS}/int4-gather.json or int4-host.json, found none")
    return tuple(found)


def _gather(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], Cells]:
    cells = []
    for row in rows:
        # The bound came with the second version of the records.
        bound = f"{row['share_of_bound']:.0%}" if "share_of_bound" in row else "-"
        what = f"{row['ids']:,} of {row['table_rows']:,} rows"
        times = [f"{row['p50_ms']:.3f}", f"{row['gb_per_s']:,.0f}", f"**{row['share_of_copy']:.0%}**", bound]
        cells.append([WAYS.get(row["way"], row["way"]), str(row["dim"]), what, *times])
    return ["gather", "D", "what", "ms", "GB/s", "of the copy bandwidth", "of what sectors allow"], cells


def _host(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], Cells]:
    """Of each number of layers, without a model first: copied, then read; float16 beside int4."""
    layers = list(dict.fromkeys(row["layers"] for row in rows))
    found = {(row["layers"], *_brought(row["way"])): row for row in rows}
    cells = []
    for key in sorted(found, key=lambda key: (key[0] != 0, layers.index(key[0]), key[1:])):
        row, (depth, transfer, kind) = found[key], key
        base = found.get((depth, COPIED, "float16"))
        cells.append(
            [
                f"M-FALCON, {depth} layers" if depth else "rows alone",
                transfer,
                kind,
                str(row["dim"]),
                f"{row['ids']:,}",
                f"{row['mb']:.1f}",
                *(f"{row[name]:.2f}" for name in ("transfer_ms", "p50_ms", "pipelined_ms")),
                f"{1e3 / row['pipelined_ms']:,.0f}",
                f"**{base['pipelined_ms'] / row['pipelined_ms']:.2f}x**" if base else "-",
            ]
        )
    header = ["request", "rows are", "as", "D", "rows of a request", "MB", "copy of the bytes, ms", "request, ms"]
    return [*header, "overlapped, ms", "requests/s", "of float16 copied"], cells


def _brought(way: str) -> tuple[str, str]:
    """How rows travel and what they are, of ``[mfalcon-]KIND[-read]``."""
    kind = way.removeprefix("mfalcon-")
    return READ if kind.endswith("-read") else COPIED, kind.removesuffix("-read")


def _read(path: Path, form: str, versions: Sequence[int]) -> Mapping[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if record.get("format") != form or record.get("format_version") not in versions:
        raise ValueError(
            f"{path}: expected a file of format {form!r}, version {' or '.join(map(str, versions))}, got "
            f"{record.get('format')!r}, {record.get('format_version')!r}"
        )
    return record


def _origin(records: Sequence[Mapping[str, Any]]) -> str:
    """Machines, versions and commits of records."""
    facts = {
        f"{(r['machine']['gpus'] or [r['machine']['cpu']])[0]}, torch {r['versions'].get('torch', '?')}, commit "
        f"{(r['commit'] or 'unknown')[:7]}"
        for r in records
    }
    return "; ".join(sorted(facts))
