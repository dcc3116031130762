"""Training text as token ids with an answer mask (method.md section 1)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretell.errors import ForetellError
from foretell.training.sources import read_records

PIECE = 200_000  # characters of a document tokenised at once: tokenisers slow down on longer strings
MINIMUM = 3  # an anchor, the token decided there, and one label


@dataclass(frozen=True)
class Example:
    """ids (n,) int32 and trained (n,) bool: which tokens are learnt, the others are only read."""

    ids: Tensor
    trained: Tensor


@dataclass
class Report:
    """What reading came to."""

    records: int = 0
    examples: int = 0
    tokens: int = 0
    cut: int = 0  # records longer than the sequence length
    skipped: int = 0  # records with nothing to train on

    def __str__(self) -> str:
        text = f"{self.records} records, {self.examples} sequences, {self.tokens} tokens"
        if self.cut:
            text += f"; {self.cut} records were longer than a sequence and cut"
        if self.skipped:
            text += f"; {self.skipped} had nothing to train on"
        return text


@dataclass
class Corpus:
    """Tokenised examples with a fingerprint of all their ids."""

    examples: list[Example]
    report: Report
    fingerprint: str = field(default="")

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(example.ids.numpy().tobytes())
            digest.update(example.trained.numpy().tobytes())
        self.fingerprint = digest.hexdigest()


def load_corpus(source: str | Path, tokenizer: Any, seq_len: int) -> Corpus:
    """Everything in `source`, tokenised into examples of at most `seq_len` tokens.

    Texts longer than that become several examples; conversations are cut off. Raises ForetellError if the source is
    missing, malformed or empty, and if the tokenizer can't render conversations.
    """
    if tokenizer is None:
        raise ForetellError(
            "the base has no tokenizer beside it, so text can't be trained on; put its tokenizer files there"
        )
    report, examples = Report(), []
    for record in read_records(source):
        report.records += 1
        made = text_examples(record, tokenizer, seq_len) if isinstance(record, str) else []
        whole = len(made) == 1
        if not isinstance(record, str):
            example = conversation_example(record, tokenizer)
            whole = len(example.ids) <= seq_len
            made = [Example(example.ids[:seq_len], example.trained[:seq_len])]
        made = [example for example in made if candidates(example.trained).any()]
        report.cut += bool(made) and not whole
        report.skipped += not made
        examples += made
    report.examples, report.tokens = len(examples), sum(len(example.ids) for example in examples)
    if not examples:
        what = "no record with anything to train on" if report.records else "no text"
        raise ForetellError(
            f"{source} holds {what}; give texts of at least {MINIMUM} tokens, or conversations with answers"
        )
    return Corpus(examples, report)


def candidates(trained: Tensor) -> Tensor:
    """trained (..., n) bool -> (..., n) bool: positions after which a block has at least one label.

    The token decided there and the next one must be trained: the last prompt token counts, the others do not.
    """
    found = torch.zeros_like(trained)
    found[..., :-2] = trained[..., 1:-1] & trained[..., 2:]
    return found


def text_examples(text: str, tokenizer: Any, seq_len: int) -> list[Example]:
    """A document with an end token behind it, in pieces of at most `seq_len` tokens."""
    ids: list[int] = []
    for piece in _pieces(text):
        # What the tokenizer puts in front by itself (a begin token) belongs in front of the first piece only.
        ids += tokenizer(piece, add_special_tokens=not ids, verbose=False)["input_ids"]
    if not ids:
        return []
    end = tokenizer.eos_token_id
    if end is not None and ids[-1] != end:
        ids.append(end)
    parts = torch.tensor(ids, dtype=torch.int32).split(seq_len)
    return [Example(part.clone(), torch.ones(len(part), dtype=torch.bool)) for part in parts if len(part) >= MINIMUM]


def conversation_example(messages: list[dict[str, str]], tokenizer: Any) -> Example:
    """A conversation in the base's chat template; only the assistant's answers are trained.

    Answers are found by the template's {% generation %} marks or, without them, by rendering the conversation up to and
    after each answer. Raises ForetellError if there is no chat template or it refuses the conversation.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ForetellError('the base has no chat template, so give records with a "text" field, already rendered')
    try:
        if isinstance(template, str) and "{% generation %}" in template.replace("{%-", "{%").replace("-%}", "%}"):
            out = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return _example(out["input_ids"], out["assistant_masks"])
        ids = _render(tokenizer, messages, False)
        trained = [False] * len(ids)
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                start = _common(ids, _render(tokenizer, messages[:turn], True))
                end = _common(ids, _render(tokenizer, messages[: turn + 1], False))
                trained[start:end] = [True] * (end - start)
    except ForetellError:
        raise
    except Exception as error:  # templates raise whatever their authors chose
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ForetellError(
            f"the base's chat template refuses a conversation ({reason}); mend the record or its roles"
        ) from error
    return _example(ids, trained)


def _example(ids: list[int], trained: list[Any]) -> Example:
    return Example(torch.tensor(ids, dtype=torch.int32), torch.tensor(trained, dtype=torch.bool))


def _render(tokenizer: Any, messages: list[dict[str, str]], prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _common(left: list[int], right: list[int]) -> int:
    """Length of the common prefix: tokens may merge differently at the seam of two turns."""
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = len(text) if len(text) - start <= PIECE else max(text.rfind("\n", start, start + PIECE), start) + 1
        if end == start + 1:  # no line break within reach
            end = min(start + PIECE, len(text))
        yield text[start:end]
        start = end
