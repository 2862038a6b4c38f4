"""Measurements of the dequantising gather from a table in the memory of the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.int4_measure import (
    GatherRows,
    Row,
    copy_bandwidth,
    device_times,
    expect_close,
    random_table,
    sector_bytes,
)
from benchmarks.timing import host_microseconds, time_calls
from hstu_kernels.int4 import AddedRows, PackedRows, gather_rows
from hstu_kernels.int4.triton.shape import TILE, GatherTile

_CHECKED = 4096
# FBGEMM computes in float16 on GPUs; a code more or less is 0.01.
_FBGEMM_ERROR = 1e-3


def gather_times(
    device: torch.device, *, dims: Sequence[int], table_rows: int, ids: int, copy_bytes: int, id_sets: int,
    tile: Mapping[str, int] | None = None,
) -> Iterator[Row]:  # fmt: skip
    """Times of the dequantising gather beside the copy bandwidth of the same run, one row for each way to do it.

    Bytes are those the task needs: packed rows read and bfloat16 rows written; ids and added tables do not count (24
    and 16 bytes of ids a row with both terms, where ``-int32`` means theirs). The
    bound counts whole sectors of 32 bytes read instead, which no way can avoid. ``tile``: fields of a `GatherTile`
    other than the built-in one.

    Raises:
        RuntimeError: a way gives other numbers than the definition; nothing is reported then.
    """
    for dim in dims:
        bandwidth = copy_bandwidth(device, copy_bytes)
        table = random_table(table_rows, dim, device)
        sets = random_ids(table_rows, ids, id_sets, device)
        actions, positions = dense_terms(dim, ids, device)
        both = {"actions": actions, "positions": positions}
        for name, (way, terms) in _ways(table, both, device, tile).items():
            _check(f"{name} at dim {dim}", way, table, sets[0], terms, _FBGEMM_ERROR if name == "fbgemm-tbe" else 0.0)
            calls = [lambda way=way, some=some: way(some) for some in sets]  # type: ignore[misc]
            # FBGEMM's rows begin on boundaries of 16 bytes.
            stride = -(-table.data.shape[1] // 16) * 16 if name == "fbgemm-tbe" else table.data.shape[1]
            yield {
                "op": "gather",
                "way": name,
                "dim": dim,
                "table_rows": table_rows,
                "table_gib": table.nbytes / 2**30,
                "ids": ids,
                **measured(calls, device, table, sets, bandwidth, stride),
                "call_ms": time_calls(calls, device, seconds=0.1).p50,
                "host_us": host_microseconds(calls, device),
            }
        del table, sets


def measured(
    calls: Sequence[GatherRows], device: torch.device, table: PackedRows, sets: Sequence[Tensor], bandwidth: float,
    stride: int | None = None,
) -> Row:  # fmt: skip
    """Device time of a gather, its bytes, and its share of the copy bandwidth and of what the sectors allow."""
    spread = device_times(calls, device)  # type: ignore[arg-type]
    count, width = sets[0].numel(), table.data.shape[1]
    needed = count * (width + 2 * table.dim)
    moved = sector_bytes(sets[0], stride or width, width) + 2 * table.dim * count
    speed = needed / spread.p50 / 1e6
    return {
        "p20_ms": spread.p20,
        "p50_ms": spread.p50,
        "p80_ms": spread.p80,
        "mb": needed / 1e6,
        "gb_per_s": speed,
        "copy_gb_per_s": bandwidth,
        "share_of_copy": speed / bandwidth,
        "sector_mb": moved / 1e6,
        "share_of_bound": moved / spread.p50 / 1e6 / bandwidth,
    }


def random_ids(table_rows: int, ids: int, sets: int, device: torch.device) -> list[Tensor]:
    """Sets to take turns, so that no run finds the rows of the one before in the cache."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randint(0, table_rows, (ids,), device=device, generator=generator) for _ in range(sets)]


def dense_terms(dim: int, ids: int, device: torch.device) -> tuple[AddedRows, AddedRows]:
    """Eight actions, and the positions of sequences of 2048."""
    places = torch.arange(ids, device=device)
    tables = [torch.randn(rows, dim, device=device).to(torch.bfloat16) for rows in (8, 2048)]
    return AddedRows(tables[0], places % 8), AddedRows(tables[1], places % 2048)


def _ways(
    table: PackedRows, both: dict[str, AddedRows], device: torch.device, tile: Mapping[str, int] | None
) -> dict[str, tuple[GatherRows, dict[str, AddedRows]]]:
    """Each way with the terms that it adds; the kernel with ids of actions and positions in eight bytes and in four."""
    fast = "triton" if device.type == "cuda" else "eager"
    forms: dict[str, dict[str, AddedRows]] = {"": {}, "-action-position": both}
    if fast == "triton":
        forms["-action-position-int32"] = {key: AddedRows(term.table, term.ids.int()) for key, term in both.items()}
    ways = {f"{fast}{suffix}": (_way(table, terms, fast, tile), terms) for suffix, terms in forms.items()}
    fbgemm = _fbgemm(table)
    if fbgemm is not None:
        ways["fbgemm-tbe"] = fbgemm, {}
    return {"eager": (_way(table, {}, "eager", None), {}), **ways}


def _way(table: PackedRows, terms: Mapping[str, AddedRows], backend: str, tile: Mapping[str, int] | None) -> GatherRows:
    if tile is not None:
        return with_tile(table, [(term.table, term.ids) for term in terms.values()], GatherTile(**tile))
    actions, positions = terms.get("actions"), terms.get("positions")
    return lambda ids: gather_rows(table, ids, actions=actions, positions=positions, backend=backend)


def with_tile(table: PackedRows, added: Sequence[tuple[Tensor, Tensor]], tile: GatherTile) -> GatherRows:
    """The Triton gather of a tile."""
    from hstu_kernels.int4.triton.launch import triton_gather

    return lambda ids: triton_gather(table, ids, item_scale=1.0, added=added, dtype=torch.bfloat16, tile=tile)


def _fbgemm(table: PackedRows) -> GatherRows | None:
    """FBGEMM's INT4 lookup over a copy of the table, where it is installed and knows the device."""
    try:
        from hstu_plugin.adapters.fbgemm import to_tbe
    except ImportError as error:
        print(f"FBGEMM's lookup is left out: {str(error).splitlines()[0]}")
        return None
    try:
        lookup = to_tbe({"item": table}, output_dtype=torch.bfloat16)
        probe = torch.zeros(1, dtype=torch.int32, device=table.device)
        lookup(probe, torch.tensor([0, 1], dtype=torch.int32, device=table.device))
    except (RuntimeError, NotImplementedError) as error:
        print(f"FBGEMM's lookup is left out: {str(error).splitlines()[0]}")
        return None
    prepared: dict[int, tuple[Tensor, Tensor]] = {}

    def look_up(ids: Tensor) -> Tensor:
        # Its ids are int32; the conversion is not part of the measurement.
        key = ids.data_ptr()
        if key not in prepared:
            # A bag for each id: its kernel walks through a bag one row after the other.
            prepared[key] = ids.int(), torch.arange(ids.numel() + 1, dtype=torch.int32, device=ids.device)
        out: Tensor = lookup(*prepared[key])
        return out

    return look_up


def _check(
    name: str, way: GatherRows, table: PackedRows, ids: Tensor, terms: dict[str, AddedRows], allowed: float
) -> None:
    """The first and the last rows against the definition."""
    out = way(ids)
    for part in (slice(0, _CHECKED), slice(-_CHECKED, None)):
        own = {key: AddedRows(term.table, term.ids[part]) for key, term in terms.items()}
        expected = gather_rows(table, ids[part], actions=own.get("actions"), positions=own.get("positions"),
                               backend="reference")  # fmt: skip
        expect_close(name, out[part], expected, allowed)


def sweep_times(
    device: torch.device, *, dims: Sequence[int], table_rows: int, ids: int, copy_bytes: int, id_sets: int
) -> Iterator[Row]:
    """The Triton gather with tiles of several sizes; and, with the built-in one, other orders of ids and table sizes.

    Sorted and sequential ids and small tables show what the random order costs.

    Raises:
        RuntimeError: a tile gives other numbers than the definition.
    """
    tiles = [
        GatherTile(units=32 * warps * units, warps=warps, words=words)
        for warps in (2, 4, 8) for units in (1, 2, 4, 8) for words in (1, 2, 4, 8) if words <= units
    ]  # fmt: skip
    for dim in dims:
        bandwidth = copy_bandwidth(device, copy_bytes)
        table = random_table(table_rows, dim, device)
        sets = random_ids(table_rows, ids, id_sets, device)
        actions, positions = dense_terms(dim, ids, device)
        both = [(term.table, term.ids) for term in (actions, positions)]
        cases = [("random", tile, table, sets) for tile in tiles]
        cases += [("sorted", TILE, table, [some.sort().values for some in sets])]
        cases += [("sequential", TILE, table, [torch.arange(ids, device=device) % table_rows] * id_sets)]
        for share in (4, 16, 64):
            part = PackedRows(table.data[: max(1, table_rows // share)], dim)
            cases.append(("random", TILE, part, [some % part.num_rows for some in sets]))
        for order, tile, rows, some in cases:
            for terms in ([], both):
                run = with_tile(rows, terms, tile)
                added = {"actions": actions, "positions": positions} if terms else {}
                _check(f"{order} at dim {dim}, {tile}", run, rows, some[0], added, 0.0)
                calls = [lambda asked=asked, run=run: run(asked) for asked in some]  # type: ignore[misc]
                yield {
                    "op": "sweep",
                    "way": f"{order}{'-action-position' if terms else ''}",
                    "dim": dim,
                    "table_rows": rows.num_rows,
                    "table_gib": rows.nbytes / 2**30,
                    "ids": ids,
                    "units": tile.units,
                    "warps": tile.warps,
                    "words": tile.words,
                    **measured(calls, device, rows, some, bandwidth),
                }
