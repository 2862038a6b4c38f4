"""Quality under load-balanced stochastic length: the simulated ranks, and the command at a size of seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import balance_quality as quality
from benchmarks import window_flops
from hstu_kernels import JaggedLayout
from hstu_plugin.config import HSTUConfig
from hstu_plugin.flops import prefill_flops
from hstu_plugin.sequence import JaggedSequence
from hstu_plugin.ultra.load_balance import LoadBalanceConfig, model_load
from hstu_plugin.ultra.stochastic_length import StochasticLengthConfig

LOAD = model_load(HSTUConfig(embedding_dim=8, num_layers=1, max_seq_len=64))
STOCHASTIC = StochasticLengthConfig(alpha=1.7, max_seq_len=64)


def make_ranks(balance: LoadBalanceConfig | None) -> quality.SimulatedRanks:
    return quality.SimulatedRanks(4, 64, STOCHASTIC, balance, LOAD, seed=1)


def imbalance(ranks: quality.SimulatedRanks, steps: int, skipped: int) -> dict[str, float]:
    draws = torch.Generator().manual_seed(0)
    for _ in range(steps):
        events = torch.randint(1, 65, (64,), generator=draws)
        kept = ranks.lengths(events, torch.ones(64, dtype=torch.float64))
        assert bool((kept <= events).all()) and bool((kept >= 1).all())
    return ranks.found(skipped)


def test_a_budget_makes_the_loads_equal() -> None:
    plain = imbalance(make_ranks(None), 40, 10)
    balanced = imbalance(make_ranks(LoadBalanceConfig(warmup_steps=10, period=10)), 40, 10)
    assert plain["mean"] > 1.1
    assert balanced["mean"] < 1.03
    assert abs(balanced["events_kept"] - plain["events_kept"]) < 0.05


def test_a_batch_of_another_size_is_drawn_plainly_and_not_counted() -> None:
    ranks = make_ranks(LoadBalanceConfig(warmup_steps=1, period=1))
    imbalance(ranks, 5, 0)
    kept = ranks.lengths(torch.tensor([64, 3, 40]), torch.ones(3, dtype=torch.float64))
    assert set(kept.tolist()) <= {64, 40, 3, STOCHASTIC.threshold} and kept[1] == 3
    assert len(ranks.loads) == 5


def test_the_latest_events_stay() -> None:
    ranks = quality.SimulatedRanks(2, 2, STOCHASTIC, None, LOAD, seed=1)
    layout = JaggedLayout.from_lengths(torch.tensor([60, 5]))
    seq = JaggedSequence(torch.arange(65)[:, None], layout, torch.arange(65))
    for _ in range(8):
        shorter = ranks(seq)
        kept = shorter.layout.seq_lengths.tolist()
        assert kept[0] in (60, STOCHASTIC.threshold) and kept[1] == 5
        assert shorter.values[:, 0].tolist() == [*range(60 - kept[0], 60), *range(60, 65)]
    with pytest.raises(ValueError, match="ranks: expected at most the 2 users"):
        quality.SimulatedRanks(3, 2, STOCHASTIC, None, LOAD, seed=1)


@pytest.fixture
def small_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    folder = tmp_path / "dataset" / "small"
    folder.mkdir(parents=True)
    draws = torch.Generator().manual_seed(0)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(24):
        items = torch.randperm(40, generator=draws)[: 6 + user % 10].tolist()
        lines += [f"{user}\t{item}\t3\t{100 * user + place}" for place, item in enumerate(items)]
    (folder / "small.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    words = ["--dataset=small", "--data_path=dataset", "--MAX_ITEM_LIST_LENGTH=10", "--topk=[10]"]
    return [*words, "--hidden_size=8", "--n_layers=1", "--n_heads=1", "--epochs=2", "--train_batch_size=8"]


def test_commands(small_log: list[str], tmp_path: Path) -> None:
    runner = CliRunner()
    for way in quality.WAYS:
        for seed in ("1", "2"):
            words = ["run", "--way", way, "--seed", seed, "--ranks", "2", "--warmup-steps", "2", "--period", "2"]
            done = runner.invoke(quality.main, [*words, "--output", f"{way}-{seed}.json", *small_log])
            assert done.exit_code == 0, (done.output, done.exception)
            assert done.output.count("training [time: ") == 2
    files = [f"{way}-{seed}.json" for way in quality.WAYS for seed in (2, 1)]
    done = runner.invoke(quality.main, ["report", *files, "--output", "all.json"])
    assert done.exit_code == 0, done.output
    record = json.loads(Path("all.json").read_text(encoding="utf-8"))
    assert list(record["ways"]) == [*quality.WAYS]
    runs = {(run["settings"]["way"], run["settings"]["seed"]): run for run in record["runs"]}
    assert runs["whole", 1]["loads"] is None and runs["whole", 1]["epochs"] == 2
    assert 1 <= record["ways"]["balanced"]["loads"]["mean"] < record["ways"]["plain"]["loads"]["mean"]
    assert record["ways"]["plain"]["seeds"] == [1, 2]
    values = [runs["plain", seed]["test"]["ndcg@10"] for seed in (1, 2)]
    assert record["ways"]["plain"]["ndcg@10"]["mean"] == pytest.approx(sum(values) / 2)
    assert done.output.count("| balanced | 2 |") == 1
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}", encoding="utf-8")
    assert "wrong.json: expected a file of `run`" in runner.invoke(quality.main, ["report", str(wrong)]).output


def test_operations_over_the_windows_of_a_log(small_log: list[str]) -> None:
    words = ["--recipe", "ml-1m-best", "--case", "HSTU", "--case", "ULTRA-HSTU max_attn_len=2 full_attn_tail_len=2"]
    done = CliRunner().invoke(window_flops.main, [*words, "--output", "flops.json", *small_log])
    assert done.exit_code == 0, (done.output, done.exception)
    rows = json.loads(Path("flops.json").read_text(encoding="utf-8"))["rows"]
    assert [row["split"] for row in rows] == ["train", "test"] * 2
    # The last event of each of the 24 users is what the test asks for; windows hold ten.
    lengths = torch.tensor([min(10, 5 + user % 10) for user in range(24)])
    assert (rows[1]["windows"], rows[1]["events"]) == (24, int(lengths.sum()))
    whole = prefill_flops(HSTUConfig(embedding_dim=8, num_layers=1, max_seq_len=10), lengths)
    assert rows[1]["attention"] == float(whole.attention.sum())
    pairs = lengths * (lengths + 1) // 2
    hidden = sum(max(0, row - 2) for n in lengths.tolist() for row in range(n - 2))
    assert rows[3]["attention_share"] == pytest.approx(1 - hidden / int(pairs.sum()))
