"""What one forward pass carries beyond the cached prefix, and who sees whom: the one data structure of foretell.

Regular tokens come first and masks last, so that the gate is one contiguous slice, accepting a drafts is
"length += a + 1", and shapes depend on the layout alone (method.md sections 1 and 5, design.md "Layout").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from foretell.errors import ForetellError

# Regular tokens: steps with more have a prompt in them, or many sequences, and what is made for them is not kept.
RECURRING = 64


class Block(NamedTuple):
    """`masks` mask tokens hung after regular token `after` (counted from 0)."""

    after: int
    masks: int


@dataclass(frozen=True)
class Layout:
    """R regular tokens followed by all mask blocks: Q = R + M new tokens.

    Row r < R is regular token r; then come the rows m1..mk of the first block, of the second, and so on.
    All derived tensors live on the CPU and are computed once.

    Raises ForetellError if a block hangs after a token that is not there or holds no mask.
    """

    regular: int
    blocks: tuple[Block, ...] = ()
    bidirectional: bool = False  # a mask sees all masks of its block; otherwise those up to itself

    def __post_init__(self) -> None:
        if self.regular < 1:
            raise ForetellError("a layout needs at least one regular token")
        for block in self.blocks:
            if not 0 <= block.after < self.regular or block.masks < 1:
                raise ForetellError(f"{block} does not fit a layout of {self.regular} regular tokens")

    @cached_property
    def masks(self) -> int:
        """M: mask tokens in all blocks together."""
        return sum(block.masks for block in self.blocks)

    @cached_property
    def width(self) -> int:
        """Q = R + M."""
        return self.regular + self.masks

    @cached_property
    def _rows(self) -> tuple[list[int], list[int], list[int]]:
        """For each mask row: the token it hangs after, its number j counted from 1, and its block."""
        after = [block.after for block in self.blocks for _ in range(block.masks)]
        number = [j for block in self.blocks for j in range(1, block.masks + 1)]
        owner = [index for index, block in enumerate(self.blocks) for _ in range(block.masks)]
        return after, number, owner

    @cached_property
    def position_offsets(self) -> Tensor:
        """(Q,) int64: position id of each row minus that of regular token 0. m_j after token r: r + j."""
        after, number, _ = self._rows
        return torch.cat(
            [torch.arange(self.regular), torch.tensor(after, dtype=torch.long) + torch.tensor(number, dtype=torch.long)]
        )

    @cached_property
    def label_offsets(self) -> Tensor:
        """(Q,) int64: position of the token that each row predicts, from regular token 0: one past its own."""
        return self.position_offsets + 1

    @cached_property
    def mask_numbers(self) -> Tensor:
        """(M,) int64: which mask vector each mask row holds, counted from 0."""
        return torch.tensor(self._rows[1], dtype=torch.long) - 1

    @cached_property
    def visible(self) -> Tensor:
        """(Q, Q) bool: row q may attend to column c. The cached prefix, seen by every row, is not part of it."""
        after, number, owner = (torch.tensor(values, dtype=torch.long) for values in self._rows)
        regular = torch.arange(self.regular)
        see = torch.zeros(self.width, self.width, dtype=torch.bool)
        see[: self.regular, : self.regular] = regular[:, None] >= regular[None, :]
        see[self.regular :, : self.regular] = after[:, None] >= regular[None, :]
        own = owner[:, None] == owner[None, :]
        see[self.regular :, self.regular :] = own & ((number[:, None] >= number[None, :]) | self.bidirectional)
        return see

    def block_rows(self, after: int) -> slice | None:
        """Rows of the block hung after regular token `after`, or None if none hangs there."""
        start = self.regular
        for block in self.blocks:
            if block.after == after:
                return slice(start, start + block.masks)
            start += block.masks
        return None

    def __str__(self) -> str:
        """A drawing: one line per row, its position and what it sees; '#' marks visible columns."""
        names = [f"t{r}" for r in range(self.regular)]
        names += [f"t{a}.m{j}" for a, j in zip(self._rows[0], self._rows[1], strict=True)]
        size = max(len(name) for name in names)
        lines = [f"layout: {self.regular} regular + {self.masks} masks = {self.width} tokens"]
        for name, position, row in zip(names, self.position_offsets.tolist(), self.visible.tolist(), strict=True):
            lines.append(f"{name:>{size}} @{position:<3} " + "".join("#" if seen else "." for seen in row))
        return "\n".join(lines)


@lru_cache(maxsize=1024)
def plain(tokens: int = 1) -> Layout:
    """Regular tokens only."""
    return Layout(tokens)


@lru_cache(maxsize=1024)
def linear(drafts: int, masks: int) -> Layout:
    """[x s1..sm m1..mk]: one block after the last draft (method.md section 5)."""
    return Layout(drafts + 1, (Block(drafts, masks),))


@lru_cache(maxsize=1024)
def quadratic(drafts: int, masks: int) -> Layout:
    """[x M s1 M ... sm M], regular tokens first: a block after x and after every draft, (m+1)(k+1) tokens."""
    return Layout(drafts + 1, tuple(Block(after, masks) for after in range(drafts + 1)))


def training(tokens: int, anchors: Sequence[int], masks: int) -> Layout:
    """A sequence of `tokens` with a block after each anchor (method.md section 1)."""
    return Layout(tokens, tuple(Block(int(anchor), masks) for anchor in anchors))
