"""hstu-quantize on a trained model, and its tables in use again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from hstu_kernels.int4 import RowFormat, pack_rows
from hstu_plugin.adapters.recbole import runner
from hstu_plugin.adapters.recbole.cli import main as train
from hstu_plugin.adapters.recbole.quantize import load_quantized, quantize_run
from hstu_plugin.adapters.recbole.quantize_cli import main
from hstu_plugin.adapters.recbole.saved import find_checkpoint
from hstu_plugin.quantized_embedding import QuantizedEmbedding
from hstu_plugin.quantized_files import TableFileError, load_tables

SMALL = ("--hidden_size=8", "--n_layers=1", "--MAX_ITEM_LIST_LENGTH=10", "--use_gpu=False", "--no-progress")


def trained_run(model: str, data: Path, folder: Path, *options: str) -> Path:
    out = folder / model
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = [
            f"--model={model}",
            "--dataset=tiny",
            f"--data_path={data}",
            "--output-dir",
            str(out),
            *SMALL,
            *options,
        ]
        result = CliRunner().invoke(train, words)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def run(atomic_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run("HSTU", atomic_root, tmp_path_factory.mktemp("run"), "--epochs=2")


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    """A copy to write beside."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from hstu_plugin.adapters.recbole.quantize_cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = [n for n in ('torch', 'recbole', 'safetensors', 'numpy') if n in sys.modules]\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--max-loss" in done.stdout


@pytest.mark.parametrize("dtype", list(RowFormat))
def test_tables_are_written_beside_the_checkpoint_and_used_again(own_run: Path, dtype: RowFormat) -> None:
    result = invoke(own_run, "--dtype", dtype)
    assert result.exit_code == 0, result.output
    checkpoint = find_checkpoint(own_run)
    tables = checkpoint.with_name(f"{checkpoint.stem}-{dtype}.safetensors")
    assert f"Wrote {tables}" in result.output
    plain = runner.load(checkpoint).model
    expected = pack_rows(plain.item_embedding.weight, dtype)
    (stored,) = load_tables(tables).tables.values()
    assert torch.equal(stored.data, expected.data)
    loaded = load_quantized(own_run, tables)
    assert isinstance(loaded.model.item_embedding, QuantizedEmbedding)
    assert isinstance(loaded.model.retrieval.embedding.positions, torch.nn.Embedding)
    # The model computes with the numbers of the table, and with nothing else changed.
    with torch.no_grad():
        plain.item_embedding.weight.copy_(loaded.model.item_embedding.weight)
        batch = next(iter(loaded.test_data))[0]
        scores, reference = loaded.model.full_sort_predict(batch), plain.full_sort_predict(batch)
        some, one = loaded.model.predict(batch), plain.predict(batch)
    torch.testing.assert_close(scores, reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(some, one, rtol=1e-5, atol=1e-5)


def test_metrics_before_and_after_and_the_report(own_run: Path, tmp_path: Path) -> None:
    before = runner.load(find_checkpoint(own_run)).evaluate()
    file, output = tmp_path / "r" / "report.json", tmp_path / "t" / "mine.safetensors"
    words = (own_run, "--evaluate", "--report", file, "--output", output, "--ranges", "search", "--calibrate")
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    for text in ("Embedding tables", "item_embedding", "SQNR", "Metrics", "full precision", "NDCG@10", "Kept as it is"):
        assert text in result.output
    record = json.loads(file.read_text())
    assert record["format"] == "hstu-plugin/quantization"
    assert record["split"] == "test"
    assert record["report"]["metrics_before"] == before
    again = load_quantized(own_run, output).evaluate()
    assert record["report"]["metrics_after"] == again
    (table,) = record["report"]["tables"]
    assert (table["rows"], table["dim"], table["bytes_after"]) == (26, 8, 26 * 8)
    assert table["weighted_sqnr_db"] > 10
    assert record["versions"]["torch"]


def test_calibration_without_a_validation_split(atomic_root: Path, tmp_path: Path) -> None:
    split = "--eval_args={'split': {'LS': 'test_only'}, 'order': 'TO', 'mode': 'full'}"
    run, file = trained_run("HSTU", atomic_root, tmp_path, "--epochs=1", split), tmp_path / "report.json"
    result = invoke(run, "--calibrate", "--report", file)
    assert result.exit_code == 0, result.output
    (table,) = json.loads(file.read_text())["report"]["tables"]
    assert table["weighted_sqnr_db"] > 10


def test_a_model_that_falls_too_far_fails(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([{"hit@10": 0.5, "ndcg@10": 0.40}, {"hit@10": 0.5, "ndcg@10": 0.39}] * 2)
    monkeypatch.setattr(runner.LoadedRun, "evaluate", lambda *_: next(answers))
    result = invoke(own_run, "--evaluate", "--max-loss", "0.01")
    assert result.exit_code == 1
    assert "no metric to get worse by more than 1.00%, but ndcg@10 fell by 2.50%; try --ranges search" in result.output
    assert invoke(own_run, "--evaluate", "--max-loss", "0.03").exit_code == 0


def test_a_stock_model(atomic_root: Path, tmp_path: Path) -> None:
    options = ("--epochs=1", "--n_heads=2", "--inner_size=8", "--train_neg_sample_args=None")
    run = trained_run("SASRec", atomic_root, tmp_path, *options)
    result = invoke(run, "--evaluate", "--dtype", "int8")
    assert result.exit_code == 0, result.output
    assert "position_embedding (skip: *position*)" in result.output
    done = quantize_run(run, "int8", split="valid")
    assert done.split == "valid"
    assert done.report.metrics_after.keys() == done.report.metrics_before.keys() != set()


def test_tables_of_another_checkpoint_are_refused(own_run: Path, run: Path) -> None:
    done = quantize_run(own_run)
    checkpoint = done.checkpoint
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state, checkpoint)
    with checkpoint.open("ab") as file:
        file.write(b" ")
    with pytest.raises(TableFileError, match=r"expected tables made from .* run hstu-quantize again"):
        load_quantized(checkpoint, done.tables_file)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--max-loss", "0.1"), "--max-loss: goes with --evaluate"),
        (("--coverage", "0.5"), "--coverage: goes with --calibrate and --ranges search"),
        (("--dtype", "int2"), "'int2' is not one of"),
        (("--table", "user*"), "expected an embedding table that matches"),
        (("--dtype", "fp8", "--ranges", "search"), "expected 'min_max' for fp8"),
    ],
)
def test_bad_requests(run: Path, words: tuple[str, ...], said: str) -> None:
    result = invoke(run, *words)
    assert result.exit_code in (1, 2)
    assert said in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    result = invoke(tmp_path / "nothing")
    assert result.exit_code == 1
    assert "neither a checkpoint nor the directory of a run" in result.output
