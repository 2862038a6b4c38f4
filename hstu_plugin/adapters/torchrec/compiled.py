"""Exported scorers compiled ahead of time, each package loaded once before it is handed over."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_TIMEOUT_S = 300
_LOAD = "import sys, faulthandler, torch; faulthandler.enable(); torch._inductor.aoti_load_package(sys.argv[1])"


def compile_scorer(
    program: torch.export.ExportedProgram, path: str | Path, *, settings: Mapping[str, Any] | None = None
) -> Path:
    """Compile an exported scorer with AOTInductor, and load the package in a fresh process.

    The package is linked with the C++ runtime that PyTorch has loaded. A compiler that links its own copy of it into
    the package makes two, and the package then fails or ends the process while it is loaded.

    Args:
        program: of `export_scorer`; the package serves the kind of device that its weights are on.
        path: of the package, ``*.pt2``; it comes into being whole, and only where it loads.
        settings: of PyTorch's inductor for this package.

    Returns:
        ``path``; ``torch._inductor.aoti_load_package`` reads it.

    Raises:
        RuntimeError: a fresh process could not load the package; says how it ended.
        ValueError: the path does not end in ``.pt2``.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"path: expected a file *.pt2, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        package = Path(folder) / path.name
        with _same_runtime() as linked:
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(package), inductor_configs={**linked, **(settings or {})}
            )
        _check(package)
        os.replace(package, path)
    return path


def _check(package: Path) -> None:
    words = [sys.executable, "-c", _LOAD, str(package)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        how, said = f"did not answer in {_TIMEOUT_S} s", ""
    else:
        if not done.returncode:
            return
        code = done.returncode
        # A negative code is the signal that ended the process.
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        said = done.stderr[-2000:].strip()
    raise RuntimeError(
        f"program: it was compiled, but a fresh process that loaded the package {how}; nothing was written. Serve the "
        "exported program (torch.export.save and load), which needs no C++ compiler, or take another compiler (CXX). "
        f"The process said: {said or 'nothing'}"
    )


@contextmanager
def _same_runtime() -> Iterator[dict[str, Any]]:
    """Settings, and while they are used the search path, that link packages with the C++ runtime of this process."""
    runtime = _loaded_runtime()
    # PyTorch 2.6 has no such setting.
    if runtime is None or not hasattr(torch._inductor.config.aot_inductor, "custom_op_libs"):
        yield {}
        return
    before = os.environ.get("LIBRARY_PATH")
    os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, (before, str(runtime.parent))))
    try:
        # A header that is compiled ahead would get the library, too, and the compiler would start to link it.
        yield {"aot_inductor.custom_op_libs": [f":{runtime.name}"], "aot_inductor.precompile_headers": False}
    finally:
        if before is None:
            del os.environ["LIBRARY_PATH"]
        else:
            os.environ["LIBRARY_PATH"] = before


def _loaded_runtime() -> Path | None:
    """The libstdc++ in this process, on Linux."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = (Path(line.split(maxsplit=5)[-1]) for line in lines if "/libstdc++.so.6" in line)
    return next((path for path in found if path.is_file()), None)


def has_compiler() -> bool:
    """Whether PyTorch's inductor would find its C++ compiler."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None
