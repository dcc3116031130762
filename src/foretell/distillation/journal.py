"""The answers on disk while they come: appended as they end, put in the prompts' order when all are there.

`answers.jsonl.part` begins with a line that says what is being answered and how; then every answer is one line, in the
order in which they end. A kill can only cut the last line short, so going on means: leave that one out, answer what is
missing. `answers.jsonl` appears whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from foretell.errors import ForetellError

DISTILLED = "distilled"  # the field of a record that says where it comes from
Record = dict[str, Any]


class Journal:
    """The unfinished answers to one set of prompts; `done` has the numbers of those that are there.

    `settings` is what the answers depend on. Without `resume` nothing may be there yet.
    Raises ForetellError rather than overwrite anything or mix answers of different settings.
    """

    def __init__(self, output: str | Path, settings: Record, resume: bool) -> None:
        self.output, self.part = Path(output), part_of(output)
        self.done: dict[int, tuple[int, int]] = {}  # number -> offset and length of its line
        self._end = 0
        check_output(output, resume)
        if not self.part.exists() or not self._read(settings):
            self._append({"settings": settings})

    def _read(self, settings: Record) -> bool:
        """Takes in what is there and cuts off what is not whole; whether it has begun at all."""
        header = None
        with self._open("r+b") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break  # where a kill fell
                try:
                    content = json.loads(line)
                    if header is None:
                        header = content["settings"]
                    else:
                        self.done[content[DISTILLED]["number"]] = (self._end, len(line))
                except (ValueError, KeyError, TypeError):
                    raise ForetellError(
                        f"{self.part}, line {number}: damaged, so it can't be resumed; remove the file to begin again"
                    ) from None
                self._end += len(line)
            if header is not None:
                check_settings(self.part, header, settings)
            file.truncate(self._end)
        return header is not None

    def add(self, record: Record) -> None:
        """Appends an answer. It has reached the operating system when this returns: no kill of ours can lose it."""
        start = self._end
        self._append(record)
        self.done[record[DISTILLED]["number"]] = (start, self._end - start)

    def _append(self, content: Record) -> None:
        line = json.dumps(content, ensure_ascii=False).encode() + b"\n"
        with self._open("ab") as file:
            file.write(line)
        self._end += len(line)

    @contextmanager
    def _open(self, mode: str) -> Iterator[BinaryIO]:
        try:
            with open(self.part, mode) as file:
                yield cast(BinaryIO, file)
        except OSError as error:
            raise ForetellError(
                f"{self.part} could not be written ({error.strerror}); make room for it, then go on with --resume"
            ) from error

    def finish(self, wanted: Callable[[Record], bool]) -> None:
        """Writes the output: the wanted records in the order of their numbers. The journal is then gone."""
        temporary = self.output.with_name(self.output.name + ".new")
        try:
            with open(self.part, "rb") as part, open(temporary, "wb") as file:
                for number in sorted(self.done):
                    offset, length = self.done[number]
                    part.seek(offset)
                    line = part.read(length)
                    if wanted(json.loads(line)):
                        file.write(line)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.output)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ForetellError(
                f"{self.output} could not be written ({error.strerror}); make room for it, then go on with --resume"
            ) from error
        self.discard()

    def discard(self) -> None:
        """Takes the journal away: its answers are in the output, or there are none."""
        self.part.unlink(missing_ok=True)


def part_of(output: str | Path) -> Path:
    return Path(f"{output}.part")


def check_output(output: str | Path, resume: bool) -> None:
    """Raises ForetellError if something is there that `resume` does not go on with, or nothing can be written there."""
    output, part = Path(output), part_of(output)
    if output.is_dir() or not output.absolute().parent.is_dir():
        reason = "it is a directory" if output.is_dir() else f"there is no directory {output.parent}"
        raise ForetellError(f"{output} can't be written: {reason}")
    if resume:
        return
    if part.exists():
        raise ForetellError(f"{part} holds unfinished answers; go on with --resume, or give another --output")
    if output.exists():
        raise ForetellError(f"{output} exists already; give another --output")


def check_settings(place: Path, before: Record, now: Record) -> None:
    """Raises ForetellError naming the first setting that differs."""
    for key in (*now, *before):
        if before.get(key) != now.get(key):
            raise ForetellError(
                f"{place} can't be resumed: its answers were made with {key} {before.get(key)}, not {now.get(key)}; "
                "give the same settings, or another --output"
            )
