"""Which rows of a step of several sequences are theirs: the others only fill up what all have in common."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from foretell.layout import Block, Layout


class Rows:
    """Rows of a step of B sequences: *apart* (B, Q, ...), each sequence's R regular ones, then its M masks.

    *Together* (N, ...) are the regular rows of all sequences, then the masks of all, so that those that an adapter adds
    to are one piece of memory, without the filler of sequences whose own layout is narrower: nobody reads what becomes
    of it, and a machine on which rows cost something feels it. Only attention needs the rows apart.
    """

    def __init__(self, own: Sequence[Layout]) -> None:
        """The layouts (B,) of the sequences, before they are filled up (`aligned`) or after, then without filler."""
        self.sequences = len(own)
        self.regular, self.masks = max(layout.regular for layout in own), max(layout.masks for layout in own)
        self.layouts = own
        self.first = sum(layout.regular for layout in own)  # regular rows together
        self.count = sum(layout.width for layout in own)  # N
        self.whole = self.count == self.sequences * self.width  # no filler

    @property
    def width(self) -> int:
        """Q, with filler."""
        return self.regular + self.masks

    @cached_property
    def _taken(self) -> Tensor:
        """(N,) int64: where the rows together lie among the B · Q apart."""
        starts = list(zip(range(0, self.sequences * self.width, self.width), self.layouts, strict=True))
        regular = [start + row for start, layout in starts for row in range(layout.regular)]
        masks = [start + self.regular + row for start, layout in starts for row in range(layout.masks)]
        return torch.tensor(regular + masks)

    @cached_property
    def order(self) -> Tensor:
        """(N,) int64: where the rows of each sequence lie together, sequence after sequence."""
        order, regular, mask = [], 0, self.first
        for layout in self.layouts:
            order += [*range(regular, regular + layout.regular), *range(mask, mask + layout.masks)]
            regular, mask = regular + layout.regular, mask + layout.masks
        return torch.tensor(order)

    @cached_property
    def places(self) -> Tensor:
        """(B, Q) int64: where the rows apart lie among those together; filler is any of them."""
        places = torch.zeros(self.sequences * self.width, dtype=torch.long)
        places[self._taken] = torch.arange(self.count)
        return places.view(self.sequences, self.width)

    def together(self, apart: Tensor) -> Tensor:
        """(B, Q, ...) -> (N, ...), of one sequence a view."""
        if self.sequences == 1:
            return apart[0]
        if not self.whole:
            return apart.flatten(0, 1).index_select(0, self._taken.to(apart.device))
        out = apart.new_empty(self.count, *apart.shape[2:])
        regular, masks = apart.split((self.regular, self.masks), 1)
        out[: self.first].view(regular.shape).copy_(regular)
        out[self.first :].view(masks.shape).copy_(masks)
        return out

    def apart(self, together: Tensor) -> Tensor:
        """(N, ...) -> (B, Q, ...), of one sequence a view."""
        if self.sequences == 1:
            return together[None]
        if not self.whole:
            spread = together.index_select(0, self.places.flatten().to(together.device))
            return spread.unflatten(0, (self.sequences, self.width))
        parts = together[: self.first], together[self.first :]
        return torch.cat([part.unflatten(0, (self.sequences, -1)) for part in parts if len(part)], 1)

    def of_regular(self, together: Tensor) -> Tensor:
        """Of the regular rows, (n, ...) -> (B, R, ...)."""
        if self.whole:
            return together.unflatten(0, (self.sequences, self.regular))
        spread = together.index_select(0, self.places[:, : self.regular].flatten().to(together.device))
        return spread.unflatten(0, (self.sequences, self.regular))

    def regular_together(self, apart: Tensor) -> Tensor:
        """Regular rows (B, R) -> (first,)."""
        if self.whole:
            return apart.flatten()
        return torch.cat([own[: layout.regular] for own, layout in zip(apart, self.layouts, strict=True)])

    def of_own(self, drafts: Tensor, none: int) -> Tensor:
        """Drafts (B, m) of regular rows 1..m -> the same, `none` where the row is filler."""
        if self.whole or not drafts.shape[1]:
            return drafts
        own = torch.tensor([layout.regular - 1 for layout in self.layouts], device=drafts.device)[:, None]
        return drafts.masked_fill(torch.arange(drafts.shape[1], device=drafts.device) >= own, none)

    def block(self, sequence: int, after: int) -> slice | None:
        """Rows apart of the block that hangs after regular token `after` of a sequence, None if none does."""
        layout = self.layouts[sequence]
        block, filler = layout.block_rows(after), self.regular - layout.regular
        return None if block is None else slice(block.start + filler, block.stop + filler)

    def read(self, together: Tensor, sequences: Sequence[int], blocks: Sequence[slice]) -> Tensor:
        """(N, ...) -> (len(sequences), K, ...): rows of a block of each of these sequences."""
        if self.whole and len(sequences) == self.sequences:
            masks = together[self.first :].unflatten(0, (self.sequences, self.masks))
            return surviving(masks, [slice(own.start - self.regular, own.stop - self.regular) for own in blocks])
        return together[surviving(self.places[sequences], blocks).to(together.device)]


def surviving(rows: Tensor, blocks: Sequence[slice]) -> Tensor:
    """rows (B, Q, ...) of a step, a block of each sequence -> (B, K, ...); what lies beyond a block is its last row."""
    starts, sizes = [block.start for block in blocks], [block.stop - block.start for block in blocks]
    if len(set(sizes)) == len(set(starts)) == 1:
        return rows[:, starts[0] : starts[0] + sizes[0]]
    last = torch.tensor(sizes, device=rows.device)[:, None] - 1
    offsets = torch.minimum(torch.arange(max(sizes), device=rows.device), last)
    places = torch.tensor(starts, device=rows.device)[:, None] + offsets
    return rows[torch.arange(len(blocks), device=rows.device)[:, None], places]


def aligned(layouts: Sequence[Layout], masks: int) -> list[Layout]:
    """The same layouts, filled up to one common number of regular and mask rows, so that they make one batch.

    Regular filler comes after the sequence's own drafts; mask filler are more blocks after token 0, of at most `masks`.
    """
    regular, total = max(layout.regular for layout in layouts), max(layout.masks for layout in layouts)
    filled = []
    for layout in layouts:
        missing = total - layout.masks
        filler = (Block(0, min(masks, missing - start)) for start in range(0, missing, masks))
        filled.append(
            Layout(regular, layout.blocks + tuple(filler)) if missing or regular != layout.regular else layout
        )
    return filled
