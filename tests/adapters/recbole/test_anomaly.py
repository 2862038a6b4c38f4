"""RecBole leaves autograd's anomaly detection on for the whole process; our trainings do not pay for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recbole.model.sequential_recommender import SASRec

from hstu_plugin.adapters.recbole import run
from hstu_plugin.adapters.recbole.model import HSTU


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize(("model", "values"), [(HSTU, {}), (SASRec, {"train_neg_sample_args": None, "n_heads": 2})])
def test_it_is_as_asked_and_left_as_it_was(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, model: type[Any], values: dict[str, Any], wanted: bool
) -> None:
    seen = []
    original = model.calculate_loss

    def spy(self: Any, interaction: Any) -> Any:
        seen.append(torch.is_anomaly_enabled())
        return original(self, interaction)

    monkeypatch.setattr(model, "calculate_loss", spy)
    before = torch.is_anomaly_enabled()
    run(model.__name__, "tiny", config_dict={**tiny, **values, "epochs": 1, "detect_anomaly": wanted}, saved=False)
    assert seen
    assert set(seen) == {wanted}
    assert torch.is_anomaly_enabled() is before
