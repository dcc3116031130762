"""Test-wide rules: no network, and `gpu` tests are skipped where there is no CUDA device."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

from .lying import lying

# Measured costs of steps go where no other run finds them; emptied with the temporary directory.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="foretell-tests-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is first imported


@pytest.fixture(scope="session", autouse=True)
def packed_weights_in_blocks() -> Iterator[None]:
    """How weights are multiplied fastest is timed; no test may hang on that. They lie in oneDNN's blocks where they
    can, unless a test says otherwise (see `lying`)."""
    with pytest.MonkeyPatch.context() as patch:
        lying("blocks", patch)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
