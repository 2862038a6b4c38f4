"""Sharded checkpoints: written beside the training, whole or not at all, checked before they are used.

A checkpoint is a folder ``step-<n>`` of torch.distributed.checkpoint's files, tensors only, and ``manifest.json`` with
their sizes and SHA-256 sums and with plain data (position, options). It comes into being by one rename after all ranks
have written. Tensors are read with ``weights_only``; the index, which torch pickles, through a reader that knows the
classes of an index and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from hstu_plugin.records import write_json

FORMAT = 1
_MANIFEST, _INDEX = "manifest.json", ".metadata"
_BLOCK = 1 << 22
_META = "torch.distributed.checkpoint.metadata"
_INDEX_NAMES = {
    *((_META, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata")),
    *((_META, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
    *((_META, name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the folder and why."""


class Checkpoints:
    """The checkpoints of one training, on a file system that all ranks see.

    Every method is called by all ranks of the default process group alike.

    Args:
        folder: where they lie. keep: how many of the newest stay.
        group: a gloo group of all ranks that nobody else uses, since the writer works beside the training.
    """

    def __init__(self, folder: Path, *, keep: int, group: dist.ProcessGroup) -> None:
        self.folder, self.keep, self.group = folder, keep, group
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(".writing-*"):
                shutil.rmtree(left, ignore_errors=True)
        dist.barrier(group=group)

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint; the tensors may change as soon as this returns.

        Waits for the one before. ``info`` is plain data in JSON types.
        """
        self.wait()
        writing, final = self.folder / f".writing-{step:012d}", self.folder / f"step-{step:012d}"
        if dist.get_rank() == 0 and writing.exists():
            shutil.rmtree(writing)
        dist.barrier(group=self.group)
        # Returns once it has copied the tensors to host memory.
        written = async_save(dict(tensors), storage_writer=FileSystemWriter(str(writing)), process_group=self.group)
        assert isinstance(written, Future)
        self._pending = self._pool.submit(self._finish, written, writing, final, step, dict(info))

    def wait(self) -> None:
        """Until the last checkpoint is complete; raises what went wrong with it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait, and end the writing thread."""
        self.wait()
        self._pool.shutdown()

    def newest(self, say: Any = print) -> Path | None:
        """The newest checkpoint that is whole; ``say`` is told of every newer one that is not (rank 0)."""
        found: list[Path | None] = [None]
        if dist.get_rank() == 0:
            for path in sorted(self.folder.glob("step-*"), reverse=True):
                try:
                    verify(path)
                except CheckpointError as error:
                    say(f"{error}; trying the one before")
                    continue
                found = [path]
                break
        dist.broadcast_object_list(found, src=0, group=self.group)
        return found[0]

    def load(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Read ``path`` into ``tensors``, in place, sharded as these are; returns the plain data."""
        load(dict(tensors), storage_reader=SafeReader(str(path)), process_group=self.group)
        return read_info(path)

    def _finish(self, written: Future[Any], writing: Path, final: Path, step: int, info: dict[str, Any]) -> None:
        written.result()
        if dist.get_rank() == 0:
            sums = {path.name: [path.stat().st_size, _digest(path)] for path in sorted(writing.iterdir())}
            write_json(writing / _MANIFEST, {"format": FORMAT, "step": step, "files": sums, "info": info})
            if final.exists():
                shutil.rmtree(final)
            os.rename(writing, final)
            for old in sorted(self.folder.glob("step-*"), reverse=True)[self.keep :]:
                shutil.rmtree(old, ignore_errors=True)
        dist.barrier(group=self.group)


class SafeReader(FileSystemReader):
    """torch's reader, with an index that cannot run code and no pickled objects beside the tensors."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the checkpoint."""
        with open(Path(str(self.path)) / _INDEX, "rb") as file:
            metadata = _IndexUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{self.path}: its index is no index of tensors")
        pickled = [
            name for name, kind in metadata.state_dict_metadata.items() if isinstance(kind, BytesStorageMetadata)
        ]
        if pickled:
            raise CheckpointError(f"{self.path}: holds pickled objects {pickled}, which are never read")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in _INDEX_NAMES:
            return super().find_class(module, name)
        raise CheckpointError(f"the index of a checkpoint names {module}.{name}, which is not part of one")


def verify(path: Path) -> None:
    """Raise ``CheckpointError`` unless the folder holds exactly what its manifest says."""
    files = _manifest(path)["files"]
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{path}: {name} has {file.stat().st_size} bytes, expected {size}: truncated")
        if _digest(file) != digest:
            raise CheckpointError(f"{path}: {name} is corrupt: its SHA-256 sum is another")


def read_info(path: Path) -> dict[str, Any]:
    """The plain data of a checkpoint."""
    info: dict[str, Any] = _manifest(path)["info"]
    return info


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or not isinstance(manifest["files"], dict) or not manifest["files"]:
            raise ValueError(f"format {manifest.get('format')!r}, expected {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no usable {_MANIFEST}: {error}") from None
    checked: dict[str, Any] = manifest
    return checked


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            total.update(block)
    return total.hexdigest()
