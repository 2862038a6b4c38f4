"""Tables of several features as one parameter: the same numbers as separate tables, and ids that stay inside theirs."""

from __future__ import annotations

import pytest
import torch

from hstu_plugin.feature_tables import FeatureTables
from hstu_plugin.ranking_config import Categorical

FEATURES = (
    Categorical(name="item", num_ids=5),
    Categorical(name="page", num_ids=2),
    Categorical(name="age", num_ids=3),
)
IDS = torch.tensor([[4, 0, 2], [0, 1, 0], [4, 1, 1]])


def test_rows_and_gradients_are_those_of_separate_tables() -> None:
    tables = FeatureTables(FEATURES, 4).double()
    separate = [tables.table(k).detach().clone().requires_grad_() for k in range(3)]
    weights = torch.randn(3, 3, 4, dtype=torch.float64)
    rows = tables(IDS)
    expected = torch.stack([table[IDS[:, k]] for k, table in enumerate(separate)], 1)
    assert torch.equal(rows, expected)
    assert torch.equal(tables.one(1, IDS[:, 1]), separate[1][IDS[:, 1]])
    (rows * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.allclose(tables.rows.weight.grad, torch.cat([table.grad for table in separate]), rtol=1e-12)


def test_unknown_ids_start_at_zero_and_the_others_do_not() -> None:
    tables = FeatureTables(FEATURES, 4)
    for k, feature in enumerate(FEATURES):
        table = tables.table(k)
        assert table.shape == (feature.num_ids, 4)
        assert not table[0].any() and table[1:].any(1).all()
    assert set(tables.state_dict()) == {"rows.weight"}


@pytest.mark.parametrize(("row", "column", "bad"), [(0, 1, 2), (1, 0, 5), (2, 2, -1)])
def test_an_id_never_reads_another_features_row(row: int, column: int, bad: int) -> None:
    ids = IDS.clone()
    ids[row, column] = bad
    feature = FEATURES[column]
    with pytest.raises(IndexError, match=rf"{feature.name}: expected ids in \[0, {feature.num_ids}\)"):
        FeatureTables(FEATURES, 4)(ids)


def test_no_features_and_no_rows() -> None:
    none = FeatureTables((), 4)
    assert none(torch.zeros(3, 0, dtype=torch.int64)).shape == (3, 0, 4)
    assert not list(none.parameters()) and not none.state_dict()
    assert FeatureTables(FEATURES, 4)(IDS[:0]).shape == (0, 3, 4)
    with pytest.raises(ValueError, match=r"ids: expected \[R, 3\] for item, page, age"):
        FeatureTables(FEATURES, 4)(IDS[:, :2])
