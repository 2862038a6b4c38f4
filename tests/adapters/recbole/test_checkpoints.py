"""Killed and resumed, damaged, malicious: what checkpoints must stand."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from recbole.config import Config

from hstu_plugin.adapters.recbole import load, run
from hstu_plugin.adapters.recbole.checkpoint import (
    CheckpointError,
    PortableConfig,
    last_path,
    read_checkpoint,
    restore_config,
    write_checkpoint,
)

ROOT = Path(__file__).parents[3]


def _numbers(result: Any) -> Any:
    timeless = [{k: v for k, v in r.items() if not k.endswith("_seconds")} for r in result.history]
    return timeless, result.best_valid_result, result.best_valid_score, result.test_result


def _same_weights(one: Any, other: Any) -> bool:
    pairs = zip(one.model.state_dict().items(), other.model.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


class TestResume:
    def test_in_two_halves_as_in_one(self, tiny: dict[str, Any]) -> None:
        whole = run("HSTU", "tiny", config_dict={**tiny, "epochs": 6, "checkpoint_dir": "whole"})
        run("HSTU", "tiny", config_dict={**tiny, "epochs": 3})
        halves = run("HSTU", "tiny", config_dict={**tiny, "epochs": 6}, resume="auto")
        assert _numbers(halves) == _numbers(whole)
        assert _same_weights(halves, whole)
        again = run("HSTU", "tiny", config_dict={**tiny, "epochs": 6}, resume="auto")
        assert _numbers(again) == _numbers(whole)

    @pytest.mark.slow
    @pytest.mark.parametrize("model", ["HSTU", "SASRec"])
    def test_after_sigkill(self, tiny: dict[str, Any], model: str) -> None:
        values = {**tiny, "epochs": 25, "stopping_step": 100, "checkpoint_dir": "killed"}
        if model == "SASRec":
            values |= {"train_neg_sample_args": None, "n_heads": 2, "epochs": 12, "train_batch_size": 32}
        code = (
            "import torch; torch.set_num_threads(1)\n"
            "from hstu_plugin.adapters.recbole import run\n"
            f"run({model!r}, 'tiny', config_dict={values!r})"
        )
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            done = [read_checkpoint(file)["epoch"] for file in Path("killed").glob("*-last.pth")]
            if done and done[0] >= 3:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        file = next(Path("killed").glob("*-last.pth"))
        assert read_checkpoint(file)["epoch"] < values["epochs"] - 1
        resumed = run(model, "tiny", config_dict=values, resume=file)
        whole = run(model, "tiny", config_dict={**values, "checkpoint_dir": "whole"})
        assert _numbers(resumed) == _numbers(whole)
        assert _same_weights(resumed, whole)

    def test_an_early_stop_stays_stopped(self, tiny: dict[str, Any]) -> None:
        # Ties count as improvements in RecBole, so the score has to fall.
        values = {**tiny, "epochs": 50, "stopping_step": 1, "learning_rate": 0.05}
        first = run("HSTU", "tiny", config_dict=values)
        assert len(first.history) < 50
        assert _numbers(run("HSTU", "tiny", config_dict=values, resume="auto")) == _numbers(first)

    def test_other_configuration(self, tiny: dict[str, Any]) -> None:
        first = run("HSTU", "tiny", config_dict=tiny)
        changed = {**tiny, "learning_rate": 0.5}
        with pytest.raises(CheckpointError, match=r"learning_rate: 0.001 there, 0.5 here"):
            run("HSTU", "tiny", config_dict=changed, resume=last_path(first.model_file))  # type: ignore[arg-type]
        assert len(run("HSTU", "tiny", config_dict=changed, resume="auto").history) == 2

    def test_auto_passes_over_a_damaged_file(self, tiny: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
        first = run("HSTU", "tiny", config_dict={**tiny, "state": "INFO"})
        last = last_path(first.model_file)  # type: ignore[arg-type]
        last.write_bytes(last.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match=rf"{last.name}.*damaged or cut off"):
            run("HSTU", "tiny", config_dict=tiny, resume=last)
        resumed = run("HSTU", "tiny", config_dict={**tiny, "epochs": 4}, resume="auto")
        assert "passed over" in caplog.text
        assert [record["epoch"] for record in resumed.history] == [0, 1, 2, 3]
        assert resumed.model_file == first.model_file


class TestFiles:
    def test_a_failed_write_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "a.pth"
        file.write_bytes(b"old")

        def broken(state: Any, target: Any) -> None:
            target.write(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(torch, "save", broken)
        with pytest.raises(OSError, match="disk full"):
            write_checkpoint({}, file)
        assert file.read_bytes() == b"old"
        assert [p.name for p in tmp_path.glob(".*")] == []

    @pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut"])
    def test_damage_is_named(self, tmp_path: Path, content: bytes) -> None:
        file = tmp_path / "bad.pth"
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"bad\.pth"):
            load(file)

    def test_missing_and_foreign(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no such file"):
            load(tmp_path / "none.pth")
        torch.save({"weights": torch.ones(2)}, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match="there is no config, epoch"):
            load(tmp_path / "other.pth")

    def test_data_set_has_changed(self, tiny: dict[str, Any], write_inter: Any) -> None:
        result = run("HSTU", "tiny", config_dict=tiny)
        write_inter([(u, k, k) for u in range(5) for k in range(9)])
        with pytest.raises(CheckpointError, match="data set has changed"):
            load(result.model_file)  # type: ignore[arg-type]


class _Evil:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call = call, arguments

    def __reduce__(self) -> Any:
        return self.call


class TestStrangers:
    MARK = "__import__('pathlib').Path('owned').touch()"

    @pytest.mark.parametrize(
        "evil",
        [
            pytest.param(_Evil(os.system, "touch owned"), id="system"),
            # Allowing RecBole's Config would be enough: it evaluates the strings of its dictionary.
            pytest.param(_Evil(Config, "BPR", "ml-100k", None, {"x": MARK}), id="config"),
            pytest.param(_Evil(pickle.loads, b"cos\nsystem\n(S'touch owned'\ntR."), id="pickle"),
        ],
    )
    @pytest.mark.parametrize("protocol", [2, 4])
    def test_nothing_is_executed(self, tiny: dict[str, Any], evil: _Evil, protocol: int) -> None:
        result = run("HSTU", "tiny", config_dict={**tiny, "epochs": 1})
        state = read_checkpoint(result.model_file)  # type: ignore[arg-type]
        state |= {"config": PortableConfig(state["config"]), "x": evil}
        torch.save(state, "evil.pth", pickle_protocol=protocol)
        with pytest.raises(CheckpointError, match="refused"):
            load("evil.pth")
        with pytest.raises(pickle.UnpicklingError):
            torch.load("evil.pth")
        assert not Path("owned").exists()

    def test_configurations_hold_plain_values_only(self) -> None:
        values = PortableConfig(Config("HSTU", "ml-100k")).values
        restored = restore_config(values)
        again = PortableConfig(restored).values
        assert Path(again.pop("data_path")).samefile(values["data_path"])
        assert again == {key: value for key, value in values.items() if key != "data_path"}
        assert restored["MODEL_TYPE"] == Config("HSTU", "ml-100k")["MODEL_TYPE"]
        assert restore_config({**values, "dataset_save_path": "evil.pkl"})["dataset_save_path"] is None
        # Where a GPU trained and none is here, the backend is as little binding as the device.
        there = restore_config({**values, "device": "cuda", "backend": "triton"})
        expected = ("cuda", "triton") if torch.cuda.is_available() else ("cpu", "auto")
        assert (there["device"].type, there["backend"]) == expected
        assert restore_config({**values, "backend": "reference"})["backend"] == "reference"
        for bad in ({**values, "topk": object()}, {**values, "model": "../x"}, [1]):
            with pytest.raises(CheckpointError):
                restore_config(bad)  # type: ignore[arg-type]

    def test_caches_next_to_a_model_are_not_unpickled(self, tiny: dict[str, Any]) -> None:
        result = run("HSTU", "tiny", config_dict=tiny)
        for name in ("tiny-HSTUDataset.pth", "tiny-for-HSTU-dataloader.pth"):
            (Path("saved") / name).write_bytes(pickle.dumps(_Evil(os.system, "touch owned")))
        load(result.model_file)  # type: ignore[arg-type]
        run("HSTU", "tiny", config_dict=tiny)
        assert not Path("owned").exists()
