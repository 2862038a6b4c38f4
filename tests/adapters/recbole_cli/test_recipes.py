"""The recipes that come with the package."""

from __future__ import annotations

from typing import Any

import pytest

from hstu_plugin.adapters.recbole import options, settings
from hstu_plugin.config import LossType, Similarity

NAMES = ("amazon-beauty", "amazon-books", "amazon-sports", "ml-100k", "ml-1m", "ml-1m-large", "ml-20m")


def read(name: str) -> dict[str, Any]:
    return settings.read_settings([settings.recipe_path(name)])


def test_the_promised_recipes_are_there():
    assert set(NAMES) <= set(settings.recipes())
    assert "hstu" not in settings.recipes()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_makes_valid_configs(name: str):
    values = read(name)
    config = options.hstu_config(values)
    assert config.max_seq_len == values["MAX_ITEM_LIST_LENGTH"]
    options.retrieval_config(values)
    options.data_options(values)
    options.run_options(values)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_names_its_data_and_ranks_fully(name: str):
    values = read(name)
    assert values["model"] == "HSTU"
    assert isinstance(values["dataset"], str)
    assert {"user_id", "item_id", "timestamp"} <= set(values["load_col"]["inter"])
    assert values.get("eval_args", {"mode": "full"})["mode"] == "full"
    assert values["valid_metric"].partition("@")[0] in values["metrics"]
    assert int(values["valid_metric"].partition("@")[2]) in values["topk"]
    # PyYAML reads 1e-3 as text.
    assert all(isinstance(values[key], int | float) for key in ("learning_rate", "epochs", "temperature"))
    assert len(settings.describe_recipe(settings.recipe_path(name))) > 20


def test_published_ml_1m():
    values = read("ml-1m")
    config, head = options.hstu_config(values), options.retrieval_config(values)
    assert (config.embedding_dim, config.num_layers, config.num_heads) == (50, 2, 1)
    assert (config.attention_dim, config.linear_dim, config.max_seq_len) == (50, 50, 200)
    assert config.attn_scale == pytest.approx(1 / 211)
    assert (head.loss, head.num_negatives, head.temperature) == (LossType.SAMPLED_SOFTMAX, 128, 0.05)
    assert head.similarity is Similarity.L2
    assert options.run_options(values).adam_betas == (0.9, 0.98)
    assert options.run_options(values).filter_seen_items
    assert values["eval_args"]["split"] == {"LS": "test_only"}
    assert (values["train_batch_size"], values["epochs"], values["learning_rate"]) == (128, 101, 1e-3)


def test_published_ml_1m_large_differs_in_size_only():
    small, large = read("ml-1m"), read("ml-1m-large")
    assert {key for key in small if small[key] != large[key]} == {"n_layers", "n_heads", "attention_dim", "linear_dim"}
    config = options.hstu_config(large)
    assert (config.num_layers, config.num_heads, config.attention_dim, config.linear_dim) == (8, 2, 25, 25)


def test_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(settings.SettingsError, match="ml-1m-large"):
        settings.recipe_path("ml-1b")
