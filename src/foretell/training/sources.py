"""Where training text is read from: files, directories and data sets of the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foretell.errors import ForetellError

Message = dict[str, str]
Record = str | list[Message]  # a text, or the messages of a conversation

SUFFIXES = (".jsonl", ".txt", ".md", ".py")
DOCUMENT_END = "<|endoftext|>"  # on a line of its own it ends a document of a text file
ACCEPTED = '{"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'


def read_records(source: str | Path) -> Iterator[Record]:
    """Texts and conversations from a file, a directory or a Hub data set (split "train").

    - .jsonl: one record per line, {"text": ...} or {"messages": [{"role": ..., "content": ...}, ...]}
    - .txt, .md, .py: one document, or several with a line "<|endoftext|>" behind each
    - a directory: all such files below it, sorted

    Raises ForetellError naming the file and line at fault.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise ForetellError(f"{path} has no {', '.join(SUFFIXES)} file below it; give a directory that holds text")
        for file in files:
            yield from _read_file(file)
    elif path.is_file():
        if path.suffix not in SUFFIXES:
            raise ForetellError(
                f"{path} is not a {', '.join(SUFFIXES)} file; convert it to one record per line: {ACCEPTED}"
            )
        yield from _read_file(path)
    elif path.suffix in SUFFIXES or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise ForetellError(f"{source} does not exist; give a file, a directory or the name of a Hub data set")
    else:
        yield from _read_hub(str(source))


def _read_file(path: Path) -> Iterator[Record]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ForetellError(f"{path} can't be read ({error.strerror}); check its permissions") from error
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path, content)
        return
    document: list[str] = []
    for number, line in enumerate(content.split(b"\n"), 1):
        text = _decode(line, path, number)
        if text.strip() == DOCUMENT_END:
            yield from _document(document)
            document = []
        else:
            document.append(text)
    yield from _document(document)


def _document(lines: list[str]) -> Iterator[str]:
    text = "\n".join(lines).strip("\n")
    if text.strip():
        yield text


def _read_jsonl(path: Path, content: bytes) -> Iterator[Record]:
    for number, line in enumerate(content.split(b"\n"), 1):
        text = _decode(line, path, number)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ForetellError(
                f"{path}, line {number}: not JSON ({error.msg}); write one record per line: {ACCEPTED}"
            ) from None
        yield _check(record, f"{path}, line {number}")


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        raise ForetellError(f"{path}, line {number}: not UTF-8 text; convert the file (iconv -t utf-8)") from None


def _check(record: Any, where: str) -> Record:
    """The text or messages of a record. Raises ForetellError naming the place and the accepted fields."""
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return str(record["text"])
    if isinstance(record, dict) and all(isinstance(record.get(name), str) for name in ("prompt", "completion")):
        return str(record["prompt"]) + str(record["completion"])
    messages = record.get("messages") if isinstance(record, dict) else None
    if isinstance(messages, list) and messages:
        for message in messages:
            named = isinstance(message, dict) and isinstance(message.get("role"), str)
            if not named or not isinstance(message.get("content"), str):
                raise ForetellError(
                    f'{where}: a message needs "role" and "content", both texts; accepted is {ACCEPTED}'
                )
        return messages
    found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
    raise ForetellError(f"{where}: found {found or 'nothing'}; a record must be {ACCEPTED}")


def _read_hub(name: str) -> Iterator[Record]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the library raises many types for "not there" and "no network"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ForetellError(
            f"{name} is neither a file nor a Hub data set that can be loaded ({reason}); check name and network"
        ) from error
    for number, row in enumerate(rows, 1):
        yield _check(row, f"{name}, row {number}")
