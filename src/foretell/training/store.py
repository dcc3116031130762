"""Tokenised text on disk, mapped into memory when read: data of any size are tokenised once and never held whole.

A directory of plain little-endian arrays, without pickles: `ids` (int32) and `trained` (uint8) of all examples behind
each other, `ends` (int64), `skipped.jsonl` with every bad record, and `about.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np
import torch

from foretell.errors import ForetellError
from foretell.training.examples import Example, Part

ABOUT_FILE, SKIPPED_FILE = "about.json", "skipped.jsonl"
KINDS: dict[str, np.dtype[Any]] = {"ids": np.dtype("<i4"), "trained": np.dtype("<u1"), "ends": np.dtype("<i8")}


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/foretell/data`, `~/.cache` where that is not set. It may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foretell" / "data"


class Store(Sequence[Example]):
    """A finished directory; `about` is what `Writer.finish` was given."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.about: dict[str, Any] = json.loads((directory / ABOUT_FILE).read_text(encoding="utf-8"))
        self._ids, self._trained, self._ends = (
            np.memmap(directory / name, dtype=kind, mode="r") for name, kind in KINDS.items()
        )

    @classmethod
    def find(cls, directory: Path) -> Store | None:
        """None if there is none, or a damaged one."""
        try:
            return cls(directory)
        except (OSError, ValueError):
            return None

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, end = int(self._ends[index - 1]) if index else 0, int(self._ends[index])
        # Copies: a tensor over a read-only map is undefined behaviour for whoever writes into it.
        ids, trained = np.array(self._ids[start:end], dtype=np.int32), np.array(self._trained[start:end], dtype=bool)
        return Example(torch.from_numpy(ids), torch.from_numpy(trained))

    def part(self, weight: float | None) -> Part:
        """All of it, as a part of a mixture."""
        return Part(self, np.arange(len(self)), np.diff(self._ends, prepend=0), weight)


class Writer:
    """Writes beside the final directory, which appears whole in `finish` or not at all.

    Raises ForetellError with what to do if the disk is full or not writable.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = ExitStack()
        self._end = 0

    def __enter__(self) -> Self:
        try:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self._part = Path(tempfile.mkdtemp(prefix="part-", dir=self.directory.parent))
            self._files = {
                name: self._stack.enter_context((self._part / name).open("wb")) for name in (*KINDS, SKIPPED_FILE)
            }
        except OSError as error:
            raise self._failure(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stack.close()
        except OSError as failure:  # what was left in buffers no longer fits
            if error is None:
                raise self._failure(failure) from failure
        finally:
            shutil.rmtree(self._part, ignore_errors=True)

    def add(self, example: Example) -> None:
        self._end += len(example.ids)
        self._write("ids", example.ids.numpy().astype(KINDS["ids"]).tobytes())
        self._write("trained", example.trained.numpy().astype(KINDS["trained"]).tobytes())
        self._write("ends", np.array([self._end], dtype=KINDS["ends"]).tobytes())

    def skip(self, record: dict[str, Any]) -> None:
        """Notes a bad record."""
        self._write(SKIPPED_FILE, (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))

    def finish(self, about: dict[str, Any]) -> Store:
        try:
            self._stack.close()
            (self._part / ABOUT_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            if self.directory.exists() and Store.find(self.directory) is None:
                shutil.rmtree(self.directory)
            if not self.directory.exists():  # another process may have been faster
                os.replace(self._part, self.directory)
        except OSError as error:
            raise self._failure(error) from error
        return Store(self.directory)

    def _write(self, name: str, content: bytes) -> None:
        try:
            self._files[name].write(content)
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> ForetellError:
        return ForetellError(
            f"tokenised data can't be kept in {self.directory.parent} ({error.strerror or error}); free some space "
            "there, or set XDG_CACHE_HOME to another directory"
        )
