"""The model against itself: prediction paths, positions that train, keys to configs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hstu_plugin.adapters.recbole import options, run
from hstu_plugin.config import HSTUConfig, LossType, NegativeSource, RetrievalConfig, Similarity, Variant


@pytest.fixture
def trained(tiny: dict[str, Any]) -> Any:
    return run("HSTU", "tiny", config_dict={**tiny, "epochs": 1}, saved=False)


def test_predict_is_a_column_of_full_sort(trained: Any) -> None:
    trained.model.eval()
    rows = trained.test_data._dataset.inter_feat
    for batch in (rows, rows[:1]):
        with torch.no_grad():
            scores, own = trained.model.full_sort_predict(batch), trained.model.predict(batch)
        assert scores.shape == (len(batch), trained.dataset.item_num)
        torch.testing.assert_close(own, scores.gather(1, batch["item_id"][:, None]).squeeze(1))


def test_seen_items_are_never_ranked(tiny: dict[str, Any]) -> None:
    model = run("HSTU", "tiny", config_dict={**tiny, "epochs": 1, "filter_seen_items": True}, saved=False)
    rows = model.test_data._dataset.inter_feat
    scores = model.model.full_sort_predict(rows)
    seen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, rows["item_id_list"], True)
    # Column 0 is the padding.
    assert torch.equal(scores[:, 1:] == -torch.inf, seen[:, 1:])


def test_request_time_reaches_the_scores(trained: Any) -> None:
    trained.model.eval()
    rows = trained.test_data._dataset.inter_feat[:4]
    with torch.no_grad():
        for parameter in trained.model.parameters():
            parameter.mul_(5)
        before = trained.model.full_sort_predict(rows)
        rows["timestamp"] = rows["timestamp"] + 10**8
        assert not torch.equal(before, trained.model.full_sort_predict(rows))
        rows["item_id"] = torch.ones_like(rows["item_id"])
        again = trained.model.full_sort_predict(rows)
        rows["item_id"] = rows["item_id"] + 1
        assert torch.equal(again, trained.model.full_sort_predict(rows))


@pytest.mark.parametrize("examples", ["generative", "prefix"])
def test_positions_that_train(tiny: dict[str, Any], examples: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("HSTU", "tiny", config_dict={**tiny, "epochs": 1, "train_examples": examples}, saved=False)
    seen: list[Any] = []
    monkeypatch.setattr(
        result.model.retrieval, "loss", lambda seq, positives, items, **_: seen.append((seq, positives)) or items.sum()
    )
    rows = result.train_data._dataset.inter_feat
    result.model.calculate_loss(rows)
    (seq, positives), begin = seen[0], 0
    assert seq.timestamps.dtype == torch.int64
    for i, length in enumerate(rows["item_length"].tolist()):
        following = [*rows["item_id_list"][i][1:length].tolist(), int(rows["item_id"][i])]
        if examples == "prefix":
            following[:-1] = [0] * (length - 1)
        assert positives[begin : begin + length].tolist() == following
        begin += length
    assert begin == len(positives)


@pytest.mark.parametrize(
    "values",
    [
        {"loss_type": "sampled_softmax", "num_negatives": 4},
        {"loss_type": "BCE", "negatives": "in_batch", "num_negatives": 2, "similarity": "dot", "temperature": 1.0},
        {"variant": "production", "n_heads": 2, "max_attn_len": 3, "full_attn_tail_len": 2},
        {"variant": "ultra", "time_bias": False, "position_bias": False, "row_time": "event"},
        {"train_examples": "prefix", "adam_betas": [0.9, 0.98], "train_windows": "all"},
        {"eval_args": {"split": {"LS": "test_only"}, "order": "TO", "mode": "full"}},
        {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni10"}},
    ],
)
def test_settings_train(tiny: dict[str, Any], values: dict[str, Any]) -> None:
    result = run("HSTU", "tiny", config_dict={**tiny, "epochs": 1, **values})
    assert "ndcg@10" in result.test_result
    if "test_only" in str(values):
        assert result.best_valid_result is None
        assert result.best_valid_score is None


def _translate_all(values: dict[str, Any]) -> None:
    for translate in (options.hstu_config, options.retrieval_config, options.data_options, options.run_options):
        translate(values)


class TestOptions:
    def test_defaults_are_those_of_the_configs(self) -> None:
        assert options.hstu_config({}) == HSTUConfig()
        assert options.hstu_config(options.default_values()) == HSTUConfig()
        assert options.retrieval_config(options.default_values()) == RetrievalConfig()

    def test_spelling(self) -> None:
        config = options.hstu_config(
            {"hidden_size": 32, "n_layers": 3, "n_heads": 4, "hidden_dropout_prob": 0, "MAX_ITEM_LIST_LENGTH": 9}
            | {"variant": "ultra", "max_attn_len": 4, "attn_scale": 0.5}
        )
        assert (config.embedding_dim, config.num_layers, config.num_heads, config.max_seq_len) == (32, 3, 4, 9)
        assert (config.dropout, config.variant, config.mask.max_attn_len) == (0, Variant.ULTRA, 4)
        assert (config.attention_dim, config.attn_scale) == (8, 0.5)
        head = options.retrieval_config({"loss_type": "BCE", "similarity": "dot", "negatives": "in_batch"})
        assert (head.loss, head.similarity, head.negatives) == (LossType.BCE, Similarity.DOT, NegativeSource.IN_BATCH)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"n_heads": 3}, "^n_heads: expected a divisor"),
            ({"hidden_dropout_prob": 2}, "^hidden_dropout_prob: "),
            ({"variant": "large"}, "^variant: expected one of research"),
            ({"max_attn_len": -1}, "^max_attn_len: "),
            ({"loss_type": "BPR"}, "^loss_type: expected one of CE, sampled_softmax, BCE"),
            ({"train_windows": "some"}, "^train_windows: expected one of latest, all"),
            ({"checkpoint_every": 0}, "^checkpoint_every: "),
            ({"adam_betas": [0.9]}, "^adam_betas: "),
        ],
    )
    def test_errors_speak_recbole(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            _translate_all(values)


def test_nan_says_what_to_do(tiny: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"training loss is .* lower learning_rate"):
        run("HSTU", "tiny", config_dict={**tiny, "learning_rate": 1e38, "learner": "sgd", "epochs": 5})
