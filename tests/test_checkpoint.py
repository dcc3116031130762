"""The files of a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from foretell.checkpoint import read_safetensors, write_safetensors


def test_what_is_saved_may_be_read_by_all_whom_the_umask_lets(tmp_path: Path) -> None:
    """safetensors itself writes files for their owner alone: a service of another user could not load the adapter."""
    path = tmp_path / "foretell.safetensors"
    before = os.umask(0o027)
    try:
        for value in (0.0, 1.0):  # new, and in the place of an older one
            write_safetensors({"a": torch.full((2,), value)}, path)
            assert path.stat().st_mode & 0o777 == 0o640
            assert read_safetensors(path)["a"].tolist() == [value, value]
    finally:
        os.umask(before)
