"""What the tokens before a draft add to it, remembered token by token (method.md section 3).

The first layer of a sampler head is linear in the embeddings of the tokens before, so what it makes of them is a sum of
a term for each token in its place. A text is made of a few hundred tokens that come again and again, and drafts are
made in several sweeps: to look terms up takes a fraction of the time of products, and reads no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from threading import Lock
from typing import Any

import torch
from torch import Tensor

KEPT = 1024  # tokens


class TokenTerms:
    """The terms of the tokens met so far; of up to `KEPT` of them, then it begins anew."""

    def __init__(self, terms: Callable[[Tensor], Tensor]) -> None:
        """`terms` takes embeddings (..., T, E) to the sum of their T terms, (..., Q); that of 0 is 0."""
        self._terms = terms
        self._places: dict[int, int] = {}  # of a token's terms
        self._kept = torch.empty(0)  # (KEPT * T, Q)
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has yet to meet them."""
        return TokenTerms, (self._terms,)

    def of(self, tokens: Sequence[Sequence[int]], embed: Callable[[Tensor], Tensor]) -> Tensor:
        """The sums (n, Q) of the terms of tokens (n, T); `embed` takes tokens (m,) to embeddings (m, E)."""
        numbers, kept = self.placed(tokens, embed)
        terms = kept.index_select(0, torch.tensor(numbers)).view(-1, len(tokens), kept.shape[1])
        return terms[0] if len(terms) == 1 else terms.sum(0)

    @torch.inference_mode()
    def placed(self, tokens: Sequence[Sequence[int]], embed: Callable[[Tensor], Tensor]) -> tuple[list[int], Tensor]:
        """The same as rows (T * n,) of a table (., Q) to be summed, place after place."""
        count = len(tokens[0])
        with self._lock:
            if missing := set(chain.from_iterable(tokens)).difference(self._places):
                if len(self._places) + len(missing) > KEPT:
                    missing = set(chain.from_iterable(tokens))
                    if len(missing) > KEPT:
                        sums = self._terms(embed(torch.tensor(tokens)))
                        nothing = [len(tokens)] * (len(tokens) * (count - 1))
                        return [*range(len(tokens)), *nothing], torch.cat([sums, torch.zeros_like(sums[:1])])
                    self._places, self._kept = {}, self._kept[:0]  # others may still read the old ones
                self._learn(list(missing), count, embed)
            places = self._places
            return [count * places[own[number]] + number for number in range(count) for own in tokens], self._kept

    def _learn(self, tokens: list[int], count: int, embed: Callable[[Tensor], Tensor]) -> None:
        """In each of `count` places a token stands alone, among embeddings of 0."""
        embedded = embed(torch.tensor(tokens))
        alone = embedded.new_zeros(len(tokens), count, count, embedded.shape[-1])
        alone.diagonal(dim1=1, dim2=2).copy_(embedded[..., None])
        terms = self._terms(alone)
        if not len(self._kept):
            self._kept = terms.new_empty(KEPT * count, terms.shape[-1])  # memory is taken as it is written
        start = len(self._places)
        self._kept[start * count : (start + len(tokens)) * count] = terms.flatten(0, 1)
        self._places.update(zip(tokens, range(start, start + len(tokens)), strict=True))
