"""Records as token ids with an answer mask (method.md section 1)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretell.errors import ForetellError
from foretell.training.examples import MINIMUM, Example, candidates
from foretell.training.records import BadRecord, Continuation, Conversation, Message, Record, Tokens

PIECE = 200_000  # characters of a document tokenised at once: tokenisers slow down on longer strings
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]  # characters from and up to


class Made(NamedTuple):
    """What became of one record; `lost` are the tokens that did not fit into the sequence."""

    examples: list[Example]
    lost: int = 0


def make_examples(record: Record, tokenizer: Any, seq_len: int, full: bool = False) -> Made:
    """Examples of at most `seq_len` tokens with something to train on.

    What is learnt from end to end is split into several, see `pieces`; what has answers is truncated, and `lost` says
    by how much.
    Raises BadRecord if nothing is left to train on or the chat template refuses the record, and ForetellError if the
    tokenizer has no chat template for a conversation.
    """
    if isinstance(record, str):
        made = Made(text_examples(record, tokenizer, seq_len, full))
    elif isinstance(record, Tokens):
        made = _ready(record, len(tokenizer), seq_len, full)
    else:
        if isinstance(record, Conversation) and record.joinable and not _template(tokenizer):
            *before, answer = (message["content"] for message in record.messages)
            record = Continuation("\n".join(before) + "\n", answer)
        if isinstance(record, Conversation):
            made = conversation_example(record.messages, tokenizer, seq_len)
        else:
            whole = record.prompt + record.completion
            made = _spanned(whole, [(len(record.prompt), len(whole))], tokenizer, seq_len, alone=True)
    kept = [example for example in made.examples if candidates(example.trained).any()]
    if not kept:
        if made.lost:
            raise BadRecord(f"no answer within the first {seq_len} tokens; give more --seq-len")
        raise BadRecord(f"nothing to train on: a text needs {MINIMUM} tokens and an answer 2")
    return Made(kept, made.lost)


def text_examples(text: str, tokenizer: Any, seq_len: int, full: bool = False) -> list[Example]:
    """A document with an end token behind it, in `pieces`."""
    ids = _ended(_tokenised(text, tokenizer, special=True, ends_of=0)[0], tokenizer)
    parts = pieces(torch.from_numpy(ids), seq_len, full)
    return [Example(part.clone(), torch.ones(len(part), dtype=torch.bool)) for part in parts]


def pieces(values: Tensor, seq_len: int, full: bool = False) -> tuple[Tensor, ...]:
    """(n,) in as few pieces of at most `seq_len` as hold it, all of one length or one longer.

    A remainder of a few tokens would be a sequence in which most masks have no label. `full`: all pieces but the last
    have `seq_len`, for packing, which fills sequences with remainders; even there none is too short to train on.
    """
    count = max(1, -(-len(values) // seq_len))
    if full and len(values) - (count - 1) * seq_len >= MINIMUM:
        return values.split(seq_len)
    return values.tensor_split(count)


def conversation_example(messages: list[Message], tokenizer: Any, seq_len: int) -> Made:
    """A conversation in the base's chat template; only the assistant's answers are trained.

    Answers are found by the template's {% generation %} marks or, without them, by rendering the conversation up to and
    after each answer. Raises ForetellError if there is no chat template, BadRecord if it refuses the conversation.
    """
    template = _template(tokenizer)
    if not template:
        raise ForetellError(
            'the base has no chat template, so conversations can\'t be trained on; give records with a "text" field, '
            'already rendered, or with "prompt" and "completion"'
        )
    spans: Iterable[Span]
    if MARKS.search(template):
        text, spans = _marked(tokenizer, template, messages)
    else:
        text = _render(tokenizer, messages, False)
        spans = _found(tokenizer, messages, text)
    return _spanned(text, spans, tokenizer, seq_len)


def _ready(record: Tokens, vocabulary: int, seq_len: int, full: bool) -> Made:
    if record.ids and max(record.ids) >= vocabulary:
        raise BadRecord(f"token id {max(record.ids)} is not one of the base's {vocabulary}; was it another tokenizer?")
    ids, trained = torch.tensor(record.ids, dtype=torch.int32), torch.tensor(record.trained, dtype=torch.bool)
    if trained.all():
        parts = zip(pieces(ids, seq_len, full), pieces(trained, seq_len, full), strict=True)
        return Made([Example(*both) for both in parts])
    return Made([Example(ids[:seq_len], trained[:seq_len])], max(0, len(ids) - seq_len))


def _spanned(text: str, spans: Iterable[Span], tokenizer: Any, seq_len: int, alone: bool = False) -> Made:
    """The first tokens, of which those that end inside a span are trained: one across its beginning is, for the base
    writes it, and one across its end is not, for it belongs to the next turn as well.

    `alone`: no template has put a begin token in front or an end token behind.
    """
    if not tokenizer.is_fast:
        spans = list(spans)
    borders = () if tokenizer.is_fast else sorted({place for span in spans for place in span})
    ids, ends = _tokenised(text, tokenizer, alone, seq_len, borders)
    if alone and len(ended := _ended(ids, tokenizer)) > len(ids):
        ids, ends = ended, np.append(ends, len(text))
    ends = ends[:seq_len]
    trained = np.zeros(len(ends), dtype=bool)
    for start, end in spans:
        if not len(ends) or start >= ends[-1]:  # beyond what is kept; more of them need not even be looked for
            break
        trained |= (ends > start) & (ends <= end)
    example = Example(torch.from_numpy(ids[:seq_len].copy()), torch.from_numpy(trained))
    return Made([example], max(0, len(ids) - seq_len))


def _tokenised(
    text: str, tokenizer: Any, special: bool, ends_of: int, borders: Sequence[int] = ()
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Ids of the whole text, and at least of the first `ends_of` tokens the character at which each ends.

    A tokenizer that can't say where its tokens end gets what lies between the borders apart.
    """
    ids, ends = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
    count = 0
    for start, piece in _pieces(text, borders):
        offsets = tokenizer.is_fast and count < ends_of
        # What the tokenizer puts in front by itself (a begin token) belongs in front of the first piece only.
        out = tokenizer(piece, add_special_tokens=special and not count, return_offsets_mapping=offsets, verbose=False)
        ids.append(np.array(out["input_ids"], dtype=np.int32))
        if offsets:
            ends.append(np.array([end for _, end in out["offset_mapping"]], dtype=np.int64) + start)
        elif count < ends_of:
            ends.append(np.full(len(ids[-1]), start + len(piece), dtype=np.int64))
        count += len(ids[-1])
    return np.concatenate(ids), np.concatenate(ends)


def _ended(ids: NDArray[np.int32], tokenizer: Any) -> NDArray[np.int32]:
    end = tokenizer.eos_token_id
    if end is None or not len(ids) or ids[-1] == end:
        return ids
    return np.append(ids, np.int32(end))


def _template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    return str(tokenizer.get_chat_template()) if template else ""


def _render(tokenizer: Any, messages: list[Message], prompt: bool) -> str:
    with _refusals():
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))


def _marked(tokenizer: Any, template: str, messages: list[Message]) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    with _refusals():
        (text,), (spans,) = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
        )
    return text, spans


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # templates raise whatever their authors chose
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadRecord(f"the base's chat template refuses the conversation ({reason})") from error


def _found(tokenizer: Any, messages: list[Message], text: str) -> Iterator[Span]:
    """Where the answers stand in the rendered text; made one by one, since each costs two renderings."""
    done = 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = max(done, _common(text, _render(tokenizer, messages[:turn], True)))
        end = _common(text, _render(tokenizer, messages[: turn + 1], False))
        answer = message["content"].strip()
        if end < start + len(answer):
            # Some templates write the last answer differently from earlier ones (with its thoughts): look for it.
            at = text.find(answer, start)
            start, end = (at, at + len(answer)) if at >= 0 else (start, max(start, end))
        yield start, end
        done = end


def _common(left: str, right: str) -> int:
    """Length of the common prefix."""
    if left.startswith(right):
        return len(right)
    low, high = 0, min(len(left), len(right))
    while low < high:  # the prefixes of `middle` characters are equal below the sought length and differ above it
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle - 1)
    return low


def _pieces(text: str, borders: Sequence[int]) -> Iterator[tuple[int, str]]:
    """The text in pieces that tokenisers take well, ending at line breaks where there are any and at all borders."""
    start = 0
    for border in (*borders, len(text)):
        while start < border:
            end = border if border - start <= PIECE else max(text.rfind("\n", start, start + PIECE), start) + 1
            if end == start + 1:  # no line break within reach
                end = min(start + PIECE, border)
            yield start, text[start:end]
            start = end
