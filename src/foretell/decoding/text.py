"""Token ids to text, piece by piece, as they are decided."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any


class TextStream:
    """Gives the text that each new token adds; the pieces together are the text of all tokens.

    `context` holds the last ids of the prompt, so that a first token that begins a word keeps its space.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)[-8:]
        self._start = 0  # decoded from here: enough before the new token for it to look as in the whole text
        self._done = len(self._ids)  # ids whose text was given

    def push(self, token: int) -> str:
        """Text that is certain now; "" while a character's bytes are still incomplete."""
        self._ids.append(token)
        text = self._text(self._start, None)
        if text.endswith("\ufffd"):
            return ""
        return self._take(text)

    def flush(self) -> str:
        """Whatever push still held back."""
        return self._take(self._text(self._start, None))

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of tokens as they come, without empty pieces."""
        for token in tokens:
            if piece := self.push(token):
                yield piece
        if piece := self.flush():
            yield piece

    def _take(self, text: str) -> str:
        piece = text[len(self._text(self._start, self._done)) :]
        self._start, self._done = self._done, len(self._ids)
        return piece

    def _text(self, start: int, end: int | None) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)
