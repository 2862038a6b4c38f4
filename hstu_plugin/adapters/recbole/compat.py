"""What stock RecBole 1.2.1 needs to be usable today: NumPy 2 names, no ray, safe checkpoints, full speed.

Imported by the import hooks while RecBole itself is being imported, hence no import of RecBole or torch up here.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from hstu_plugin._hook import RepairFinder
from hstu_plugin._versions import check_versions

_QUICK_START = "recbole.quick_start.quick_start"
_SINE = "recbole.model.sequential_recommender.sine"
_STUB_MARK = "__hstu_plugin_stub__"


def require_recbole() -> None:
    """Check that RecBole is there and its surroundings fit, and make it usable.

    Raises:
        ImportError: with the command that repairs it.
    """
    if importlib.util.find_spec("recbole") is None:
        raise ImportError(
            "RecBole is not installed.\n"
            "  to repair, in a clone of hstu-plugin: pip install '.[recbole]' && pip install --no-deps recbole==1.2.1\n"
            "  (--no-deps because RecBole's metadata demands ray<=2.6.3, which only its own tuner uses)"
        )
    check_versions(doors=("recbole",))
    prepare()


def prepare() -> None:
    """Give NumPy 2 the names that RecBole's Config reads, and let torch read our checkpoints; as often as you like."""
    import numpy as np

    # RecBole sets np.float = np.float_ and the like in every Config, before any model of ours is known.
    for removed, kept in (("float_", np.float64), ("complex_", np.complex128), ("unicode_", np.str_)):
        if removed not in vars(np):
            setattr(np, removed, kept)
    if "torch.serialization" in sys.modules:
        importlib.import_module("hstu_plugin.adapters.recbole.checkpoint").allow_checkpoints()


def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    """Answer `RepairFinder` for ``recbole``, its submodules, and ``ray`` when RecBole's quick start imports it."""
    _drop_ray_stub()
    if name == "recbole":
        prepare()
    if name not in ("ray", _QUICK_START, _SINE):
        return None
    spec = _spec_of_others(name, path, target)
    if name == "ray":
        loader = _RayLoader(spec.loader if spec is not None else None)
        if spec is None:
            return ModuleSpec("ray", loader, origin="hstu_plugin")
        spec.loader = loader
    elif spec is not None and spec.loader is not None:
        spec.loader = (_QuickStartLoader if name == _QUICK_START else _SineLoader)(spec.loader)
    return spec


def _spec_of_others(name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        if not isinstance(finder, RepairFinder):
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                return spec
    return None


class _WrappingLoader(Loader):
    def __init__(self, real: Loader) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec)


class _SineLoader(_WrappingLoader):
    """RecBole's SINE without its ``set_detect_anomaly(True)``.

    That slows down every backward of the process, whichever model it trains: RecBole imports all of them.
    """

    def exec_module(self, module: ModuleType) -> None:
        _give_back(module, self.real)
        torch = importlib.import_module("torch")
        before = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
        try:
            self.real.exec_module(module)
        finally:
            torch.autograd.set_detect_anomaly(*before)


class _QuickStartLoader(_WrappingLoader):
    """RecBole's quick start as it is; afterwards the stand-in for ray is gone and our checkpoints are readable."""

    def exec_module(self, module: ModuleType) -> None:
        _give_back(module, self.real)
        try:
            self.real.exec_module(module)
        finally:
            _drop_ray_stub()
        prepare()


class _RayLoader(Loader):
    """The installed ray where it can be imported, and otherwise a stand-in that lives for this one import."""

    def __init__(self, real: Loader | None) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None if self.real is None else self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        reason = "it is not installed"
        if self.real is not None:
            before, names = set(sys.modules), dict(vars(module))
            try:
                self.real.exec_module(module)
                importlib.import_module("ray.tune")
            except Exception as error:  # old releases fail in many ways beside NumPy 2 or new setuptools
                reason = f"it cannot be imported: {type(error).__name__}: {error}"
                for name in set(sys.modules) - before:
                    if name.startswith("ray."):
                        del sys.modules[name]
                vars(module).clear()
                vars(module).update(names)
            else:
                _give_back(module, self.real)
                return
        tune = ModuleType("ray.tune")
        vars(tune)["report"] = _report_nowhere(reason)
        vars(module).update({"tune": tune, _STUB_MARK: True})


def _report_nowhere(reason: str) -> Any:
    def report(*_: Any, **__: Any) -> None:
        # As the real one outside of a ray session; RecBole's hyperopt tuner runs through here, too, and needs no ray.
        logging.getLogger(__name__).warning(
            "ray.tune.report: nothing listens, as there is no ray (%s); RecBole's hyperopt tuning is not affected",
            reason,
        )

    return report


def _drop_ray_stub() -> None:
    if _STUB_MARK in vars(sys.modules.get("ray", ModuleType("ray"))):
        del sys.modules["ray"]


def _give_back(module: ModuleType, loader: Loader) -> None:
    """Leave no trace of the wrapping loader in the module, so that inspect and reload see the real one."""
    module.__loader__ = loader
    if module.__spec__ is not None:
        module.__spec__.loader = loader
