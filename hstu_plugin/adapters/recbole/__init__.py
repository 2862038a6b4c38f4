"""RecBole: our models in its configs, loaders, trainers and evaluation.

`run` and `load` are imported on first use, so that the import hooks can reach this package without RecBole.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hstu_plugin.adapters.recbole.runner import LoadedRun, RunResult, load, run

__all__ = ["LoadedRun", "RunResult", "load", "run"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("hstu_plugin.adapters.recbole.runner"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
