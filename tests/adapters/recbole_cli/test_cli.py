"""hstu-recbole, command by command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hstu_plugin.adapters.recbole import launch, report, saved, settings
from hstu_plugin.adapters.recbole.cli import main

from .conftest import run_record

SMALL = ("--hidden_size=8", "--n_layers=1", "--MAX_ITEM_LIST_LENGTH=10", "--use_gpu=False", "--no-progress")


def train(cli: CliRunner, data: Path, *options: str) -> Result:
    return cli.invoke(main, ["--dataset=tiny", f"--data_path={data}", *SMALL, *options])


@pytest.mark.parametrize("chosen", [None, "ACTIVE"])
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_WAIT_POLICY", chosen)
    assert CliRunner().invoke(main, ["recipes"]).exit_code == 0
    assert os.environ["OMP_WAIT_POLICY"] == (chosen or "PASSIVE")


def test_help_is_instant_and_imports_nothing_heavy():
    code = (
        "import sys; from hstu_plugin.adapters.recbole.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = [n for n in ('torch', 'recbole', 'pandas', 'matplotlib', 'numpy', 'ray') if n in sys.modules]\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment(), check=False)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "compare", "evaluate", "recommend", "recipes", "report", "train"):
        assert command in done.stdout


@pytest.fixture(scope="module")
def trained(atomic_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A finished run with a settings file, a command-line override and a name of its own."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "a.yaml").write_text("epochs: 3\nlearning_rate: 0.5\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = (
            "--config_files",
            str(folder / "a.yaml"),
            "--learning_rate=0.01",
            "--output-dir",
            str(folder / "out"),
        )
        result = train(CliRunner(), atomic_root, *options)
    assert result.exit_code == 0, result.output
    return folder / "out", result


def test_training_as_run_recbole_leaves_record_curve_and_checkpoint(trained: tuple[Path, Result]):
    out, result = trained
    record = report.read_json(out / "result.json")
    assert record["model"] == "HSTU"
    assert record["epochs"] == 3
    assert record["config"]["learning_rate"] == 0.01
    assert record["user_config"]["learning_rate"] == "0.01"
    assert set(record["test"]) == {"hit@10", "ndcg@10", "mrr@10"}
    assert record["data"] == {"users": 30, "items": 25}
    assert record["versions"]["torch"]
    assert record["machine"]["cpus_usable"] >= 1
    assert [e["epoch"] for e in record["history"]] == [0, 1, 2]
    assert all(e["valid_score"] is not None for e in record["history"])
    assert (out / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "checkpoints").glob("*.pth"))
    assert f"Files: {out}/" in result.output


def test_echo_says_who_set_what(trained: tuple[Path, Result]):
    words = [line.split() for line in trained[1].output.splitlines()]
    assert ["learning_rate", "0.01", "you"] in words
    assert ["epochs", "3", "you"] in words
    assert ["learner", "adamw", "plugin"] in words
    assert "checkpoint_dir" not in trained[1].output


def test_saved_model_ranks_as_it_did(trained: tuple[Path, Result], cli: CliRunner, tmp_path: Path):
    out, _ = trained
    result = cli.invoke(main, ["evaluate", str(out), "--output", str(tmp_path / "m.json")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "m.json").read_text())["test"] == report.read_json(out / "result.json")["test"]
    result = cli.invoke(main, ["evaluate", str(out), "--split", "valid", "--output", str(tmp_path / "v.json")])
    assert json.loads((tmp_path / "v.json").read_text())["valid"] == report.read_json(out / "result.json")["valid"]


def test_recommendations_leave_out_what_was_seen(trained: tuple[Path, Result], cli: CliRunner, atomic_root: Path):
    rows = [line.split("\t") for line in (atomic_root / "tiny" / "tiny.inter").read_text().splitlines()[1:]]
    mine = [item for user, item, _ in rows if user == "u3"]
    result = cli.invoke(main, ["recommend", str(trained[0]), "--user", "u3", "--topk", "5", "--json"])
    assert result.exit_code == 0, result.output
    (answer,) = json.loads(result.stdout)
    assert [i["item"] for i in answer["history"]] == mine[-11:-1]
    assert answer["held_out"]["item"] == mine[-1]
    assert len(answer["items"]) == 5
    assert not {i["item"] for i in answer["items"]} & set(mine[:-1])
    assert [i["score"] for i in answer["items"]] == sorted((i["score"] for i in answer["items"]), reverse=True)
    assert answer["items"][0]["title"].startswith("The ")
    everything = cli.invoke(
        main, ["recommend", str(trained[0]), "--user", "u3", "--topk", "99", "--include-seen", "--json"]
    )
    assert {i["item"] for i in json.loads(everything.stdout)[0]["items"]} >= set(mine)


def test_recommendations_for_people(trained: tuple[Path, Result], cli: CliRunner):
    result = cli.invoke(main, ["recommend", str(trained[0]), "--user", "u3", "--user", "u4"])
    assert "User u3: the last 8 items" in result.output
    assert "User u4" in result.output
    unknown = cli.invoke(main, ["recommend", str(trained[0]), "--user", "nobody"])
    assert unknown.exit_code == 1
    assert "such as u0" in unknown.output


def test_seeds_report_mean_and_spread(cli: CliRunner, atomic_root: Path, tmp_path: Path):
    result = train(cli, atomic_root, "--epochs=1", "--seeds", "1,2", "--output-dir", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "±" in result.output
    comparison = report.read_json(tmp_path / "out" / "comparison.json")
    assert comparison["models"]["HSTU"]["seeds"] == [1, 2]
    assert (tmp_path / "out" / "learning_curve.png").exists()
    assert (tmp_path / "out" / "seed-2" / "result.json").exists()


def test_resume_goes_on_where_it_stopped(cli: CliRunner, atomic_root: Path):
    out = Path("runs/tiny-HSTU-x")
    assert train(cli, atomic_root, "--epochs=2", "--output-dir", str(out)).exit_code == 0
    # As after a kill: checkpoints, but no result.
    (out / "result.json").unlink()
    result = train(cli, atomic_root, "--epochs=3", "--resume", "auto")
    assert result.exit_code == 0, result.output
    assert "Resuming from" in result.output
    assert report.read_json(out / "result.json")["epochs"] == 3
    fresh = train(cli, atomic_root, "--epochs=1", "--resume", "auto")
    assert "no unfinished run of HSTU on tiny" in fresh.output


def test_stock_models_run_too(cli: CliRunner, atomic_root: Path, tmp_path: Path):
    out = tmp_path / "out"
    options = ("--model=SASRec", "--train_neg_sample_args=None", "--n_heads=1", "--epochs=1", "--output-dir", str(out))
    result = train(cli, atomic_root, *options)
    assert result.exit_code == 0, result.output
    assert report.read_json(out / "result.json")["label"] == "SASRec"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "learning_rate"), "expected --name=value, got 'learning_rate'"),
        (("--dataset=tiny", "--epochs", "3"), "expected --name=value, got '--epochs'"),
        (("--epochs=1", "--epochs=2"), "--epochs is given twice"),
        (("--TIME_FIELD=~",), "write --TIME_FIELD=None"),
        (("--dataset=ml-100k", "--learner=adamm"), "learner: expected one of adam, adamw"),
        (("--dataset=ml-100k", "--topk=abc"), "RecBole refuses the settings: The topk"),
        (("--recipe", "ml-2m"), "expected one of amazon-beauty"),
        (("--config_files", "none.yaml"), "none.yaml: cannot be read"),
        (("--nproc=2",), "trains in one process"),
        (("--seeds", "1,x"), "expected whole numbers"),
        (("--seeds", "1,1"), "expected different numbers"),
        (("--seeds", "1,2", "--seed=3"), "goes neither with --seed"),
        (("--resume", "none.pth"), "no such file"),
        (("--dataset=absent", "--data_path=nowhere"), "absent"),
        (("--dataset=ml-100k", "--hiden_size=8"), "hidden_size"),
        (("evaluate", "nowhere"), "neither a checkpoint nor"),
        (("sing",), "No such command 'sing'"),
    ],
)
def test_mistakes_get_one_clear_line(cli: CliRunner, words: tuple[str, ...], message: str):
    result = cli.invoke(main, list(words))
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_yaml_file_that_is_no_mapping(cli: CliRunner, tmp_path: Path):
    (tmp_path / "a.yaml").write_text("- 1\n")
    assert "expected settings" in cli.invoke(main, ["--config_files", str(tmp_path / "a.yaml")]).output
    (tmp_path / "a.yaml").write_text("a: [1\n")
    assert "not YAML" in cli.invoke(main, ["--config_files", str(tmp_path / "a.yaml")]).output


def test_report_shows_runs_and_comparisons(cli: CliRunner, tmp_path: Path):
    report.write_json(tmp_path / "a" / "result.json", run_record())
    report.write_json(tmp_path / "b.json", run_record("SASRec", ndcg=0.05))
    single = cli.invoke(main, ["report", str(tmp_path / "a")])
    assert "HSTU on tiny" in single.output
    both = [str(tmp_path / "a"), str(tmp_path / "b.json")]
    text = cli.invoke(main, ["report", *both, "--markdown", "--curve", str(tmp_path / "c.png")])
    assert text.exit_code == 0, text.output
    assert "| SASRec | 1 |" in text.output
    assert (tmp_path / "c.png").exists()
    assert "cannot be read" in cli.invoke(main, ["report", str(tmp_path / "none.json")]).output


def test_new_output_dirs_never_collide(tmp_path: Path):
    first = launch.new_output_dir("d", "m", tmp_path)
    first.mkdir()
    assert launch.new_output_dir("d", "m", tmp_path) != first


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": ":".join(p for p in sys.path if p)}


def test_defaults_are_not_shown_as_the_users(trained: tuple[Path, Result], cli: CliRunner, atomic_root: Path):
    words = [line.split() for line in trained[1].output.splitlines()]
    assert ["dataset", "tiny", "you"] in words
    assert ["model", "HSTU", "command"] in words


@pytest.mark.parametrize(
    ("named", "files", "recipes", "origin"),
    [
        ({"model", "dataset"}, (), ("ml-100k",), "you"),
        ((), ("mine.yaml",), ("ml-1m",), "you"),
        ((), (), ("ml-100k",), "recipe"),
        ((), (), (), "command"),
    ],
)
def test_who_named_model_and_data_set(
    tmp_path: Path, named: set[str], files: tuple[str, ...], recipes: tuple[str, ...], origin: str
):
    (tmp_path / "mine.yaml").write_text("model: HSTU\ndataset: ml-100k\n")
    request = launch.Request(
        model="HSTU",
        dataset="ml-100k",
        output_dir=tmp_path,
        recipes=tuple(settings.recipe_path(name) for name in recipes),
        config_files=tuple(tmp_path / name for name in files),
        named=frozenset(named),
    )
    for key, value in (("model", "HSTU"), ("dataset", "ml-100k")):
        assert next(name for name, values in request.layers() if key in values) == origin
        assert request.asked()[key] == value


def test_a_run_directory_means_its_best_model(tmp_path: Path):
    folder = tmp_path / launch.CHECKPOINTS
    folder.mkdir()
    for age, name in enumerate(["b-last.pth", "b.pth", "a-last.pth"]):
        (folder / name).touch()
        os.utime(folder / name, (1000 - age, 1000 - age))
    # The newest file is the latest state; the best model of the same run lies beside it.
    assert saved.find_checkpoint(tmp_path).name == "b.pth"
    assert saved.find_checkpoint(folder).name == "b.pth"
    assert saved.find_checkpoint(folder / "b-last.pth").name == "b-last.pth"
    # A run that was stopped before its first validation has no best model yet.
    os.utime(folder / "a-last.pth", (2000, 2000))
    assert saved.find_checkpoint(tmp_path).name == "a-last.pth"


def test_report_records_a_comparison(cli: CliRunner, tmp_path: Path):
    for seed in (1, 2):
        report.write_json(tmp_path / f"{seed}.json", run_record(seed=seed, commit="a" * 40))
    out = tmp_path / "results" / "tiny.json"
    result = cli.invoke(main, ["report", str(tmp_path / "1.json"), str(tmp_path / "2.json"), "--record", str(out)])
    assert result.exit_code == 0, result.output
    comparison = report.read_json(out, report.COMPARISON_FORMAT)
    assert comparison["models"]["HSTU"]["seeds"] == [1, 2]
    assert comparison["commit"] == "a" * 40
    again = cli.invoke(main, ["report", str(out), "--record", str(tmp_path / "x.json")])
    assert again.exit_code == 2
    assert "--record: none of the files is a run" in again.output


def test_report_takes_other_models_from_a_record(cli: CliRunner, tmp_path: Path):
    old, new, path = tmp_path / "old", tmp_path / "new.json", tmp_path / "both.json"
    for label in ("HSTU", "ULTRA-HSTU"):
        report.write_json(old / f"{label}.json", run_record(label, ndcg=0.25, commit="a" * 40))
    report.write_json(new, run_record("ULTRA-HSTU", seed=2, ndcg=0.5, commit="b" * 40))
    assert cli.invoke(main, ["report", *map(str, sorted(old.iterdir())), "--record", str(path)]).exit_code == 0
    before = report.read_json(path)
    # The record may replace the one that it takes from.
    words = [str(new), "--others", str(path), "--note", "anew", "--markdown"]
    done = cli.invoke(main, ["report", *words, "--record", str(path)])
    assert done.exit_code == 0, done.output
    both = report.read_json(path)
    assert list(both["models"]) == ["HSTU", "ULTRA-HSTU"] and both["note"] == "anew"
    assert both["models"]["ULTRA-HSTU"]["test"]["mean"]["ndcg@10"] == 0.5 and both["commit"] == "b" * 40
    kept = dict(both["models"]["HSTU"])
    assert kept.pop("recorded")["commit"] == "a" * 40
    assert kept == before["models"]["HSTU"]
    assert f"commit {'b' * 12}; HSTU of commit {'a' * 12}. anew" in done.output
    # What was taken over before keeps its own origin.
    done = cli.invoke(main, ["report", *words, "--record", str(path)])
    assert report.read_json(path)["models"]["HSTU"] == both["models"]["HSTU"], done.output
    other = run_record("ULTRA-HSTU", data={"users": 1, "items": 1})
    for changed, message in ((other, "others: expected data"), (run_record(), "")):
        report.write_json(new, changed)
        done = cli.invoke(main, ["report", str(new), "--others", str(path)])
        assert (done.exit_code != 0) == bool(message) and message in done.output
    report.write_json(tmp_path / "same.json", report.compare_records([run_record()]))
    done = cli.invoke(main, ["report", str(new), "--others", str(tmp_path / "same.json")])
    assert "others: expected a model beside HSTU, got none" in done.output
    assert "--others: none of the files" in cli.invoke(main, ["report", str(path), "--others", str(path)]).output
