"""Small data sets on disk, and runs in a folder of their own."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("recbole") is None:
    collect_ignore_glob = ["test_*.py"]

Write = Callable[..., Path]
Event = tuple[int, int, float]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # RecBole reads --key=value of any process as configuration, and writes log/ and log_tensorboard/ here.
    monkeypatch.setattr(sys, "argv", ["test"])
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    handlers = list(logging.getLogger().handlers)
    yield
    torch.set_num_threads(threads)
    for handler in set(logging.getLogger().handlers) - set(handlers):
        logging.getLogger().removeHandler(handler)
        handler.close()


@pytest.fixture
def write_inter(tmp_path: Path) -> Write:
    """Writes ``dataset/<name>/<name>.inter`` of ``(user, item, time)`` events; without times when ``time`` is None."""

    def write(events: Sequence[Event], name: str = "tiny", time: str | None = "timestamp") -> Path:
        folder = tmp_path / "dataset" / name
        folder.mkdir(parents=True, exist_ok=True)
        header = "user_id:token\titem_id:token" + (f"\t{time}:float" if time else "")
        lines = [f"u{u}\ti{i}" + (f"\t{t}" if time else "") for u, i, t in events]
        (folder / f"{name}.inter").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
        return folder

    return write


@pytest.fixture
def tiny(write_inter: Write) -> dict[str, Any]:
    """Data set ``tiny`` (30 users of 2 to 20 events, 40 items) and settings for runs of a second."""
    draw = np.random.default_rng(7)
    events: list[Event] = []
    for user in range(30):
        length = 2 + user % 19
        times = 1_400_000_000 + np.cumsum(draw.integers(1, 50_000, length))
        items = draw.permutation(40)[:length]
        events += [(user, int(i), int(t)) for i, t in zip(items, times, strict=True)]
    draw.shuffle(events)
    write_inter([(int(u), int(i), int(t)) for u, i, t in events])
    return {
        "data_path": "dataset",
        "hidden_size": 8,
        "n_layers": 1,
        "MAX_ITEM_LIST_LENGTH": 8,
        "epochs": 2,
        "train_batch_size": 8,
        "show_progress": False,
        "state": "ERROR",
    }
