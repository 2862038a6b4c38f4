"""Checkpoints: whole or not at all, checked, and no code in them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save

from hstu_plugin.adapters.torchrec.checkpoint import CheckpointError, Checkpoints, SafeReader, verify


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=30))
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def kept(tmp_path: Path, group: dist.ProcessGroup) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2, group=group)


def test_tensors_may_change_as_soon_as_save_returns(kept: Checkpoints) -> None:
    weights = torch.arange(6.0)
    kept.save(3, {"w": weights}, {"epoch": 1})
    weights.zero_()
    path = kept.newest()
    kept.close()
    path = kept.newest()
    assert path is not None and path.name == "step-000000000003"
    read = torch.empty(6)
    assert kept.load(path, {"w": read}) == {"epoch": 1}
    assert torch.equal(read, torch.arange(6.0))


def test_the_newest_are_kept_and_left_overs_go(kept: Checkpoints, group: dist.ProcessGroup) -> None:
    for step in (1, 2, 3):
        kept.save(step, {"w": torch.ones(2)}, {})
    kept.wait()
    assert [path.name[-1] for path in sorted(kept.folder.iterdir())] == ["2", "3"]
    (kept.folder / ".writing-000000000009").mkdir()
    Checkpoints(kept.folder, keep=2, group=group)
    assert len(list(kept.folder.iterdir())) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "corrupt"),
        (lambda path: path.unlink(), "missing"),
        (lambda path: (path.parent / "manifest.json").write_text("{"), "no usable manifest"),
    ],
    ids=["truncated", "corrupt", "missing", "manifest"],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_message(kept: Checkpoints, damage, message: str) -> None:
    for step in (1, 2):
        kept.save(step, {"w": torch.ones(64)}, {})
    kept.wait()
    broken = kept.folder / "step-000000000002"
    damage(next(broken.glob("*.distcp")))
    with pytest.raises(CheckpointError, match=message):
        verify(broken)
    said: list[str] = []
    found = kept.newest(said.append)
    assert found == kept.folder / "step-000000000001"
    assert len(said) == 1 and message in said[0] and "trying the one before" in said[0]


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_an_index_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(CheckpointError, match="mkdir, which is not part of one"):
        SafeReader(str(tmp_path)).read_metadata()
    assert not (tmp_path / "harm").exists()


def test_pickled_objects_are_not_read(tmp_path: Path, group: dist.ProcessGroup) -> None:
    save({"w": torch.ones(1), "object": {1, 2}}, checkpoint_id=str(tmp_path / "foreign"), process_group=group)
    with pytest.raises(CheckpointError, match="pickled objects"):
        SafeReader(str(tmp_path / "foreign")).read_metadata()
