"""Which releases fit together, and a clear error when those installed do not.

Standard library only: the check reads metadata and imports neither torch nor anything that needs it.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

PYTHON_MIN = (3, 11)
PYTHON_BELOW = (3, 13)
TORCH_MIN = (2, 6)
PANDAS_BELOW_FOR_RECBOLE = (3, 0)
DOORS = ("recbole", "torchrec")

Release = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """One torch release and the releases built for it, each as (major, minor)."""

    torch: Release
    triton: Release
    fbgemm: Release
    torchrec: Release
    run: str = "the range allows it; not run by us"


# triton: the requirement in torch's own metadata. fbgemm: FBGEMM's release table, one release per torch release.
MATCHES = (
    Match(
        torch=(2, 6),
        triton=(3, 2),
        fbgemm=(1, 1),
        torchrec=(1, 1),
        run="the test suite, CPU, Python 3.11",
    ),
    Match(torch=(2, 7), triton=(3, 3), fbgemm=(1, 2), torchrec=(1, 2)),
    Match(torch=(2, 8), triton=(3, 4), fbgemm=(1, 3), torchrec=(1, 3)),
    Match(torch=(2, 9), triton=(3, 5), fbgemm=(1, 4), torchrec=(1, 4)),
    Match(torch=(2, 10), triton=(3, 6), fbgemm=(1, 5), torchrec=(1, 5)),
    Match(
        torch=(2, 11),
        triton=(3, 6),
        fbgemm=(1, 6),
        torchrec=(1, 6),
        run="trainings and the CUDA tests on an H100, Python 3.12",
    ),
    Match(torch=(2, 12), triton=(3, 7), fbgemm=(1, 7), torchrec=(1, 7)),
    Match(
        torch=(2, 13),
        triton=(3, 7),
        fbgemm=(1, 8),
        torchrec=(1, 8),
        run="installed by `make install`; the test suite, CPU, Python 3.11",
    ),
    Match(torch=(2, 14), triton=(3, 8), fbgemm=(1, 9), torchrec=(1, 9)),
)
# The row that constraints.txt installs.
TESTED = next(match for match in MATCHES if match.torch == (2, 13))

_CHECKED = ("torch", "triton", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchrec", "recbole", "pandas")
# Distributions worth a line in a result file.
_RECORDED = ("hstu-plugin", *_CHECKED, "numpy", "scipy", "scikit-learn", "torchx")


def check_versions(installed: Mapping[str, str] | None = None, *, doors: Collection[str] = DOORS) -> None:
    """Refuse a set of releases that cannot work; what is absent is never an error.

    Args:
        installed: version by distribution name, and the interpreter's as ``python``; default: this environment.
        doors: which of ``recbole`` and ``torchrec`` to check besides the core. The core alone: ``()``.

    Raises:
        ImportError: names the pair, what was found, what is supported and the command that repairs it.
        ValueError: for a door that does not exist.
    """
    for door in doors:
        if door not in DOORS:
            raise ValueError(f"doors: expected a subset of {DOORS}, got {door!r}")
    found = installed_versions(_CHECKED) if installed is None else installed
    _check_core(found)
    if "recbole" in doors:
        _check_recbole(found)
    if "torchrec" in doors:
        _check_torchrec(found)


def installed_versions(names: Iterable[str] = _RECORDED) -> dict[str, str]:
    """Version by distribution name, of those asked for that are installed, and of ``python``."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def runtime_versions() -> dict[str, str]:
    """What a result file records of its machine: installed_versions(), operating system and architecture."""
    return {
        **installed_versions(),
        "platform": sys.platform,
        "machine": platform.machine(),
    }


def source_commit(root: Path | None = None) -> str | None:
    """Commit of the source that runs, with ``-dirty`` behind it where tracked files differ; None outside a checkout.

    Args:
        root: folder that holds the package; default: where this module was imported from.
    """
    root = Path(__file__).resolve().parents[1] if root is None else root
    # An installed package may lie somewhere inside another project's repository.
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def version_table() -> list[dict[str, str]]:
    """The supported rows, newest first, in words: columns torch, triton, fbgemm-gpu, torchrec and what we ran."""
    rows = []
    for match in reversed(MATCHES):
        rows.append(
            {
                "torch": f"{_text(match.torch)}.*",
                "triton": f"{_text(match.triton)}.*",
                "fbgemm-gpu": f"{_text(match.fbgemm)}.*",
                "torchrec": f"{_text(match.torchrec)}.*",
                "run by us": match.run,
            }
        )
    return rows


def _check_core(found: Mapping[str, str]) -> None:
    python = _release(found, "python")
    if python is not None and not PYTHON_MIN <= python < PYTHON_BELOW:
        raise _error(
            f"Python {found['python']}",
            f"Python >= {_text(PYTHON_MIN)}, < {_text(PYTHON_BELOW)}",
            "in a clone of hstu-plugin: python3.12 -m venv .venv && .venv/bin/pip install .",
        )
    torch, triton = _release(found, "torch"), _release(found, "triton")
    if torch is not None and torch < TORCH_MIN:
        raise _error(f"torch {found['torch']}", f"torch >= {_text(TORCH_MIN)}", "pip install 'torch==2.13.*'")
    match = _match(torch)
    # torch's compiler is written for the Triton of its release, and its CUDA builds require it. A newer one runs our
    # kernels; CPU builds compile nothing with it, so there any Triton may stand beside them.
    on_cpu = found.get("torch", "").endswith("+cpu")
    if match is not None and triton is not None and triton < match.triton and not on_cpu:
        raise _error(
            f"torch {found['torch']} with triton {found['triton']}",
            f"torch {_text(match.torch)} needs triton {_text(match.triton)}",
            f"pip install 'triton=={_text(match.triton)}.*'",
        )


def _check_recbole(found: Mapping[str, str]) -> None:
    pandas = _release(found, "pandas")
    if "recbole" in found and pandas is not None and pandas >= PANDAS_BELOW_FOR_RECBOLE:
        raise _error(
            f"recbole {found['recbole']} with pandas {found['pandas']}",
            f"pandas < {_text(PANDAS_BELOW_FOR_RECBOLE)}: with a newer one RecBole silently fills no missing value",
            "pip install 'pandas>=2.2,<3'",
        )


def _check_torchrec(found: Mapping[str, str]) -> None:
    cpu, cuda = found.get("fbgemm-gpu-cpu"), found.get("fbgemm-gpu")
    # "+cpu" is the module-free stand-in that leads TorchRec to fbgemm-gpu-cpu.
    if cpu is not None and cuda is not None and not cuda.endswith("+cpu"):
        raise _error(
            f"fbgemm-gpu {cuda} beside fbgemm-gpu-cpu {cpu}",
            "one of them, since both write the same files",
            "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && make install-torchrec",
        )
    torch = _release(found, "torch")
    if torch is None:
        return
    match = _match(torch)
    for name in ("fbgemm-gpu", "fbgemm-gpu-cpu", "torchrec"):
        release = _release(found, name)
        built_for = next((m for m in MATCHES if release == _part(m, name)), None)
        if release is None or built_for == match:
            continue
        fits = f"no {name} that we know of" if match is None else _wanted(match, name)
        raise _error(
            f"torch {found['torch']} with {name} {found[name]}",
            f"torch {_text(torch)} with {fits}; run by us: torch {_text(TESTED.torch)}.* with {_wanted(TESTED, name)}",
            "make install-torchrec",
        )


def _match(torch: Release | None) -> Match | None:
    return next((match for match in MATCHES if match.torch == torch), None)


def _part(match: Match, name: str) -> Release:
    return match.torchrec if name == "torchrec" else match.fbgemm


def _wanted(match: Match, name: str) -> str:
    return f"{name} {_text(_part(match, name))}.*"


def _release(found: Mapping[str, str], name: str) -> Release | None:
    """(major, minor) of an installed distribution; None when it is absent or its version is no release number."""
    digits = re.match(r"(\d+)\.(\d+)", found.get(name, ""))
    return None if digits is None else (int(digits[1]), int(digits[2]))


def _text(release: Release) -> str:
    return f"{release[0]}.{release[1]}"


def _error(found: str, supported: str, command: str) -> ImportError:
    return ImportError(f"hstu-plugin cannot run with {found}.\n  supported: {supported}\n  to repair: {command}")
