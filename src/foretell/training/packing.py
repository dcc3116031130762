"""Packing: several short examples share one sequence, so that steps spend nothing on padding (method.md section 4).

No document sees another: positions begin anew, attention stays within, and no label crosses a border.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray

from foretell.training.examples import Example, Examples, Part


def packed(examples: Examples, seq_len: int) -> Examples:
    """The same examples in sequences of at most `seq_len` tokens; those of one source stay together."""
    return Examples([_pack_part(part, seq_len) for part in examples.parts])


def _pack_part(part: Part, seq_len: int) -> Part:
    pack_of = best_fit(part.lengths, seq_len)
    count = int(pack_of.max()) + 1
    members = np.argsort(pack_of, kind="stable")
    bounds = np.concatenate([[0], np.bincount(pack_of, minlength=count).cumsum()])
    lengths = np.zeros(count, dtype=np.int64)
    np.add.at(lengths, pack_of, part.lengths)
    return Part(Packs(part, members, bounds), np.arange(count), lengths, part.weight)


def best_fit(lengths: NDArray[np.int64], room: int) -> NDArray[np.int64]:
    """(n,) lengths, none above `room` -> (n,) the pack of each.

    Longest first, each into the fullest pack that holds it; equals in their order, so that lengths alone decide.
    """
    pack_of = np.empty(len(lengths), dtype=np.int64)
    open_packs: dict[int, list[int]] = {}  # by the room they have left
    rooms: list[int] = []  # its keys, sorted
    count = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            pack, left, count = count, room, count + 1
        else:
            left = rooms[at]
            pack = open_packs[left].pop()
            if not open_packs[left]:
                del open_packs[left], rooms[at]
        pack_of[index] = pack
        left -= length
        if left not in open_packs:
            open_packs[left] = []
            insort(rooms, left)
        open_packs[left].append(pack)
    return pack_of


class Packs(Sequence[Example]):
    """Each item is several examples of a part, joined."""

    def __init__(self, part: Part, members: NDArray[np.int64], bounds: NDArray[np.int64]) -> None:
        self.part, self.members, self.bounds = part, members, bounds

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        inside = self.part.chosen[self.members[self.bounds[index] : self.bounds[index + 1]]]
        return join([self.part.items[int(i)] for i in inside])


def join(examples: Sequence[Example]) -> Example:
    """One sequence of several documents.

    The first token of each is nobody's label, which it never was within its own document: so neither anchors nor labels
    reach across a border.
    """
    lengths = torch.tensor([len(example.ids) for example in examples])
    first = lengths.cumsum(0) - lengths
    trained = torch.cat([example.trained for example in examples])
    trained[first] = False
    return Example(torch.cat([example.ids for example in examples]), trained, first.repeat_interleave(lengths))
