"""How RecBole, which has no plug-in interface, finds our models: import hooks, standard library only.

`activate` runs at ``import hstu_plugin`` and, through the entry point group ``torch.backends``, at the end of
``import torch``, which every RecBole script does. It only adds to ``sys.meta_path``; RecBole, NumPy and our own code
are imported when a RecBole module is asked for. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` switches the entry point off.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Class names in hstu_plugin.adapters.recbole.model; RecBole asks for the module of the lower-case name.
MODELS = ("HSTU", "ULTRAHSTU")
# Further names of these; a class cannot be called so.
ALIASES = {"ULTRA-HSTU": "ULTRAHSTU"}
# Models that take RecBole's own trainer, data set and defaults, with the modules that they live in.
OTHERS = {"PopularitySequential": "hstu_plugin.adapters.recbole.popularity"}

_HOME = "recbole.model.sequential_recommender."
_QUICK_START = "recbole.quick_start.quick_start"


class ModelFinder(MetaPathFinder):
    """Serves ``recbole.model.sequential_recommender.<name>`` for our models; asked last, after RecBole's own."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.startswith(_HOME):
            for name in (*MODELS, *ALIASES, *OTHERS):
                if fullname == _HOME + name.lower():
                    return ModuleSpec(fullname, _ModelLoader(name), origin="hstu_plugin")
        return None


class _ModelLoader(Loader):
    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        if self.name in OTHERS:
            found = getattr(importlib.import_module(OTHERS[self.name]), self.name)
        else:
            models = importlib.import_module("hstu_plugin.adapters.recbole.register").register()
            found = models[ALIASES.get(self.name, self.name)]
        setattr(module, self.name, found)


class RepairFinder(MetaPathFinder):
    """Hands imports of RecBole, and of ray by RecBole's quick start, to `hstu_plugin.adapters.recbole.compat`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(("recbole", "ray")):
            return None
        if fullname == "ray":
            # Only while quick_start is being executed; other programs get their own ray or their own error.
            importer = sys.modules.get(_QUICK_START)
            if importer is None or hasattr(importer, "run_recbole"):
                return None
        elif fullname != "recbole" and not fullname.startswith("recbole."):
            return None
        compat = importlib.import_module("hstu_plugin.adapters.recbole.compat")
        spec: ModuleSpec | None = compat.find_spec(fullname, path, target)
        return spec


def activate() -> None:
    """Install the finders, once. Never raises: an error here would break ``import torch`` for everybody."""
    with suppress(Exception):
        if not any(isinstance(finder, ModelFinder) for finder in sys.meta_path):
            sys.meta_path.append(ModelFinder())
            sys.meta_path.insert(0, RepairFinder())
        if "recbole" in sys.modules:
            importlib.import_module("hstu_plugin.adapters.recbole.compat").prepare()
