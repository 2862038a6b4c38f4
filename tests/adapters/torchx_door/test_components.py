"""The components as TorchX sees them: its linter, its registry, its schedulers' requests, and a real run."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml

pytest.importorskip("torchx", reason="TorchX is not installed: pip install '.[torchx]'")

from torchx.schedulers.slurm_scheduler import SlurmScheduler
from torchx.specs.builders import materialize_appdef
from torchx.specs.file_linter import validate

import torchx_components.hstu as components

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden"
NAMES = sorted(
    name for name, fn in inspect.getmembers(components, inspect.isfunction) if fn.__module__ == components.__name__
)
ARGUMENTS = {
    "train": ["--config", "train.yaml", "-j", "2x8", "--gpu", "8", "--", "--set", "run.max_steps=10"],
    "evaluate": ["--config", "train.yaml", "-j", "1x2"],
    "recbole": ["--config", "a.yaml,b.yaml", "--", "--learning_rate=0.002"],
    "score": ["--config", "train.yaml", "--requests", "in.parquet", "--output", "out.parquet"],
    "quantize": ["--", "--help"],
    "benchmark": ["--output", "result.json", "-j", "1x2", "--", "--steps", "3"],
}


def app_of(name: str, arguments: list[str]) -> Any:
    return materialize_appdef(getattr(components, name), arguments)


def test_every_job_of_the_project_is_here() -> None:
    assert sorted(ARGUMENTS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_torchx_own_linter_accepts(name: str) -> None:
    assert validate(str(components.__file__), name) == []


@pytest.mark.parametrize("name", NAMES)
def test_place_passes_through(name: str) -> None:
    more = ["--cpu", "3", "--gpu", "1", "--memMB", "77", "--env", "A=1,B=2", "--max_retries", "4", "--image", "mine:1"]
    more += ["--mounts", "type=bind,src=/data,dst=/job/data,readonly"]
    own = ARGUMENTS[name]
    cut = own.index("--") if "--" in own else len(own)
    without = [word for i, word in enumerate(own[:cut]) if word != "--gpu" and own[i - 1] != "--gpu"]
    (role,) = app_of(name, [*without, *more, *own[cut:]]).roles
    assert (role.resource.cpu, role.resource.gpu, role.resource.memMB) == (3, 1, 77)
    assert {"A": "1", "B": "2"}.items() <= role.env.items()
    assert role.max_retries == 4 and role.image == "mine:1"
    (mount,) = role.mounts
    assert (mount.src_path, mount.dst_path, mount.read_only) == ("/data", "/job/data", True)


def test_named_resources_take_precedence() -> None:
    (role,) = app_of("train", ["--config", "c.yaml", "-h", "aws_p3.2xlarge"]).roles
    assert role.resource.gpu == 1 and role.resource.cpu == 8


def test_rankers_are_quantised_by_their_own_command() -> None:
    (role,) = app_of(
        "quantize", ["--recipe", "mine.yaml", "--data", "in", "--", "runs/hstu-seed1", "--dtype", "int8"]
    ).roles
    assert role.args[1].endswith("hstu-rank quantize mine.yaml --data in runs/hstu-seed1 --dtype int8")
    with pytest.raises(ValueError, match="recipe, data: expected both for a ranker"):
        app_of("quantize", ["--recipe", "mine.yaml", "--", "run"])


def test_hosts_and_processes() -> None:
    (role,) = app_of("train", ["--config", "c.yaml", "-j", "1:4x8"]).roles
    assert role.num_replicas == 4 and role.min_replicas == 1
    assert "--nnodes 1:4" in role.args[1] and "--nproc_per_node 8" in role.args[1]
    with pytest.raises(ValueError, match="Invalid format for -j"):
        app_of("train", ["--config", "c.yaml", "-j", "many"])


def test_words_are_quoted() -> None:
    (role,) = app_of("recbole", ["--config", "my file.yaml", "--", "--note=$HOME; ls"]).roles
    assert "'--config_files=my file.yaml'" in role.args[1]
    assert "'--note=$$HOME; ls'" in role.args[1]


def stable(text: str) -> str:
    """Without what differs from machine to machine and from run to run."""
    text = text.replace(sysconfig.get_path("scripts"), "<scripts>")
    text = re.sub(r"hstu-([a-z]+)-[a-z0-9]{6,}", r"hstu-\1-<id>", text)
    return re.sub(r"torchx\.pytorch\.org/version: \S+", "torchx.pytorch.org/version: <version>", text)


def check_golden(name: str, text: str) -> None:
    """Equal to the file; ``UPDATE_GOLDEN=1`` rewrites it, for a person to read the difference."""
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(stable(text), encoding="utf-8")
    assert stable(text) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_request_to_slurm(name: str) -> None:
    scheduler = SlurmScheduler("test")
    info = scheduler.submit_dryrun(app_of(name, ARGUMENTS[name]), {"partition": "gpu", "time": "02:00:00"})
    check_golden(f"slurm-{name}.txt", str(info))


@pytest.mark.parametrize("name", NAMES)
def test_request_to_kubernetes(name: str) -> None:
    pytest.importorskip("kubernetes", reason="the Kubernetes client is not installed: pip install kubernetes")
    from torchx.schedulers.kubernetes_scheduler import KubernetesScheduler

    # Nothing is pushed and nobody is asked: the request alone.
    scheduler = KubernetesScheduler("test", client=MagicMock(), docker_client=MagicMock())
    app = app_of(name, ARGUMENTS[name])
    info = scheduler.submit_dryrun(app, {"queue": "default", "namespace": "default"})
    # One line for each text: where YAML wraps depends on the length of the random name.
    request = yaml.safe_dump(yaml.safe_load(str(info)), width=10_000, sort_keys=False)
    check_golden(f"kubernetes-{name}.yaml", request)


BY_NAME = """
import json, sys
from torchx.runner import get_runner
from torchx.specs.finder import get_components

given = json.loads(sys.argv[1])
found = get_components()
missing = {"dist.ddp", "utils.echo", *(f"hstu.{name}" for name in given)} - set(found)
assert not missing, (missing, sorted(found))
with get_runner() as runner:
    for name, arguments in given.items():
        assert str(runner.dryrun_component(f"hstu.{name}", arguments, scheduler="local_cwd").request)
print("all")
"""


def test_found_by_name_from_any_folder_beside_torchx_own(tmp_path: Path) -> None:
    # Isolated from the checkout: what the installed package registers.
    done = subprocess.run(
        [sys.executable, "-I", "-c", BY_NAME, json.dumps(ARGUMENTS)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("all")


@pytest.mark.slow
def test_logs_and_exit_codes_arrive(tmp_path: Path) -> None:
    pytest.importorskip("torchrec", reason="TorchRec is not installed: make install-torchrec")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    # As from a shell in which the environment was never activated.
    environment["PATH"] = "/usr/bin:/bin"
    torchx = str(Path(sysconfig.get_path("scripts")) / "torchx")
    done = subprocess.run(
        [torchx, "run", "-s", "local_cwd", "--log", "hstu.train", "--config", "missing.yaml"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode != 0, done.stdout
    assert "error: [Errno 2] No such file or directory: 'missing.yaml'" in done.stdout + done.stderr
