"""Prompt sets: those that ship with foretell, by name, and any file of the user's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretell.errors import ForetellError

PACKAGED = Path(__file__).parents[1] / "assets" / "prompts"
NAMES = ("problems", "code")
FIELDS = ("prompt", "question", "messages")

# Token ids are for prompts that went through a chat template: encoding its text again could double the first token.
Prompt = str | list[int]


def load_prompts(
    source: str | Path, *, tokenizer: Any = None, chat: bool = False, limit: int | None = None
) -> list[Prompt]:
    """The first `limit` prompts of a packaged set or of a file.

    A file is `.jsonl` with a field `prompt`, `question` or `messages` per line, or `.txt` with a prompt per non-empty
    line. `messages`, and with `chat` every prompt, go through the tokenizer's chat template and come back as token ids.
    Raises ForetellError naming file, line and accepted fields.
    """
    path = prompts_path(source)
    prompts: list[Prompt] = []
    for number, record in read_records(source, limit=limit):
        messages = record.get("messages")
        if messages is not None:
            prompts.append(_through_template(_up_to_answer(messages, path, number), tokenizer, path, number))
            continue
        text = record.get("prompt", record.get("question"))
        if not isinstance(text, str) or not text:
            raise ForetellError(f"{path}, line {number}: the prompt must be a non-empty text, not {text!r}")
        message = [{"role": "user", "content": text}]
        prompts.append(_through_template(message, tokenizer, path, number) if chat else text)
    return prompts


def read_records(
    source: str | Path, *, limit: int | None = None, fields: Sequence[str] = FIELDS
) -> list[tuple[int, dict[str, Any]]]:
    """The first `limit` records with their line numbers; lines of a `.txt` are records with a `prompt`.

    Raises ForetellError if the file is missing, empty, or has a line without one of the fields.
    """
    if limit is not None and limit < 1:
        raise ForetellError(f"limit must be at least 1, not {limit}")
    path = prompts_path(source)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ForetellError(f"{path} cannot be read: {reason}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()][:limit]
    if not numbered:
        raise ForetellError(f"{path} is empty: it needs a prompt per line")
    if path.suffix == ".txt":
        return [(number, {"prompt": line.rstrip("\r")}) for number, line in numbered]
    return [(number, _record(line, path, number, fields)) for number, line in numbered]


def prompts_path(source: str | Path) -> Path:
    """Where a packaged set or the user's file lies. Raises ForetellError if nowhere."""
    # A bare name is ours; a user's file called so is reached as ./problems.
    path = PACKAGED / f"{source}.jsonl" if str(source) in NAMES else Path(source)
    if not path.is_file():
        kind = "there is no file" if str(source) not in NAMES else "this installation lacks the prompt set"
        raise ForetellError(f"{kind} {source}: give a .jsonl or .txt file of prompts, or one of {', '.join(NAMES)}")
    if path.suffix not in (".jsonl", ".txt"):
        raise ForetellError(f"{path} is not a prompt file: its name must end in .jsonl or .txt")
    return path


def set_name(source: str | Path) -> str:
    """What a report calls the set: the packaged name, or the file's name without its ending."""
    return str(source) if str(source) in NAMES else Path(source).stem


def to_context(prompts: Sequence[Tensor], length: int, bos: int | None = None) -> list[Tensor]:
    """Every prompt (1, n) int64 as one of exactly `length` tokens, (1, length), for sweeps over the context.

    A longer prompt is cut from the left; a shorter one has the prompts before it in the set in front of it, from the
    end again where the set begins. A begin-of-text token `bos` stays in front.
    Raises ForetellError if there is nothing to fill up with.
    """
    bodies = [ids[:, 1:] if bos is not None and ids[0, 0] == bos else ids for ids in prompts]
    if not any(body.shape[1] for body in bodies):
        raise ForetellError("the prompts hold no text to fill a context with")
    fitted = []
    for number, (ids, own) in enumerate(zip(prompts, bodies, strict=True)):
        lead = ids[:, : ids.shape[1] - own.shape[1]]
        wanted = length - lead.shape[1]
        earlier, body = number, own
        while body.shape[1] < wanted:
            earlier -= 1
            body = torch.cat([bodies[earlier % len(bodies)], body], dim=1)
        fitted.append(torch.cat([lead, body[:, body.shape[1] - wanted :]], dim=1))
    return fitted


def _record(line: str, path: Path, number: int, fields: Sequence[str]) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ForetellError(f"{path}, line {number}: not valid JSON ({error.msg})") from None
    if not isinstance(record, dict) or not any(field in record for field in fields):
        found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise ForetellError(
            f"{path}, line {number}: needs a field {', '.join(fields[:-1])} or {fields[-1]}; it has {found or 'none'}"
        )
    return record


def _up_to_answer(messages: Any, path: Path, number: int) -> list[dict[str, Any]]:
    """A conversation without the answers at its end: training records hold them, a prompt must not."""
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages
    ):
        raise ForetellError(f"{path}, line {number}: messages must be a list of objects with role and content")
    messages = list(messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise ForetellError(f"{path}, line {number}: messages has no user message")
    return messages


def _through_template(messages: list[dict[str, Any]], tokenizer: Any, path: Path, number: int) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise ForetellError(
            f"{path}, line {number}: messages need a base with a chat template, which this one lacks; give prompts"
        )
    try:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except Exception as error:  # the template is a program of the model's author and raises what it likes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ForetellError(
            f"{path}, line {number}: the base's chat template refuses these messages ({reason})"
        ) from error
    return [int(token) for token in encoded["input_ids"]]
