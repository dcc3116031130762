"""Where a text ends: with an end-of-text id, or with the token that completes a stop string."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import takewhile
from typing import Any

# Whether a text, prompt and new token ids, ends with its last token.
Condition = Callable[[list[int]], bool]


class Stop:
    """Ends a text at the first of `ids` and where one of the conditions holds; without any, nowhere."""

    def __init__(self, ids: Collection[int] = (), conditions: Sequence[Condition] = ()) -> None:
        self.ids = frozenset(ids)
        self.conditions = tuple(conditions)

    def cut(self, text: list[int], tokens: list[int]) -> tuple[list[int], bool]:
        """The tokens that follow `text` up to the one that ends it, which is kept; and whether there is one."""
        for index, token in enumerate(tokens):
            kept = tokens[: index + 1]
            if token in self.ids or (self.conditions and self._holds([*text, *kept])):
                return kept, True
        return tokens, False

    def _holds(self, text: list[int]) -> bool:
        return any(condition(text) for condition in self.conditions)


class StopStrings:
    """Holds when the last token completes one of the strings, across tokens or inside one: a `Condition`.

    The rule of transformers' `stop_strings`: the string must reach into the last token and may begin in the prompt;
    special tokens count as written. Ids are decoded here, since transformers' own criterion first walks the whole
    vocabulary in Python: seconds for a large one.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._strings = tuple(strings)
        # A token holds at least one byte; one more token in front, as decoders may trim the space of the very first.
        self._reach = max(len(string.encode()) for string in strings) + 1

    def __call__(self, text: list[int]) -> bool:
        tail = text[-self._reach :]
        before, after = self._decode(tail[:-1]), self._decode(tail)
        # Bytes of an unfinished character look different once it is whole, so the new text begins where the two part.
        begin = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
        return any(string in after[max(0, begin - len(string) + 1) :] for string in self._strings)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
