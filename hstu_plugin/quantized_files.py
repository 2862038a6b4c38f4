"""Quantised tables on disk: one safetensors file, checked before anything of it is used.

safetensors holds tensors and strings and cannot carry code; it is read lazily and mapped into memory, so that a table
larger than the free memory of a machine can be opened.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hstu_kernels.int4 import PackedRows, RowFormat
from hstu_plugin.quantize import replace_modules, table_groups
from hstu_plugin.quantized_embedding import QuantizedEmbedding

FILE_FORMAT = "hstu-plugin/quantized-tables"
# Raised when a field changes its meaning or goes away; new fields leave it alone.
FORMAT_VERSION = 1


class TableFileError(ValueError):
    """A file of quantised tables cannot be used; the message names the file and what to do."""


@dataclass(frozen=True, slots=True)
class TableFile:
    """What a file holds.

    Attributes:
        tables: packed rows by module name.
        notes: the strings that were saved along.
    """

    tables: dict[str, PackedRows]
    notes: dict[str, str]


def save_tables(
    path: str | os.PathLike[str], tables: Mapping[str, PackedRows], *, notes: Mapping[str, str] | None = None
) -> None:
    """Write tables so that ``path`` is at any time the old file or the new one.

    Args:
        path: of the file, by custom ``*.safetensors``.
        tables: by name, at least one.
        notes: strings to keep along, such as the checkpoint they were made from.

    Raises:
        ValueError: there is no table.
    """
    if not tables:
        raise ValueError("tables: expected at least one table, got none")
    target = Path(path)
    described = {
        name: {"dtype": str(rows.format), "rows": rows.num_rows, "dim": rows.dim} for name, rows in tables.items()
    }
    metadata = {
        "format": FILE_FORMAT,
        "format_version": str(FORMAT_VERSION),
        "tables": json.dumps(described, sort_keys=True),
        "notes": json.dumps(dict(notes or {}), sort_keys=True),
    }
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    try:
        save_file({name: rows.data.cpu() for name, rows in tables.items()}, temporary, metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_tables(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> TableFile:
    """Read and check a file written by `save_tables`.

    Raises:
        TableFileError: there is no such file, it is damaged, of another kind or a newer version, or its tables are not
            of the sizes and types that it states.
    """
    name = os.fspath(path)
    if not os.path.isfile(path):
        raise TableFileError(f"tables {name!r}: there is no such file")
    try:
        with safe_open(name, framework="pt", device=str(device)) as file:
            described, notes = _metadata(name, file.metadata() or {})
            stored = set(file.keys())
            if stored != described.keys():
                raise TableFileError(
                    f"tables {name!r}: expected the tables {', '.join(sorted(described))}, found "
                    f"{', '.join(sorted(stored)) or 'none'}; write the file again"
                )
            tables = {key: _checked(name, key, file.get_tensor(key), entry) for key, entry in described.items()}
    except (SafetensorError, OSError) as error:
        raise TableFileError(
            f"tables {name!r}: the file is damaged, cut off or no safetensors file ({error}); write it again"
        ) from error
    return TableFile(tables, notes)


def quantized_tables(module: nn.Module) -> dict[str, PackedRows]:
    """The quantised tables of a model by module name; a table at several places under its first name."""
    return {name: found.rows for name, found in module.named_modules() if isinstance(found, QuantizedEmbedding)}


def apply_tables(module: nn.Module, tables: Mapping[str, PackedRows]) -> nn.Module:
    """Put quantised tables in the places of a model's full-precision ones; in place, as `hstu_plugin.quantize`.

    Args:
        module: the model that the tables were made from, with its weights loaded.
        tables: by module name.

    Returns:
        the module, in evaluation mode, or its replacement when it was a table itself.

    Raises:
        ValueError: a table has no place in the model, or another shape than what stands there.
    """
    here = {name: found for name, found in module.named_modules() if isinstance(found, nn.Embedding)}
    for name, rows in tables.items():
        if name not in here:
            raise ValueError(
                f"tables: expected names of embeddings of this model ({', '.join(here) or 'it has none'}), got {name!r}"
            )
        shape = tuple(here[name].weight.shape)
        if (rows.num_rows, rows.dim) != shape:
            raise ValueError(
                f"tables[{name!r}]: expected {shape} as the model's, got {(rows.num_rows, rows.dim)}; the data set or "
                "the model's width has changed since the tables were made: quantise again"
            )
    replacements: dict[int, nn.Module] = {}
    for group in table_groups(module, tables):
        key = next(name for name in group.names if name in tables)
        replacements |= group.replacements(tables[key].to(group.weight.device))
    return replace_modules(module.eval(), replacements)


def _metadata(name: str, metadata: Mapping[str, str]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    if metadata.get("format") != FILE_FORMAT:
        raise TableFileError(
            f"tables {name!r}: expected a file of the format {FILE_FORMAT!r}, got {metadata.get('format')!r}; "
            "hstu-quantize writes such files"
        )
    version = metadata.get("format_version", "")
    if not version.isdigit() or int(version) > FORMAT_VERSION:
        raise TableFileError(
            f"tables {name!r}: expected format version {FORMAT_VERSION} or lower, got {version!r}; "
            "update hstu-plugin, or write the file again with this one"
        )
    try:
        described, notes = json.loads(metadata["tables"]), json.loads(metadata.get("notes", "{}"))
        entries = {
            str(key): {"dtype": str(entry["dtype"]), "rows": int(entry["rows"]), "dim": int(entry["dim"])}
            for key, entry in described.items()
        }
        return entries, {str(key): str(value) for key, value in notes.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TableFileError(f"tables {name!r}: the description of the tables is damaged ({error!r})") from error


def _checked(file: str, name: str, data: Tensor, entry: Mapping[str, Any]) -> PackedRows:
    try:
        rows = PackedRows(data, entry["dim"], RowFormat.parse(entry["dtype"]))
    except (TypeError, ValueError) as error:
        raise TableFileError(f"tables {file!r}: table {name!r}: {error}") from error
    if rows.num_rows != entry["rows"]:
        raise TableFileError(
            f"tables {file!r}: table {name!r}: expected {entry['rows']} rows as stated, got {rows.num_rows}"
        )
    return rows
