"""The direction of the imports, read from the source, and the core running where nothing but torch is installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels" / "hstu_kernels"
PLUGIN = ROOT / "hstu_plugin"
STDLIB = set(sys.stdlib_module_names)
# The doors: adapters, and what RecBole's and torch's entry points call.
DOORS = {"adapters", "_hook.py"}
# Turns the files of one door into data of another.
BRIDGE = "conversion"
FRAMEWORKS = {"recbole", "torchrec", "torchx"}
BACKENDS = {"reference.py", "eager.py", "triton", "hopper"}
FORBIDDEN_IN_CORE = ["recbole", "torchrec", "fbgemm_gpu", "triton", "torchx"]


def imports(path: Path, package_root: Path) -> Iterator[tuple[str, int]]:
    """Every absolute module name that ``path`` imports anywhere, also inside functions, with its line."""
    package = (package_root.name, *path.relative_to(package_root).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            parts = list(package[: len(package) - node.level + 1]) if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            # `from package import module` imports the module, too.
            yield base, node.lineno
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value), node.lineno


def top(name: str) -> str:
    return name.split(".")[0]


def sources(root: Path) -> list[Path]:
    found = sorted(root.rglob("*.py"))
    assert found, f"no sources under {root}"
    return found


def core_sources() -> list[Path]:
    return [path for path in sources(PLUGIN) if path.relative_to(PLUGIN).parts[0] not in DOORS]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources(KERNELS), ids=relative)
def test_kernels_import_torch_and_the_standard_library_only(path: Path) -> None:
    allowed = STDLIB | {"torch", "hstu_kernels"}
    if {"triton", "hopper"} & set(path.relative_to(KERNELS).parts[:-1]):
        allowed |= {"triton"}
    wrong = {f"{name} (line {line})" for name, line in imports(path, KERNELS) if top(name) not in allowed}
    assert not wrong


@pytest.mark.parametrize("path", core_sources(), ids=relative)
def test_core_imports_torch_kernels_and_itself_only(path: Path) -> None:
    allowed = STDLIB | {"torch", "hstu_kernels", "hstu_plugin"}
    if path.name == "quantized_files.py":
        # A file format, not a framework; nothing else of the core reads or writes tables.
        allowed |= {"safetensors"}
    found = list(imports(path, PLUGIN))
    assert not {f"{name} (line {line})" for name, line in found if top(name) not in allowed}
    assert not {f"{name} (line {line})" for name, line in found if name.startswith("hstu_plugin.adapters")}


@pytest.mark.parametrize("path", sources(KERNELS), ids=relative)
def test_backends_never_import_each_other(path: Path) -> None:
    parts = path.relative_to(KERNELS).parts
    own = next((part for part in parts if part in BACKENDS), None)
    if own is None:
        return
    others = {name.removesuffix(".py") for name in BACKENDS - {own}}
    ours = [found for found in imports(path, KERNELS) if top(found[0]) == "hstu_kernels"]
    wrong = {f"{name} (line {line})" for name, line in ours if others & set(name.split(".")[1:])}
    assert not wrong


def test_adapters_do_not_import_each_other() -> None:
    adapters = PLUGIN / "adapters"
    if not adapters.is_dir():
        return
    # Modules beside the folders are what several doors share; they know each other, and no door.
    shared = {path.stem for path in adapters.glob("*.py")}
    wrong = []
    for path in sorted(adapters.rglob("*.py")):
        own = path.relative_to(adapters).parts[0]
        if own == BRIDGE:
            continue
        for name, line in imports(path, PLUGIN):
            parts = name.split(".")
            if parts[:2] == ["hstu_plugin", "adapters"] and len(parts) > 2 and parts[2] not in {own, *shared}:
                wrong.append(f"{relative(path)} line {line} imports {name}")
    assert not wrong
    for path in sorted(adapters.glob("*.py")):
        known = {f"{name} (line {line})" for name, line in imports(path, PLUGIN) if top(name) in FRAMEWORKS}
        assert not known, relative(path)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import recbole.model", "recbole.model"),
        ("def f():\n    from torchrec import x", "torchrec.x"),
        ("from . import eager", "hstu_kernels.attention.eager"),
        ("from ..bias import RelativeBias", "hstu_kernels.bias"),
        ("import importlib\nimportlib.import_module('triton')", "triton"),
    ],
    ids=["plain", "inside-a-function", "relative", "relative-up", "by-string"],
)
def test_the_walk_finds_every_way_to_import(source: str, found: str, tmp_path: Path) -> None:
    file = tmp_path / "hstu_kernels" / "attention" / "probe.py"
    file.parent.mkdir(parents=True)
    file.write_text(source, encoding="utf-8")
    assert found in {name for name, _ in imports(file, tmp_path / "hstu_kernels")}


SCRIPT = """
import sys
from importlib.abc import MetaPathFinder

BLOCKED = {blocked!r}


class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{{name}} is blocked")
        return None


sys.meta_path.insert(0, Blocker())
for name in BLOCKED:
    try:
        __import__(name)
    except ImportError as error:
        assert "is blocked" in str(error), error
    else:
        raise SystemExit(f"{{name}} was not blocked")

import torch
from hstu_kernels import JaggedLayout
from hstu_plugin.config import HSTUConfig, RetrievalConfig
from hstu_plugin.retrieval import HSTURetrieval
from hstu_plugin.sequence import JaggedSequence

for backend in ("reference", "auto"):
    torch.manual_seed(0)
    model = HSTURetrieval(HSTUConfig(embedding_dim=8, max_seq_len=8, backend=backend), RetrievalConfig()).eval()
    items = torch.randn(10, 8)
    layout = JaggedLayout.from_lengths(torch.tensor([3, 0, 5]))
    ids = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])
    seq = JaggedSequence(items[ids], layout, torch.arange(8) * 1000)
    scores = model.scores(model(seq), items)
    assert scores.shape == (3, 10)
    model.loss(seq, (ids + 1) % 10, items).backward()
leaked = sorted(name for name in sys.modules if name.split(".")[0] in BLOCKED)
assert not leaked, leaked
print("ran")
"""


def test_core_runs_where_only_torch_is_installed() -> None:
    # The plugin's own hook at the end of `import torch` is a door; the core must not need it.
    environment = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(blocked=FORBIDDEN_IN_CORE)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("ran")
