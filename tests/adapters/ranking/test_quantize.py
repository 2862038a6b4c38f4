"""hstu-rank quantize: tables beside the run, metrics before and after, and the tables in use again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from hstu_kernels.int4 import pack_rows
from hstu_plugin.adapters.quantized import less_is_better, losses, refuse_losses
from hstu_plugin.adapters.ranking import launch, report
from hstu_plugin.adapters.ranking.cli import main
from hstu_plugin.adapters.ranking.quantize import restored
from hstu_plugin.quantize_report import QuantizationReport
from hstu_plugin.quantized_embedding import QuantizedEmbedding
from hstu_plugin.quantized_files import TableFileError, load_tables

from .conftest import write_recipe

MODELS = ("hstu", "dlrm")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, recipe: Path, data_dir: Path) -> Path:
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "learning_curve", lambda _records, path: path)
        request = launch.Request(recipe=str(recipe), data=data_dir, output_dir=out, models=MODELS, device="cpu")
        launch.execute(request, lambda _line: None)
    return out


def invoke(command: str, *words: object) -> Result:
    return CliRunner().invoke(main, [command, *map(str, words)])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ranges", ["min_max", "search"])
def test_tables_are_written_and_used_again(
    trained: Path, recipe: Path, data_dir: Path, tmp_path: Path, model: str, ranges: str
) -> None:
    run = Path(shutil.copytree(trained / f"{model}-seed1", tmp_path / "run"))
    where = (recipe, "--data", data_dir, run, "--device", "cpu")
    result = invoke("quantize", *where, "--ranges", ranges, "--calibrate", "--report", tmp_path / "q.json")
    assert result.exit_code == 0, result.output
    tables = run / "best-int4.safetensors"
    record = json.loads((tmp_path / "q.json").read_text())
    assert (record["model"], record["dataset"], record["split"]) == (model, "tiny", "test")
    before, after = record["report"]["metrics_before"], record["report"]["metrics_after"]
    assert {"click.auc", "click.ne", "rating.rmse"} <= before.keys() == after.keys()
    assert before != after
    # The run's own metrics, before; those of the tables in the file, after.
    own = json.loads((run / "result.json").read_text())["test"]
    assert before["click.ne"] == pytest.approx(own["click"]["ne"], abs=1e-9)
    again = invoke("evaluate", *where, "--tables", tables)
    assert again.exit_code == 0, again.output
    assert json.loads(again.output)["click"]["ne"] == pytest.approx(after["click.ne"], abs=1e-9)
    plain = restored(str(recipe), data_dir, run, device="cpu").model
    packed = load_tables(tables).tables
    name = next(name for name in packed if "items" in name)
    weight = plain.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    assert torch.equal(packed[name].data, pack_rows(weight, ranges=ranges).data)
    assert all(table["weighted_sqnr_db"] is not None for table in record["report"]["tables"][:1])


def test_tables_of_other_weights_are_refused(trained: Path, recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    tables = tmp_path / "t.safetensors"
    where = (recipe, "--data", data_dir, trained / "dlrm-seed1", "--device", "cpu")
    assert invoke("quantize", *where, "--dtype", "int8", "--output", tables).exit_code == 0
    model = restored(str(recipe), data_dir, trained / "dlrm-seed1", device="cpu", tables_file=tables).model
    assert any(isinstance(part, QuantizedEmbedding) for part in model.modules())
    with pytest.raises(TableFileError, match="made from other weights; run hstu-rank quantize again"):
        restored(str(recipe), data_dir, trained / "hstu-seed1", device="cpu", tables_file=tables)


def test_a_loss_beyond_the_limit_fails_the_command(trained: Path, recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    where = (recipe, "--data", data_dir, trained / "hstu-seed1", "--device", "cpu", "--output", tmp_path / "t")
    strict = invoke("quantize", *where, "--max-loss", "0")
    assert strict.exit_code == 1
    assert "Error: --max-loss: expected no metric to get worse by more than 0.00%" in strict.output
    assert invoke("quantize", *where, "--max-loss", "0.5").exit_code == 0


def test_errors_and_scores_count_in_their_own_direction() -> None:
    def made(**changes: Any) -> QuantizationReport:
        before = {"click.ne": 0.8, "click.auc": 0.7, "hit@10": 0.3, "zero": 0.0}
        after = {**before, **{key.replace("__", "."): value for key, value in changes.items()}}
        return QuantizationReport(tables=(), metrics_before=before, metrics_after=after)

    assert [less_is_better(name) for name in ("click.ne", "like.log_loss", "click.auc", "hit@10")] == [
        True,
        True,
        False,
        False,
    ]
    refuse_losses(made(click__ne=0.7, click__auc=0.9), 0.0)
    assert losses(made(click__ne=0.88))["click.ne"] == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"click\.ne rose by 10\.00%"):
        refuse_losses(made(click__ne=0.88), 0.05)
    with pytest.raises(ValueError, match=r"click\.auc fell by 10\.00%"):
        refuse_losses(made(click__auc=0.63), 0.05)
