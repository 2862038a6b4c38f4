"""What the tests of this door share: they run where TorchRec is installed, with one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("torchrec", reason="TorchRec is not installed: make install-torchrec")


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
