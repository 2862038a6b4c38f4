"""Copies of the attention kernels with a stage taken out of their source, imported beside the shipped ones.

The whole folder ``hstu_kernels/attention/triton`` is copied under another name, so that a stage that several kernels
share is gone from all of them, and so that nothing that the shipped modules remember is touched.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import hstu_kernels

PACKAGE = "hstu_kernels.attention.triton"


class StalePatch(ValueError):
    """The source of a kernel is no longer what an edit was written for."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """In ``module``, a file of the folder without its suffix, ``old`` stands ``count`` times and becomes ``new``.

    ``optional``: or it does not stand there at all, since another edit of the stage takes its place.
    """

    module: str
    old: str
    new: str
    count: int = 1
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What is taken out, or timed alone.

    Attributes:
        name: column ``stage``. edits: what takes it out; with none of them the kernels are the shipped ones.
        needed: which gradients are asked for (q, k, v, position table, time table); ``None``: all there are.
        alone: what is left is timed alone; its share is that of what is left.
        visible: results change, so that a copy whose results do not is known not to run.
    """

    name: str
    edits: tuple[Edit, ...] = ()
    needed: tuple[bool, bool, bool, bool, bool] | None = None
    alone: bool = False
    visible: bool = True


WHOLE = Stage(name="whole", visible=False)


def patched_source(source: str, edits: Sequence[Edit], module: str) -> str:
    """``source`` of ``module`` after those of ``edits`` that are for it.

    Raises:
        StalePatch: a text does not stand there as often as its edit says.
    """
    for edit in edits:
        if edit.module != module:
            continue
        found = source.count(edit.old)
        if found != edit.count and not (edit.optional and found == 0):
            raise StalePatch(
                f"{PACKAGE}.{module}: expected {edit.count} times {edit.old!r}, found {found}; "
                "write the edit anew for the present source (benchmarks/stages)"
            )
        source = source.replace(edit.old, edit.new)
    return source


def write_copy(stage: Stage, folder: Path, name: str) -> None:
    """Write the folder of kernels, without ``stage``, as the package ``name`` into ``folder``.

    Raises:
        StalePatch: as `patched_source`, or an edit is for a file that there is not.
    """
    kernels = Path(hstu_kernels.__file__).parent / "attention" / "triton"
    files = {path.stem: path for path in sorted(kernels.glob("*.py"))}
    missing = {edit.module for edit in stage.edits} - set(files)
    if missing:
        raise StalePatch(f"{PACKAGE}: expected a module {', '.join(sorted(missing))}, found {', '.join(files)}")
    folder.mkdir(parents=True, exist_ok=True)
    for module, path in files.items():
        source = patched_source(path.read_text(encoding="utf-8"), stage.edits, module)
        (folder / path.name).write_text(re.sub(rf"\b{re.escape(PACKAGE)}\b", name, source), encoding="utf-8")


def package_name(stage: Stage) -> str:
    """Of the copy: the same in every process, so that compiled kernels are found again."""
    return "hstu_stages_" + re.sub(r"\W+", "_", stage.name)


@contextmanager
def imported_copy(stage: Stage, folder: Path) -> Iterator[Copy]:
    """The kernels without ``stage``, written into ``folder``; their modules are forgotten at the end."""
    name = package_name(stage)
    root = folder / name
    write_copy(stage, root, name)
    spec = importlib.util.spec_from_file_location(name, root / "__init__.py", submodule_search_locations=[str(root)])
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    try:
        spec.loader.exec_module(package)
        yield Copy(name)
    finally:
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[module]


@dataclass(frozen=True, slots=True)
class Copy:
    """An imported copy; ``name``: of its package."""

    name: str

    def module(self, name: str) -> ModuleType:
        """The copy of ``hstu_kernels.attention.triton.<name>``."""
        return importlib.import_module(f"{self.name}.{name}")
