"""The prompts to be answered: files, directories and Hub data sets, in the forms in which prompts are found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from foretell.errors import ForetellError
from foretell.evaluation import prompts as prompt_sets
from foretell.training.sources import hub_rows

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
FIELDS = ("messages", "conversations", "prompt", "instruction", "question", "text")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the answer that is wanted. `where`: file and line, or data set and row."""

    where: str
    messages: tuple[Message, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.messages, sort_keys=True).encode()).hexdigest()

    @property
    def text(self) -> str | None:
        """Of a prompt that is a single message of the user; None for a conversation."""
        return self.messages[0]["content"] if [m["role"] for m in self.messages] == ["user"] else None

    @property
    def empty(self) -> bool:
        return not self.messages or not self.messages[-1]["content"].strip()


def read_prompts(source: str | Path, limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts of a packaged set, a file, all files of a directory, or a Hub data set ("train").

    A `.txt` file has a prompt per non-empty line. A record of a `.jsonl` file, a `.json` list, a `.parquet` table or a
    Hub data set has a field `messages`, `conversations` (ShareGPT), `prompt`, `instruction` (with `input`), `question`
    or `text`; answers at the end of a conversation are left out.
    Raises ForetellError naming the place and the accepted fields.
    """
    prompts = [Prompt(where, tuple(_messages(record, where))) for where, record in islice(_records(source), limit)]
    if not prompts:
        raise ForetellError(f"{source} holds no prompts: it needs one per line")
    return prompts


def _records(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise ForetellError(f"{path} has no {', '.join(SUFFIXES)} file below it; give a directory of prompts")
        for file in files:
            yield from _file_records(file, str(file.relative_to(path)))
    elif path.exists() or path.suffix in SUFFIXES or str(source) in prompt_sets.NAMES or str(source).count("/") != 1:
        yield from _file_records(path, path.name)
    else:
        yield from _hub_records(str(source))


def _file_records(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix not in (".json", ".parquet"):
        for number, record in prompt_sets.read_records(path, fields=FIELDS):
            yield f"{name}:{number}", record
        return
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist() if path.suffix == ".parquet" else json.loads(path.read_bytes())
    except (OSError, ValueError) as error:  # of which pyarrow's and json's own are kinds
        reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        raise ForetellError(f"{path} cannot be read: {reason}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ForetellError(f"{path}: a .json file of prompts must be a list of records; found {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        yield f"{name}:{number}", row


def _hub_records(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(hub_rows(name), 1):
        yield f"{name}:{number}", row


def _messages(record: dict[str, Any], where: str) -> list[Message]:
    """The conversation of a record, without the answers at its end; [] if there is nothing to answer."""
    field = next((name for name in FIELDS if record.get(name) is not None), None)
    if field is None:
        raise ForetellError(f"{where}: needs a field {', '.join(FIELDS[:-1])} or {FIELDS[-1]}; it has none")
    value = record[field]
    if field in ("messages", "conversations"):
        messages = [_message(turn, where) for turn in value] if isinstance(value, (list, tuple)) else None
        if messages is None:
            raise ForetellError(f"{where}: {field} must be a list of objects with role and content")
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return messages
    if not isinstance(value, str):
        raise ForetellError(f"{where}: {field} must be a text, not {value!r:.80}")
    if field == "instruction" and isinstance(more := record.get("input"), str) and more.strip():
        value = f"{value}\n\n{more}"
    return [{"role": "user", "content": value}]


def _message(turn: Any, where: str) -> Message:
    if isinstance(turn, dict):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": ROLES.get(role, role), "content": content}
    raise ForetellError(f"{where}: a message needs role and content (or from and value), both texts")
