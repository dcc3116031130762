"""Which layout the next step uses: the fixed strategies of method.md section 5, and the planner's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from foretell.layout import Block, Layout, linear, plain, quadratic


@dataclass
class Running:
    """One prompt on its way."""

    sequence: int  # its place in the caller's list
    remaining: int  # tokens it may still get
    text: list[int]  # prompt and tokens decided
    place: int = 0  # tokens decided
    drafts: int = 0  # drafts at hand
    stopped: bool = False  # before its limit


class Strategy(Protocol):
    """What the loop asks and tells, step by step."""

    def layouts(self, running: Sequence[Running], refilled: bool = False) -> list[Layout]:
        """The next step's layout of every sequence; the loop fills them up to one batch.

        `refilled`: other prompts wait to take the place of those that end.
        """
        ...

    def decided(self, row: Running, tokens: Sequence[int]) -> None:
        """These tokens of a sequence were decided."""
        ...

    def drafted(self, running: Sequence[Running], drafts: Tensor, confidences: Tensor | None) -> Tensor:
        """New drafts (B, K) int64, K from 0, and their confidences -> the drafts to go on with, (B, K').

        Of row b the first `running[b].drafts` count, before and after.
        """
        ...

    def took(self, layout: Layout, seconds: float | None, drafting: float = 0.0, width: float | None = None) -> None:
        """The last step, of the layout that all sequences had in common, took so long with the drafting behind it,
        which took `drafting` of that; None if that can't be compared, as it read the prompts too. A sequence had
        `width` rows on average, if there was no filler."""
        ...


@dataclass(frozen=True)
class Fixed:
    """Autoregressive, linear or quadratic, whatever the drafts are like."""

    name: str
    masks: int

    def layouts(self, running: Sequence[Running], refilled: bool = False) -> list[Layout]:
        return [next_layout(self.name, row.drafts, self.masks, row.remaining) for row in running]

    def decided(self, row: Running, tokens: Sequence[int]) -> None:
        pass

    def drafted(self, running: Sequence[Running], drafts: Tensor, confidences: Tensor | None) -> Tensor:
        return drafts

    def took(self, layout: Layout, seconds: float | None, drafting: float = 0.0, width: float | None = None) -> None:
        pass


def next_layout(strategy: str, drafts: int, masks: int, remaining: int) -> Layout:
    """The layout that verifies `drafts` drafts and makes new ones.

    `remaining` counts tokens that may still be generated: no draft or mask beyond them is useful, and a mask's position
    never passes the last token's, which keeps learned position tables in range.
    """
    drafts = min(drafts, remaining - 1)
    if strategy == "autoregressive":
        return plain()
    return within(linear(drafts, masks) if strategy == "linear" else quadratic(drafts, masks), remaining)


def within(layout: Layout, remaining: int) -> Layout:
    """Without the masks that would predict tokens beyond the last: mask j after token r predicts token r + j + 1."""
    if all(block.after + block.masks < remaining for block in layout.blocks):
        return layout
    blocks = (Block(after, min(count, remaining - 1 - after)) for after, count in layout.blocks)
    return Layout(layout.regular, tuple(block for block in blocks if block.masks > 0))
