"""Training text as token ids with an answer mask, from one source or a mixture (method.md section 1)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foretell.errors import ForetellError
from foretell.training.examples import Example, Examples, candidates
from foretell.training.records import ACCEPTED, BadRecord
from foretell.training.sources import Place, Source, parse_sources
from foretell.training.store import SKIPPED_FILE, Store, Writer, cache_directory
from foretell.training.tokenise import make_examples

__all__ = ["Corpus", "Example", "Report", "candidates", "load_corpus"]

FORMAT = 2  # of what is kept: a change to records or tokenisation that changes tokens must raise it
SHOWN = 3  # bad records named in the report; all are in skipped.jsonl
PROGRESS_SECONDS = 0.5

OnProgress = Callable[["Report"], None]


@dataclass
class Report:
    """What reading came to."""

    records: int = 0  # the bad ones too
    examples: int = 0
    tokens: int = 0  # in the examples
    trained: int = 0  # tokens that are learnt
    split: int = 0  # texts longer than a sequence, continued in the next: nothing is lost
    truncated: int = 0  # records with answers, longer than a sequence
    lost: int = 0  # tokens cut off them
    bad: int = 0  # records that can't be used
    first_bad: list[str] = field(default_factory=list)  # place and reason

    def __add__(self, other: Report) -> Report:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)}
        return Report(**{**sums, "first_bad": sums["first_bad"][:SHOWN]})

    def skip(self, place: Place, reason: str) -> None:
        self.bad += 1
        if len(self.first_bad) < SHOWN:
            self.first_bad.append(f"{place}: {reason}")

    def __str__(self) -> str:
        """One line, then one for each of the first bad records."""
        text = f"{self.records} records, {self.examples} sequences, {self.tokens} tokens ({self.trained} trained)"
        if self.split:
            text += f"; {self.split} long texts split"
        if self.truncated:
            text += f"; {self.truncated} records truncated, {self.lost} tokens lost"
        if self.bad:
            text += f"; {self.bad} bad records skipped"
        more = self.bad - len(self.first_bad)
        lines = [text, *(f"  {line}" for line in self.first_bad)]
        return "\n".join([*lines, f"  and {more} more"] if self.first_bad and more else lines)


@dataclass
class Corpus:
    """Tokenised examples of all sources, what reading came to, and a fingerprint of ids, masks and weights."""

    sources: list[Source]
    stores: list[Store]

    def __post_init__(self) -> None:
        self.examples = Examples([store.part(s.weight) for s, store in zip(self.sources, self.stores, strict=True)])
        self.reports = [Report(**store.about["report"]) for store in self.stores]
        self.report = sum(self.reports[1:], self.reports[0])
        known = [[store.about["fingerprint"], s.weight] for s, store in zip(self.sources, self.stores, strict=True)]
        self.fingerprint = hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def __str__(self) -> str:
        """ "a.jsonl:2 b:1"."""
        return " ".join(map(str, self.sources))

    def describe(self) -> list[dict[str, Any]]:
        """For provenance: every source with its weight, its share of what is drawn, and its report."""
        draws = self.examples.draws()
        return [
            {"source": str(source), "weight": source.weight, "share": round(count / sum(draws), 4), **vars(report)}
            for source, count, report in zip(self.sources, draws, self.reports, strict=True)
        ]

    def write_skipped(self, path: Path) -> None:
        """All bad records, one JSON object with file, line and reason each; nothing is written if there are none."""
        if self.report.bad:
            with path.open("wb") as out:
                for store in self.stores:
                    with (store.directory / SKIPPED_FILE).open("rb") as file:
                        shutil.copyfileobj(file, out)


def load_corpus(
    data: str | Path | Sequence[str | Path],
    tokenizer: Any,
    seq_len: int,
    on_progress: OnProgress | None = None,
    packing: bool = False,
) -> Corpus:
    """Everything in `data`, a source or several as "source[:weight]", in examples of at most `seq_len` tokens.

    Texts longer than that become several examples of even lengths, or for `packing` full ones and a remainder;
    conversations are cut off. The tokens are kept in `cache_directory()` and mapped into memory from there, so that any
    amount of data does, and the next training on the same data begins at once. Bad records are left out, counted and
    named in the report. `on_progress` gets the report so far about twice a second.

    Raises ForetellError if a source is missing or holds nothing to train on, and if the tokenizer can't render
    conversations.
    """
    if tokenizer is None:
        raise ForetellError(
            "the base has no tokenizer beside it, so text can't be trained on; put its tokenizer files there"
        )
    sources = parse_sources(data)
    key = _tokenizer_key(tokenizer)
    return Corpus(sources, [_load(source, tokenizer, key, seq_len, on_progress, packing) for source in sources])


def _load(
    source: Source, tokenizer: Any, key: str, seq_len: int, on_progress: OnProgress | None, packing: bool
) -> Store:
    known = json.dumps([FORMAT, seq_len, packing, key, source.stamp()])
    directory = cache_directory() / hashlib.sha256(known.encode()).hexdigest()[:32]
    if (store := Store.find(directory)) is not None:
        return store
    report, digest, told = Report(), hashlib.sha256(), time.monotonic()
    with Writer(directory) as writer:
        for place, record in source.records():
            report.records += 1
            try:
                if isinstance(record, BadRecord):
                    raise record
                made = make_examples(record, tokenizer, seq_len, packing)
            except BadRecord as bad:
                report.skip(place, str(bad))
                writer.skip({"file": place.file, place.unit: place.number, "reason": str(bad)})
                continue
            for example in made.examples:
                writer.add(example)
                report.tokens += len(example.ids)
                report.trained += int(example.trained.sum())
                digest.update(len(example.ids).to_bytes(8, "little"))
                for tensor in (example.ids, example.trained):
                    digest.update(tensor.numpy().tobytes())
            report.examples += len(made.examples)
            report.split += len(made.examples) > 1
            report.truncated += made.lost > 0
            report.lost += made.lost
            if on_progress is not None and time.monotonic() - told > PROGRESS_SECONDS:
                on_progress(report)
                told = time.monotonic()
        if not report.examples:
            raise ForetellError(_nothing(source, report))
        return writer.finish({"report": vars(report), "fingerprint": digest.hexdigest(), "source": str(source)})


def _nothing(source: Source, report: Report) -> str:
    if not report.bad:
        return f"{source.name} holds no text; give records like {ACCEPTED}"
    all_bad = "its one record is bad" if report.bad == 1 else f"all {report.bad} records are bad, the first"
    return f"{source.name} holds nothing to train on: {all_bad}: {report.first_bad[0]}"


def _tokenizer_key(tokenizer: Any) -> str:
    """Changes with anything that changes ids: vocabulary, rules, special tokens, chat template."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    rest = [tokenizer.chat_template, {name: str(token) for name, token in tokenizer.special_tokens_map.items()}]
    digest = hashlib.sha256(rules.encode("utf-8", "backslashreplace"))
    digest.update(json.dumps([type(tokenizer).__name__, rest], default=str).encode())
    return digest.hexdigest()
