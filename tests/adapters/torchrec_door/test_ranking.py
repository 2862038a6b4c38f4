"""The ranking door against the core, one user at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hstu_kernels import JaggedLayout
from hstu_plugin.adapters.torchrec import HSTURankingModel, HSTURankingTask, KJTToSequence, check_batch
from hstu_plugin.ranking_losses import multi_task_loss
from hstu_plugin.sequence import JaggedSequence

from .cases import RANKING, RETRIEVAL, TASKS, config, ranking_batch, ranking_model
from .test_retrieval import without


def one_user(model: HSTURankingModel, batch, b: int) -> torch.Tensor:
    """The user's scores through the core alone."""
    tables = {name: table.weight for name, table in model.embeddings.embeddings.items()}

    def of(jagged: KeyedJaggedTensor, key: str) -> torch.Tensor:
        return jagged[key].values().split(jagged[key].lengths().tolist())[b]

    features, numbers = batch.features, batch.numbers
    history = tables["item"][of(features, "item_id")] + tables["action"][of(features, "action")]
    context = torch.stack([tables["user"][of(features, key)].sum(0) for key in ("age", "tags")])
    candidates = tables["item"][of(features, "candidate")]
    times = torch.cat([torch.zeros(2, dtype=torch.int64), of(numbers, "time"), of(numbers, "candidate_time")])
    values = torch.cat([context, history, candidates])
    layout = JaggedLayout.from_lengths(
        torch.tensor([len(values)]), num_targets=torch.tensor([len(candidates)]), contextual_seq_len=2
    )
    return model.head.core(JaggedSequence(values, layout, times))


def test_scores_are_the_cores_in_the_order_of_the_candidates() -> None:
    model, batch = ranking_model().eval(), ranking_batch()
    scores = model(batch.features, batch.numbers)
    wanted = torch.cat([one_user(model, batch, b) for b in range(4)])
    assert scores.shape == (2 + 3 + 0 + 1, 2) and scores.std() > 0.01
    torch.testing.assert_close(scores, wanted)


def test_loss_is_the_cores_multi_task_loss() -> None:
    model, batch = ranking_model(), ranking_batch()
    loss, (_, rows) = HSTURankingTask(model)(batch)
    wanted, _ = multi_task_loss(model(batch.features, batch.numbers), batch.labels, TASKS)
    torch.testing.assert_close(loss, wanted)
    assert rows == 11
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.embeddings.parameters())


def test_an_action_of_the_history_moves_the_scores_and_a_label_does_not() -> None:
    model, batch = ranking_model().eval(), ranking_batch()
    before = model(batch.features, batch.numbers)
    batch.features["action"].values()[0] = 7 - batch.features["action"].values()[0]
    after = model(batch.features, batch.numbers)
    assert not torch.equal(before[:2], after[:2])
    torch.testing.assert_close(before[2:], after[2:])


def test_candidates_without_timestamps() -> None:
    model, batch = ranking_model(), ranking_batch()
    with pytest.raises(ValueError, match="'candidate_time': candidates without timestamps"):
        check_batch(replace(batch, numbers=without(batch.numbers, "candidate_time")), RANKING)
    with pytest.raises(ValueError, match="candidates without timestamps"):
        model(batch.features, without(batch.numbers, "candidate_time"))
    with pytest.raises(ValueError, match="candidate_time"):
        HSTURankingModel(config(), replace(RANKING, candidate_time=None), TASKS)


def test_labels_must_fit_the_candidates() -> None:
    batch = ranking_batch()
    check_batch(batch, RANKING, num_tasks=2)
    for labels in (None, batch.labels[:-1], batch.labels[:, :1]):
        with pytest.raises(ValueError, match=r"labels: expected \[6, 2\]"):
            check_batch(replace(batch, labels=labels), RANKING, num_tasks=2)


def test_candidates_need_a_key() -> None:
    with pytest.raises(ValueError, match=r"schema\.candidate"):
        KJTToSequence(
            replace(
                RETRIEVAL,
                candidate=None,
                tables=(replace(RETRIEVAL.tables[0], features=("item_id", "negative")), RETRIEVAL.tables[1]),
            ),
            with_candidates=True,
        )


def test_tasks_share_the_weights_under_the_same_names() -> None:
    model = ranking_model()
    task = HSTURankingTask(model)
    assert task.state_dict().keys() == model.state_dict().keys()
    assert {id(p) for p in task.parameters()} == {id(p) for p in model.parameters()}
