"""The log file of a run: closed after it, and RecBole's logging still works for the caller."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hstu_plugin.adapters.recbole import run


@contextmanager
def no_log_yet() -> Iterator[logging.Logger]:
    """The root logger as a plain script has it, without the handlers of the test runner."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    try:
        yield root
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)


def file_handler(root: logging.Logger) -> logging.FileHandler:
    (handler,) = (h for h in root.handlers if isinstance(h, logging.FileHandler))
    return handler


def test_a_script_keeps_logging_into_the_file(tiny: dict[str, Any]) -> None:
    with no_log_yet() as root:
        run("HSTU", "tiny", config_dict={**tiny, "epochs": 1, "state": "INFO"})
        handler = file_handler(root)
        assert handler.stream is None
        file = Path(handler.baseFilename)
        assert "test result" in file.read_text(encoding="utf-8")
        root.info("said afterwards")
        assert "said afterwards" in file.read_text(encoding="utf-8")
        run("HSTU", "tiny", config_dict={**tiny, "epochs": 1, "state": "INFO"})
        assert handler not in root.handlers
        assert len(root.handlers) == 2


def test_a_failed_run_closes_its_file(tiny: dict[str, Any]) -> None:
    with no_log_yet() as root:
        with pytest.raises(ValueError, match="topk"):
            run("HSTU", "tiny", config_dict={**tiny, "topk": [1000], "valid_metric": "NDCG@1000"})
        assert file_handler(root).stream is None


def test_a_log_of_the_callers_own_stays_as_it_was(tiny: dict[str, Any]) -> None:
    mine = logging.StreamHandler()
    with no_log_yet() as root:
        root.addHandler(mine)
        root.setLevel(logging.WARNING)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", ResourceWarning)
            run("HSTU", "tiny", config_dict={**tiny, "epochs": 1, "state": "INFO"})
            gc.collect()
        assert root.handlers == [mine]
        assert root.level == logging.WARNING
    assert not [w for w in seen if issubclass(w.category, ResourceWarning) and ".log" in str(w.message)]


def test_the_log_names_the_backend(tiny: dict[str, Any]) -> None:
    with no_log_yet() as root:
        run("HSTU", "tiny", config_dict={**tiny, "epochs": 1, "state": "INFO", "backend": "eager"})
        assert "backend: eager\n" in Path(file_handler(root).baseFilename).read_text(encoding="utf-8")
