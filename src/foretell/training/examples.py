"""Tokenised examples, in memory or mapped from a file, of one source or a mixture of several."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MINIMUM = 3  # an anchor, the token decided there, and one label


@dataclass(frozen=True)
class Example:
    """One sequence: ids (n,) int32 and trained (n,) bool, which tokens are learnt; the others are only read.

    starts (n,) int64 where several documents share the sequence: the place at which each token's document begins.
    """

    ids: Tensor
    trained: Tensor
    starts: Tensor | None = None


def candidates(trained: Tensor) -> Tensor:
    """trained (..., n) bool -> (..., n) bool: positions after which a block has at least one label.

    The token decided there and the next one must be trained: the last prompt token counts, the others do not.
    """
    found = torch.zeros_like(trained)
    found[..., :-2] = trained[..., 1:-1] & trained[..., 2:]
    return found


@dataclass(frozen=True)
class Part:
    """The examples of one source: `chosen` (n,) of those in `items`, with their lengths (n,), both int64.

    weight: its share of a mixture relative to the others'; None: as many draws as it has examples.
    """

    items: Sequence[Example]
    chosen: NDArray[np.int64]
    lengths: NDArray[np.int64]
    weight: float | None = None

    @classmethod
    def of(cls, items: Sequence[Example], weight: float | None = None) -> Part:
        lengths = np.array([len(example.ids) for example in items], dtype=np.int64)
        return cls(items, np.arange(len(items)), lengths, weight)

    def subset(self, kept: NDArray[np.int64]) -> Part:
        return Part(self.items, self.chosen[kept], self.lengths[kept], self.weight)


class Examples(Sequence[Example]):
    """All examples, source after source; only what is asked for is read."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self._ends = list(accumulate(len(part.chosen) for part in self.parts))
        self.lengths = np.concatenate([part.lengths for part in self.parts])

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect_right(self._ends, index)
        part = self.parts[number]
        return part.items[int(part.chosen[index - self._ends[number]])]

    def draws(self) -> list[int]:
        """How often each source is drawn from in an epoch of as many draws as there are examples.

        Without any weight every example comes once; with one, sources without count as 1. No source is left out.
        """
        counts = [len(part.chosen) for part in self.parts]
        if all(part.weight is None for part in self.parts):
            return counts
        return apportion(len(self), [1.0 if part.weight is None else part.weight for part in self.parts], least=1)


def apportion(total: int, weights: Sequence[float], least: int = 0) -> list[int]:
    """`total` in whole shares by weight (largest remainders first), each at least `least`."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return [max(least, share) for share in shares]
