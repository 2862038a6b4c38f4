"""HSTU and ULTRA-HSTU sequential recommenders.

Importing this package is light (no torch) and lets RecBole find our models by name; see `hstu_plugin._hook`.
The model code lives in the submodules: ``config``, ``sequence``, ``encoder``, ``retrieval``, and in ``adapters``.
"""

from __future__ import annotations

from hstu_plugin import _hook

__all__ = ["__version__"]

_hook.activate()


def __getattr__(name: str) -> str:
    # On request only: importlib.metadata costs more to import than the rest of this package.
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("hstu-plugin")
        except PackageNotFoundError:
            return "0+source"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
