"""Where training text is read from: files, directories and data sets of the Hugging Face Hub, record by record."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from foretell.errors import ForetellError, reason_of
from foretell.training.records import ACCEPTED, BadRecord, Record, parse_record

TEXTS = (".txt", ".md", ".py")
SUFFIXES = (".jsonl", ".json", ".parquet", *TEXTS)
DOCUMENT_END = b"<|endoftext|>"  # on a line of its own it ends a document of a text file
DOCUMENT_MOST = 1 << 26  # bytes: a longer document goes on as the next, so that no file is ever held whole


class Place(NamedTuple):
    """Where a record stands, for people: numbers count from 1."""

    file: str
    number: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


Located = tuple[Place, Record | BadRecord]


@dataclass(frozen=True)
class Source:
    """One of the places that training text comes from; its weight is its share of a mixture, relative to the others."""

    name: str
    weight: float | None = None

    @classmethod
    def parse(cls, given: str | Path) -> Source:
        """ "data.jsonl", "folder:2", "owner/name", "owner/name:configuration:0.5".

        What stands behind the last colon is a weight if it is a number and the whole is not the name of a file.
        Raises ForetellError for a weight that is not above 0, or not a number behind the name of a file.
        """
        text = str(given)
        name, colon, number = text.rpartition(":")
        if not colon or not name or Path(text).exists():
            return cls(text)
        try:
            weight = float(number)
        except ValueError:
            if Path(name).exists():
                raise ForetellError(f"the weight in {text} must be a number, as in {name}:2") from None
            return cls(text)
        if not 0 < weight < math.inf:
            raise ForetellError(f"the weight in {text} must be above 0; leave out what is not to be trained on")
        return cls(name, weight)

    def __str__(self) -> str:
        path = Path(self.name)
        name = path.resolve().name if path.exists() else self.name
        return name if self.weight is None else f"{name}:{self.weight:g}"

    def files(self) -> list[Path] | None:
        """The files to read, in order; None for a Hub data set. Raises ForetellError if there are none."""
        path = Path(self.name)
        if path.is_dir():
            below = (
                file for file in path.rglob("*") if not any(part[0] == "." for part in file.relative_to(path).parts)
            )
            files = sorted(file for file in below if file.suffix in SUFFIXES and file.is_file())
            if not files:
                raise ForetellError(
                    f"{path} has no {', '.join(SUFFIXES)} file below it; give a directory that holds text"
                )
            return files
        if path.exists():
            if path.suffix not in SUFFIXES:
                raise ForetellError(
                    f"{path} is not a {', '.join(SUFFIXES)} file; convert it to .jsonl, one record per line: {ACCEPTED}"
                )
            return [path]
        if path.suffix in SUFFIXES or self.name.startswith((".", "/", "~")) or self.name.count("/") > 1:
            raise ForetellError(f"{self.name} does not exist; give a file, a directory or the name of a Hub data set")
        return None

    def stamp(self) -> list[Any]:
        """What changes when the data do: path, size and time of every file, or the fingerprint of a Hub data set."""
        files = self.files()
        if files is None:
            return [self.name, str(hub_rows(self.name)._fingerprint)]
        stats = [(str(file.resolve()), file.stat()) for file in files]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    def records(self) -> Iterator[Located]:
        """Every record, or why it can't be used, with its place; nothing is held but the record at hand.

        - .jsonl: one record per line, in any form of `records.ACCEPTED`; .parquet: one per row
        - .json: a list of records, read whole
        - .txt, .md, .py: one document, or several with a line "<|endoftext|>" behind each
        - a directory: all such files below it, sorted, without hidden ones
        - a Hub data set: the rows of its split "train"

        Raises ForetellError if the source is not there or can't be read.
        """
        files = self.files()
        if files is None:
            for number, row in enumerate(hub_rows(self.name), 1):
                yield Place(self.name, number, "row"), _parsed(row)
            return
        for file in files:
            yield from read_file(file)


def parse_sources(data: str | Path | Sequence[str | Path]) -> list[Source]:
    """One source or several. Raises ForetellError if there is none."""
    given = [data] if isinstance(data, (str, Path)) else list(data)
    if not given:
        raise ForetellError("there is no data; give a file, a directory or the name of a Hub data set")
    return [Source.parse(item) for item in given]


def read_file(path: Path) -> Iterator[Located]:
    """The records of one file. Raises ForetellError if it can't be opened."""
    try:
        empty = path.stat().st_size == 0
        with path.open("rb") as file:
            if empty:
                yield Place(str(path), 1), BadRecord("the file is empty")
            elif path.suffix == ".parquet":
                yield from _parquet(path, file)
            elif path.suffix == ".jsonl":
                yield from _lines(path, file)
            elif path.suffix == ".json":
                yield from _list(path, file)
            else:
                yield from _documents(path, file)
    except OSError as error:
        raise ForetellError(f"{path} can't be read ({error.strerror or error}); check its permissions") from error


def _parsed(raw: Any) -> Record | BadRecord:
    try:
        return parse_record(raw)
    except BadRecord as bad:
        return bad


def _lines(path: Path, file: BinaryIO) -> Iterator[Located]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        place = Place(str(path), number)
        try:
            raw = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            yield place, BadRecord("not UTF-8 text; convert the file (iconv -t utf-8)")
        except json.JSONDecodeError as error:
            yield place, BadRecord(f"not JSON ({error.msg}); write one record per line")
        except RecursionError:
            yield place, BadRecord("not a record: too deeply nested")
        else:
            yield place, _parsed(raw)


def _list(path: Path, file: BinaryIO) -> Iterator[Located]:
    try:
        values = json.loads(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        yield (
            Place(str(path), error.object[: error.start].count(b"\n") + 1),
            BadRecord("not UTF-8 text; convert the file"),
        )
        return
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one record per line under another name
            file.seek(0)
            yield from _lines(path, file)
        else:
            yield Place(str(path), error.lineno), BadRecord(f"not JSON ({error.msg})")
        return
    except RecursionError:
        yield Place(str(path), 1), BadRecord("not a list of records: too deeply nested")
        return
    for number, raw in enumerate(values if isinstance(values, list) else [values], 1):
        yield Place(str(path), number, "record"), _parsed(raw)


def _parquet(path: Path, file: BinaryIO) -> Iterator[Located]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield Place(str(path), number, "row"), _parsed(row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        yield (
            Place(str(path), number + 1, "row"),
            BadRecord(f"the file is damaged from here on ({reason}); fetch it again"),
        )


def _documents(path: Path, file: BinaryIO) -> Iterator[Located]:
    """A document with a byte that is not UTF-8 is bad as a whole, named by the line at fault."""
    lines: list[bytes] = []
    first, size = 1, 0
    for number, line in enumerate(file, 1):
        ends = line.strip() == DOCUMENT_END
        if not ends:
            lines.append(line)
            size += len(line)
        if ends or size >= DOCUMENT_MOST:
            yield from _document(path, first, lines)
            lines, first, size = [], number + 1, 0
    yield from _document(path, first, lines)


def _document(path: Path, first: int, lines: list[bytes]) -> Iterator[Located]:
    content = b"".join(lines)
    if not content.strip():
        return
    try:
        yield Place(str(path), first), content.decode("utf-8").strip("\n")
    except UnicodeDecodeError as error:
        line = first + content[: error.start].count(b"\n")
        yield Place(str(path), line), BadRecord("not UTF-8 text; convert the file (iconv -t utf-8)")


def hub_rows(name: str) -> Any:
    """Rows of "owner/name" or "owner/name:configuration", memory-mapped by the library. Never runs their code."""
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(repository, configuration or None, split="train")
    except Exception as error:  # the library raises many types for "not there" and "no network"
        raise ForetellError(
            f"{name} is neither a file nor a Hub data set that can be loaded ({reason_of(error)}); check the "
            "network and the name, which is owner/name or owner/name:configuration"
        ) from error
