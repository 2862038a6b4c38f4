"""ULTRA-HSTU through RecBole: names, defaults, ratings as actions, truncation, stochastic length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.config import Config
from recbole.utils import get_model, get_trainer

from hstu_kernels import AttentionMask
from hstu_plugin.adapters.recbole import load, options, run, settings
from hstu_plugin.adapters.recbole.actions import UNKNOWN, ActionEmbedding, level_boundaries
from hstu_plugin.adapters.recbole.dataset import HSTUDataset
from hstu_plugin.adapters.recbole.model import HSTU, ULTRAHSTU
from hstu_plugin.adapters.recbole.trainer import HSTUTrainer
from hstu_plugin.config import Recompute, Variant
from hstu_plugin.ultra.stochastic_length import Sampling, StochasticLengthConfig

NAMES = ["ULTRA-HSTU", "ULTRAHSTU"]


@pytest.fixture
def rated(tiny: dict[str, Any]) -> dict[str, Any]:
    """The data set ``rated``: ``tiny`` with ratings from 1 to 5 and some missing."""
    folder = Path("dataset/rated")
    folder.mkdir()
    header, *lines = Path("dataset/tiny/tiny.inter").read_text(encoding="utf-8").splitlines()
    draw = np.random.default_rng(3)
    ratings = ["" if draw.random() < 0.1 else str(draw.integers(1, 6)) for _ in lines]
    rows = [f"{header}\trating:float", *(f"{line}\t{rating}" for line, rating in zip(lines, ratings, strict=True))]
    (folder / "rated.inter").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tiny


@pytest.mark.parametrize("name", NAMES)
def test_recbole_finds_both_names(name: str) -> None:
    import recbole.data.dataset as room

    assert get_model(name) is ULTRAHSTU
    assert get_trainer(ULTRAHSTU.type, name) is HSTUTrainer
    assert getattr(room, f"{name}Dataset") is HSTUDataset
    assert settings.model_defaults(name)["variant"] == "ultra"


@pytest.mark.parametrize("name", NAMES)
def test_stock_quick_start_and_load(rated: dict[str, Any], name: str) -> None:
    from recbole.quick_start import load_data_and_model, run_recbole

    result = run_recbole(model=name, dataset="rated", config_dict=dict(rated))
    assert set(result["test_result"]) == {"hit@10", "ndcg@10", "mrr@10"}
    file = next(f for f in Path("saved").glob(f"{name}-*.pth") if not f.stem.endswith("-last"))
    _, model, *_ = load_data_and_model(str(file))
    assert isinstance(model, ULTRAHSTU)
    assert model.action_field == "rating"


def test_defaults_of_the_model(rated: dict[str, Any]) -> None:
    config = Config("ULTRA-HSTU", "rated", config_dict=dict(rated))
    made = options.hstu_config(config.final_config_dict)
    assert made.variant is Variant.ULTRA
    assert made.mask == AttentionMask(max_attn_len=256, full_attn_tail_len=256)
    assert not made.time_bias and not made.truncates
    # The user's words count more.
    asked = {**rated, "variant": "research", "max_attn_len": 4, "action_field": None}
    made = options.hstu_config(Config("ULTRAHSTU", "rated", config_dict=asked).final_config_dict)
    assert (made.variant, made.mask.max_attn_len, made.mask.full_attn_tail_len) == (Variant.RESEARCH, 4, 256)


def test_our_runner_trains_saves_and_loads(rated: dict[str, Any]) -> None:
    result = run("ULTRA-HSTU", "rated", config_dict=rated)
    assert result.model.action_embedding is not None
    assert result.model_file is not None
    loaded = load(result.model_file)
    assert torch.equal(loaded.model.action_embedding.boundaries, result.model.action_embedding.boundaries)
    assert loaded.evaluate("test") == result.test_result


def test_data_without_ratings(tiny: dict[str, Any]) -> None:
    result = run("ULTRA-HSTU", "tiny", config_dict={**tiny, "epochs": 1})
    assert result.model.action_embedding is None
    assert "ndcg@10" in result.test_result


def test_hstu_takes_no_ratings_unless_asked(rated: dict[str, Any]) -> None:
    plain = run("HSTU", "rated", config_dict={**rated, "epochs": 1}, saved=False)
    assert isinstance(plain.model, HSTU) and plain.model.action_embedding is None
    assert "rating" not in plain.dataset.inter_feat.columns
    asked = run("HSTU", "rated", config_dict={**rated, "epochs": 1, "action_field": "rating"}, saved=False)
    assert asked.model.action_embedding is not None


def test_ratings_reach_the_tokens_exactly(rated: dict[str, Any]) -> None:
    result = run("ULTRA-HSTU", "rated", config_dict={**rated, "epochs": 1, "normalize_all": True}, saved=False)
    rows = result.train_data._dataset.inter_feat
    lists = rows["rating_list"]
    real = torch.arange(lists.shape[1]) < rows["item_length"][:, None]
    assert set(lists[real].unique().tolist()) == {UNKNOWN, 1.0, 2.0, 3.0, 4.0, 5.0}
    levels = result.model.action_embedding.levels(torch.tensor([UNKNOWN, float("nan"), 1, 2, 3, 4, 5, 0, 9]))
    assert levels.tolist() == [0, 0, 1, 2, 3, 4, 5, 1, 5]
    assert float(result.model.action_embedding(torch.zeros(1, dtype=torch.int64)).detach().abs().sum()) == 0


@pytest.mark.parametrize("examples", ["generative", "prefix"])
def test_nothing_of_the_predicted_event_leaks(rated: dict[str, Any], examples: str) -> None:
    result = run("ULTRA-HSTU", "rated", config_dict={**rated, "epochs": 1, "train_examples": examples}, saved=False)
    model = result.model.eval()
    test = result.test_data._dataset.inter_feat
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        scores = model.full_sort_predict(test)
        # The candidate's own rating, shuffled.
        test["rating"] = test["rating"].flip(0) + 1
        assert torch.equal(model.full_sort_predict(test), scores)
        # A rating of the history does count.
        test["rating_list"] = 6 - test["rating_list"]
        assert not torch.equal(model.full_sort_predict(test), scores)
    # In training a row knows the ratings up to its own event and none behind.
    rows = result.train_data._dataset.inter_feat
    row = int(rows["item_length"].argmax())
    numbers = rows["rating_list"][row : row + 1, : int(rows["item_length"][row])]
    seen = []
    for changed in (numbers, torch.cat([numbers[:, :-1], 6 - numbers[:, -1:]], dim=1)):
        batch = rows[row : row + 1]
        batch["rating_list"] = torch.nn.functional.pad(changed, (0, rows["rating_list"].shape[1] - changed.shape[1]))
        seq = model._sequence(batch)
        with torch.no_grad():
            seen.append(model.retrieval.encode(seq.with_values(model._vectors(seq.values))).values)
    if torch.isfinite(numbers[0, -1]):
        assert torch.equal(seen[0][:-1], seen[1][:-1])
        assert not torch.equal(seen[0][-1], seen[1][-1])


def test_levels() -> None:
    assert level_boundaries(torch.tensor([3.0, 1.0, 2.0, 2.0]), 3).tolist() == [1.5, 2.5]
    assert level_boundaries(torch.tensor([4.0]), 3).tolist() == []
    many = level_boundaries(torch.arange(1000), 4)
    assert many.tolist() == [250, 500, 750]
    # Most values alike: fewer levels rather than empty ones.
    assert level_boundaries(torch.cat([torch.zeros(900), torch.arange(1, 101)]), 4).tolist() == [0]
    embedding = ActionEmbedding(torch.tensor([UNKNOWN]), 4, 8)
    assert embedding.levels(torch.tensor([UNKNOWN, 2.0])).tolist() == [0, 1]


@pytest.mark.parametrize(
    "values",
    [
        {"truncate_after_layers": 1, "truncate_to": 3, "n_layers": 2},
        {"stochastic_length_alpha": 1.2, "stochastic_length_sampling": "random"},
        {"stochastic_length_alpha": 1.2, "train_examples": "prefix"},
        {"recompute": ["input_norm", "uvqk", "gated_output"], "hidden_dropout_prob": 0.3},
        {"max_attn_len": 2, "full_attn_tail_len": 0, "global_prefix_len": 2},
        {"time_bias": True, "truncate_after_layers": 1, "truncate_to": 3, "n_layers": 2},
    ],
)
def test_settings_train(rated: dict[str, Any], values: dict[str, Any]) -> None:
    result = run("ULTRA-HSTU", "rated", config_dict={**rated, "epochs": 1, **values})
    assert "ndcg@10" in result.test_result


def test_stochastic_length_shortens_training_alone(rated: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    values = {**rated, "epochs": 1, "stochastic_length_alpha": 1.2}
    model = run("ULTRA-HSTU", "rated", config_dict=values, saved=False)
    network, rows = model.model, model.train_data._dataset.inter_feat
    seen: list[Any] = []
    monkeypatch.setattr(
        network.retrieval, "loss", lambda seq, positives, items, **_: seen.append((seq, positives)) or items.sum()
    )
    network.train().calculate_loss(rows)
    network.eval().calculate_loss(rows)
    threshold = StochasticLengthConfig(alpha=1.2, max_seq_len=8).threshold
    assert threshold == 3
    short, whole = seen[0][0].layout.seq_lengths, seen[1][0].layout.seq_lengths
    assert torch.equal(whole, rows["item_length"])
    cut = short < whole
    assert bool(cut.any()) and bool((short[cut] == threshold).all())
    # The kept rows are the latest, and predict what they predict without.
    for user in range(len(rows)):
        n = int(short[user])
        ends = [int(part[0].layout.seq_offsets[user + 1]) for part in seen]
        assert torch.equal(seen[0][1][ends[0] - n : ends[0]], seen[1][1][ends[1] - n : ends[1]])


class TestOptions:
    TRANSLATORS = {  # noqa: RUF012
        "stochastic": options.stochastic_length_config,
        "action": options.data_options,
        "": options.hstu_config,
    }

    def test_spelling(self) -> None:
        values = {"MAX_ITEM_LIST_LENGTH": 40, "n_layers": 3, "truncate_after_layers": 2, "truncate_to": 10}
        values |= {"recompute": ["uvqk"], "stochastic_length_alpha": 1.5, "stochastic_length_sampling": "random"}
        config = options.hstu_config(values)
        assert (config.truncate_after_layers, config.truncate_to, config.recompute) == (2, 10, (Recompute.UVQK,))
        expected = StochasticLengthConfig(alpha=1.5, max_seq_len=40, sampling=Sampling.RANDOM)
        assert options.stochastic_length_config(values) == expected
        assert options.stochastic_length_config({}) is None

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"stochastic_length_alpha": 3}, "^stochastic_length_alpha: expected a number"),
            ({"stochastic_length_alpha": 1.5, "stochastic_length_sampling": "x"}, "^stochastic_length_sampling: "),
            ({"truncate_after_layers": 9, "truncate_to": 1}, "^truncate_after_layers: "),
            ({"recompute": ["all"]}, "^recompute: expected one of"),
            ({"action_levels": 0}, "^action_levels: expected an int >= 1"),
            ({"action_field": 3}, "^action_field: expected the name"),
        ],
    )
    def test_errors_speak_recbole(self, values: dict[str, Any], message: str) -> None:
        translate = next(t for start, t in self.TRANSLATORS.items() if message.startswith(f"^{start}"))
        with pytest.raises(ValueError, match=message):
            translate(values)


def test_a_column_that_is_not_there_is_refused(tiny: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^action_field: expected a numerical column .* got 'stars'"):
        run("ULTRA-HSTU", "tiny", config_dict={**tiny, "action_field": "stars"})
