"""The forms a training record may have, detected for each record: chat, question and answer, plain text, token ids."""

from __future__ import annotations

from typing import Any, NamedTuple

Message = dict[str, Any]  # "role" and "content", as chat templates take it


class BadRecord(ValueError):
    """A record that can't be used; the message is the reason, without its place."""


class Conversation(NamedTuple):
    """Messages for the base's chat template. `joinable`: a base without one may read them joined by line ends."""

    messages: list[Message]
    joinable: bool = False


class Continuation(NamedTuple):
    """A prompt that is only read and the text right behind it, which is learnt; no template is laid over them."""

    prompt: str
    completion: str


class Tokens(NamedTuple):
    """Token ids, and which of them are learnt."""

    ids: list[int]
    trained: list[bool]


Record = str | Conversation | Continuation | Tokens

ACCEPTED = (
    '{"messages": [{"role": ..., "content": ...}, ...]}, {"conversations": [{"from": ..., "value": ...}, ...]}, '
    '{"instruction": ..., "output": ...}, {"prompt": ..., "completion": ...}, {"text": ...} or {"input_ids": [...]}'
)
# ShareGPT's names and the ones that chat templates know.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "observation": "tool"}
QUESTIONS = ("instruction", "question", "prompt", "query")
ANSWERS = ("output", "response", "answer", "completion")
MASKS = ("loss_mask", "assistant_masks", "completion_mask")
IGNORED = -100  # the label of a token that is not learnt, as transformers has it


def parse_record(raw: Any) -> Record:
    """The record in one line, row or list item.

    Raises BadRecord saying what was found where it is none of the accepted forms or holds no answer.
    """
    if not isinstance(raw, dict):
        raise BadRecord(f"found {type(raw).__name__}; a record must be {ACCEPTED}")
    given = {name: value for name, value in raw.items() if value is not None}  # tables fill up with nothing
    for name in ("messages", "conversations", "conversation"):
        if isinstance(given.get(name), list) and given[name]:
            return _conversation(given[name])
    if "input_ids" in given:
        return _tokens(given)
    question = next((name for name in QUESTIONS if name in given), None)
    answer = next((name for name in ANSWERS if name in given), None)
    if question and answer:
        return _pair(given, question, answer)
    if isinstance(given.get("text"), str):
        if not given["text"].strip():
            raise BadRecord("its text is empty")
        return str(given["text"])
    if question:
        raise BadRecord(f'has "{question}" but no answer; add it as one of {", ".join(ANSWERS)}')
    raise BadRecord(f"found {', '.join(map(str, raw)) or 'nothing'}; a record must be {ACCEPTED}")


def _conversation(turns: list[Any]) -> Conversation:
    messages = []
    for turn in turns:
        named = isinstance(turn, dict)
        role = (turn.get("role") or turn.get("from")) if named else None
        content = turn.get("content", turn.get("value")) if named else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRecord('a message needs "role" and "content" (or "from" and "value"), both texts')
        rest = {name: value for name, value in turn.items() if name not in ("role", "from", "content", "value")}
        messages.append({**rest, "role": ROLES.get(role, role), "content": content})
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise BadRecord("has no answer: no message of the assistant with content")
    return Conversation(messages)


def _pair(given: dict[str, Any], question: str, answer: str) -> Record:
    asked, answered = given[question], given[answer]
    if isinstance(asked, list) and isinstance(answered, list):
        return _conversation([*asked, *answered])
    if not isinstance(asked, str) or not isinstance(answered, str):
        raise BadRecord(f'"{question}" and "{answer}" must be texts, or both lists of messages')
    if not answered.strip():
        raise BadRecord(f'has no answer: "{answer}" is empty')
    if (question, answer) == ("prompt", "completion"):
        return Continuation(asked, answered)
    more = given.get("input")
    if question == "instruction" and isinstance(more, str) and more.strip():
        asked = f"{asked}\n\n{more}"
    system = given.get("system") or given.get("system_prompt")
    before = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    messages = [*before, {"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return Conversation(messages, joinable=True)


def _tokens(given: dict[str, Any]) -> Tokens:
    ids = given["input_ids"]
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        raise BadRecord('"input_ids" must be a list of token ids')
    name = next((name for name in ("labels", *MASKS) if name in given), None)
    if name is None:
        return Tokens(ids, [True] * len(ids))
    values = given[name]
    if not isinstance(values, list) or len(values) != len(ids) or not all(type(v) in (int, bool) for v in values):
        raise BadRecord(f'"{name}" must hold one number for each of the {len(ids)} input_ids')
    if name == "labels" and any(label not in (IGNORED, token) for label, token in zip(values, ids, strict=True)):
        raise BadRecord(f'"labels" must repeat the input_ids, unshifted, with {IGNORED} where nothing is learnt')
    return Tokens(ids, [value != IGNORED if name == "labels" else bool(value) for value in values])
