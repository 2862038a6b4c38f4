"""The files of a converted data set: parts of parquet, vocabularies, and the trainer's configuration."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from hstu_plugin.adapters.torchrec.options import TableOptimizer
from hstu_plugin.adapters.torchrec.options_file import options_from_dict
from hstu_plugin.adapters.torchrec.parquet import Array
from hstu_plugin.records import plain, write_text

CONFIG = "config.yaml"
# Of weights, gradients and moments of tables that every rank may hold.
_REPLICATED_BYTES = 4 << 30
# Small groups: what a step reads lies in many places, and a reader decodes whole groups.
_ROWS_OF_GROUP, _ROWS_OF_FILE = 256, 1 << 16


@dataclass(frozen=True, slots=True)
class Dataset:
    """What was written: rows by part, and the configuration file."""

    rows: Mapping[str, int]
    config: Path


def table_optimizer(rows: int, width: int) -> str:
    """The other doors' AdamW of all rows, on every device; for tables of more than 4 GiB that of the rows of a step.

    Args:
        rows: of all tables. width: of their rows, float32.
    """
    small = 16 * width * rows <= _REPLICATED_BYTES
    return (TableOptimizer.DENSE_ADAMW if small else TableOptimizer.ADAMW).value


def jagged(values: Array, starts: Array, ends: Array) -> pa.LargeListArray:
    """One list ``values[start:end]`` for each row."""
    lengths = ends - starts
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    places = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values[places]))


def write_dataset(
    out: Path,
    parts: Mapping[str, pa.Table],
    config: Mapping[str, Any],
    vocabularies: Mapping[str, pa.Table],
    *,
    name: str,
) -> Dataset:
    """Write everything below ``out``; the folder comes into being whole or not at all.

    Raises:
        FileExistsError: it exists. ValueError: the configuration does not fit itself.
    """
    options_from_dict(config)
    if out.exists():
        raise FileExistsError(f"{out}: it exists; choose another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        for part, table in parts.items():
            (building / part).mkdir()
            for number, first in enumerate(range(0, max(1, table.num_rows), _ROWS_OF_FILE)):
                file = building / part / f"part-{number:05d}.parquet"
                pq.write_table(table.slice(first, _ROWS_OF_FILE), file, row_group_size=_ROWS_OF_GROUP)
        for title, table in vocabularies.items():
            pq.write_table(table, building / f"{title}.parquet")
        head = f"# {name}: written by hstu-torchrec-data. Start it with: torchx run -s local_cwd hstu.train --config "
        write_text(
            building / CONFIG,
            f"{head}{out.resolve() / CONFIG}\n{yaml.safe_dump(plain(config), sort_keys=False, width=110)}",
        )
        os.chmod(building, 0o755)
        os.rename(building, out)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return Dataset({part: table.num_rows for part, table in parts.items()}, out / CONFIG)
