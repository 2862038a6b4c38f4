"""Every way by which RecBole's users reach the model, and what comes below what in the configuration."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from recbole.config import Config

from hstu_plugin import _hook
from hstu_plugin.adapters.recbole import load, run
from hstu_plugin.adapters.recbole.dataset import HSTUDataset
from hstu_plugin.adapters.recbole.model import HSTU
from hstu_plugin.adapters.recbole.trainer import HSTUTrainer

ROOT = Path(__file__).parents[3]


def _python(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    path = ":".join(str(p) for p in (ROOT, ROOT / "kernels", *paths))
    environment = {"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "HOME": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=300
    )


def test_stock_quick_start_and_load(tiny: dict[str, Any]) -> None:
    from recbole.quick_start import load_data_and_model, run_recbole

    result = run_recbole(model="HSTU", dataset="tiny", config_dict=dict(tiny))
    assert set(result["test_result"]) == {"hit@10", "ndcg@10", "mrr@10"}
    file = next(f for f in Path("saved").glob("HSTU-*.pth") if not f.stem.endswith("-last"))
    config, model, dataset, *_ = load_data_and_model(str(file))
    assert isinstance(config, Config)
    assert isinstance(model, HSTU)
    assert isinstance(dataset, HSTUDataset)


def test_yaml_names_the_model(tiny: dict[str, Any]) -> None:
    Path("mine.yaml").write_text("model: HSTU\ndataset: tiny\nn_layers: 2\n", encoding="utf-8")
    config = Config(config_file_list=["mine.yaml"], config_dict={"data_path": "dataset"})
    assert config.model_class is HSTU
    assert config["n_layers"] == 2


def test_recbole_finds_trainer_and_dataset() -> None:
    import recbole.data.dataset as room
    from recbole.utils import get_model, get_trainer

    assert get_model("HSTU") is HSTU
    assert get_trainer(HSTU.type, "HSTU") is HSTUTrainer
    assert room.HSTUDataset is HSTUDataset


def test_our_runner_and_load(tiny: dict[str, Any]) -> None:
    result = run("HSTU", "tiny", config_dict=tiny)
    assert isinstance(result.trainer, HSTUTrainer)
    assert [record["epoch"] for record in result.history] == [0, 1]
    assert result.model_file is not None
    loaded = load(result.model_file)
    assert loaded.evaluate("test") == result.test_result
    assert loaded.evaluate("valid") == result.best_valid_result


def test_a_subclass_can_be_trained_and_loaded(tiny: dict[str, Any]) -> None:
    class MyHSTU(HSTU):
        pass

    result = run(MyHSTU, "tiny", config_dict=tiny)
    assert isinstance(result.dataset, HSTUDataset)
    with pytest.raises(ValueError, match="give its class"):
        load(result.model_file)  # type: ignore[arg-type]
    assert load(result.model_file, MyHSTU).evaluate() == result.test_result  # type: ignore[arg-type]


def test_flops_of_stock_recbole(tiny: dict[str, Any]) -> None:
    from logging import getLogger

    from recbole.data.transform import construct_transform
    from recbole.utils import get_flops

    result = run("HSTU", "tiny", config_dict={**tiny, "epochs": 1})
    transform = construct_transform(result.config)
    assert get_flops(result.model, result.dataset, "cpu", getLogger(), transform) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "first", ["from recbole.quick_start import run_recbole", "import torch", "from recbole.config import Config"]
)
def test_stock_script_without_user_code(tiny: dict[str, Any], tmp_path: Path, first: str) -> None:
    # An entry point as an installed distribution would have it.
    info = tmp_path / "site" / "hook-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hook\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nhook = hstu_plugin._hook:activate\n")
    done = _python(
        f"""
        {first}
        from recbole.quick_start import run_recbole
        import sys
        print(run_recbole(model="HSTU", dataset="tiny", config_dict={tiny!r})["test_result"])
        import torch
        print("anomaly detection", torch.is_anomaly_enabled())
        print("stub left" if hasattr(sys.modules.get("ray"), "__hstu_plugin_stub__") else "no stub")
        """,
        tmp_path / "site",
    )
    assert done.returncode == 0, done.stderr
    assert "ndcg@10" in done.stdout
    assert "no stub" in done.stdout
    assert "anomaly detection False" in done.stdout


@pytest.mark.slow
def test_importing_the_package_imports_nothing_heavy() -> None:
    done = _python(
        """
        import sys, hstu_plugin
        heavy = {"torch", "numpy", "recbole", "yaml", "importlib.metadata"} & set(sys.modules)
        hstu_plugin._hook.activate()
        finders = [f for f in sys.meta_path if type(f).__module__ == "hstu_plugin._hook"]
        print(sorted(heavy), len(finders), type(hstu_plugin.__version__).__name__)
        """
    )
    assert done.stdout.strip() == "[] 2 str", done.stderr


@pytest.mark.parametrize("wanted", [False, True])
def test_no_model_of_recbole_switches_anomaly_detection_on(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    name = "recbole.model.sequential_recommender.sine"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with torch.autograd.set_detect_anomaly(wanted):
        module = importlib.import_module(name)
        assert torch.is_anomaly_enabled() is wanted
    assert module.SINE.__name__ == "SINE"
    assert type(module.__loader__).__module__ != "hstu_plugin.adapters.recbole.compat"


def test_activate_twice_adds_nothing() -> None:
    before = list(sys.meta_path)
    _hook.activate()
    assert sys.meta_path == before


@pytest.mark.parametrize("value", [1, 2])
def test_unusable_ray_is_replaced_for_quick_start_only(tmp_path: Path, value: int) -> None:
    (tmp_path / "ray").mkdir()
    body = "import numpy; numpy.bool8" if value == 1 else "tune_module = 1"
    (tmp_path / "ray" / "__init__.py").write_text(body)
    if value == 2:
        (tmp_path / "ray" / "tune.py").write_text("def report(**kw): return 'real'")
    done = _python(
        """
        import hstu_plugin, sys
        from recbole.quick_start import quick_start
        print(quick_start.tune.report(x=1), "ray" in sys.modules)
        """,
        tmp_path,
    )
    assert done.stdout.strip().endswith("real True" if value == 2 else "None False"), done.stderr


class TestPriority:
    def test_ours_over_recboles_and_below_the_users(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = Config(model="HSTU", dataset="ml-100k")
        assert plain["normalize_all"] is False  # RecBole's ml-100k.yaml says True
        assert plain["learner"] == "adamw"
        assert plain["MAX_ITEM_LIST_LENGTH"] == 200
        assert plain["train_neg_sample_args"]["distribution"] == "none"
        Path("a.yaml").write_text("learning_rate: 0.25\nlearner: sgd\nn_layers: 3\n", encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["test", "--n_layers=5"])
        config = Config("HSTU", "ml-100k", ["a.yaml"], {"learning_rate": 0.5})
        assert (config["learner"], config["learning_rate"], config["n_layers"]) == ("sgd", 0.5, 5)

    def test_stock_models_are_untouched(self) -> None:
        config = Config("SASRec", "ml-100k", config_dict={"train_neg_sample_args": None, "anything": 1})
        assert config["normalize_all"] is True
        assert config["MAX_ITEM_LIST_LENGTH"] == 50
        assert "train_examples" not in config

    def test_sys_argv_does_not_reach_our_runner(self, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", ["test", "--epochs=50", "--out=x"])
        result = run("HSTU", "tiny", config_dict={**tiny, "epochs": 3}, argv=["--epochs=1"])
        assert len(result.history) == 1
        assert sys.argv[1] == "--epochs=50"


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("values", "argv", "message"),
        [
            ({"n_layer": 2}, [], "'n_layer' in the config dictionary; did you mean n_layers"),
            ({"time_bais": False}, [], "did you mean time_bias"),
            ({}, ["--hiden_size=4"], "'hiden_size' in the command line; did you mean hidden_size"),
        ],
    )
    def test_named_with_source_and_neighbour(self, values: dict[str, Any], argv: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            run("HSTU", "tiny", config_dict=values, argv=argv)

    def test_in_a_file(self) -> None:
        Path("a.yaml").write_text("max_seq_len: 10\n", encoding="utf-8")
        with pytest.raises(ValueError, match="'max_seq_len' in the config file"):
            run("HSTU", "tiny", ["a.yaml"])

    def test_recboles_keys_are_known(self, tiny: dict[str, Any]) -> None:
        known = {"worker": 0, "enable_amp": False, "encoding": "utf-8", "clip_grad_norm": None, "POSITION_FIELD": "p"}
        Config("HSTU", "tiny", config_dict={**tiny, **known})


def test_unknown_model_is_named() -> None:
    with pytest.raises(ValueError, match="no model named 'HSTUU'; ours are HSTU"):
        run("HSTUU", "tiny")


def test_multi_gpu_is_refused_before_any_work(tiny: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"nproc > 1.*TorchX"):
        Config("HSTU", "tiny", config_dict={**tiny, "local_rank": 0, "nproc": 2})


def test_stock_sasrec_through_the_runner(tiny: dict[str, Any]) -> None:
    values = {k: v for k, v in tiny.items() if k != "n_layers"}
    values |= {"train_neg_sample_args": None, "n_heads": 2, "n_layers": 1}
    result = run("SASRec", "tiny", config_dict=values)
    assert type(result.dataset).__name__ == "ExactTimeDataset"
    assert result.model_file is not None
    assert load(result.model_file).evaluate() == result.test_result


def test_stock_general_model_through_the_runner(tiny: dict[str, Any]) -> None:
    values = {k: tiny[k] for k in ("data_path", "epochs", "show_progress", "state")}
    assert "ndcg@10" in run("BPR", "tiny", config_dict=values).test_result
