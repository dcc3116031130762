"""Test-wide rules: no network, and `gpu` tests are skipped where there is no CUDA device."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

# Measured costs of steps go where no other run finds them; emptied with the temporary directory.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="foretell-tests-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is first imported


@pytest.fixture(scope="session", autouse=True)
def packed_weights_in_blocks() -> Iterator[None]:
    """Whether oneDNN's blocks are faster is timed; no test may hang on that. A test that wants weights as stored
    says so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foretell.packed.pays", lambda d_out, d_in, dtype: True)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
