"""Tokens to a streamer of transformers' kind (`TextStreamer`, `TextIteratorStreamer`) as they are decided."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from foretell.decoding.loop import Step
from foretell.errors import ForetellError


class Streamer(Protocol):
    """What a streamer can do: take the prompt's ids (1, n), then each new one (1,), all int64 on the CPU, and end."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


class EndedOnce:
    """A streamer for several hands, each of which ends it: the first time counts."""

    def __init__(self, streamer: Streamer) -> None:
        self._streamer = streamer
        self._ended = False

    def put(self, value: Tensor) -> None:
        self._streamer.put(value)

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            self._streamer.end()


@contextmanager
def ended(streamer: Streamer | None) -> Iterator[None]:
    """Ends the stream on the way out, after an error too: whoever reads it in another thread must not wait for ever."""
    try:
        yield
    finally:
        if streamer is not None:
            streamer.end()


def streamed(streamer: Streamer | None, prompts: Tensor, steps: Iterable[list[Step]]) -> Iterator[list[Step]]:
    """The same steps, each token put into the streamer behind prompts (1, n) int64.

    Raises ForetellError if there is a streamer and more than one prompt.
    """
    if streamer is None:
        yield from steps
        return
    if len(prompts) > 1:
        raise ForetellError(f"a streamer takes one prompt, not a batch of {len(prompts)}; leave one of them out")
    streamer.put(prompts.cpu())
    for done in steps:
        for step in done:
            for token in step.tokens:
                streamer.put(torch.tensor([token]))
        yield done
