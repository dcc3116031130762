"""Which layout the next step uses, for the fixed strategies of method.md section 5."""

from __future__ import annotations

from collections.abc import Sequence

from foretell.layout import Block, Layout, linear, plain, quadratic


def next_layout(strategy: str, drafts: int, masks: int, remaining: int) -> Layout:
    """The layout that verifies `drafts` drafts and makes new ones.

    `remaining` counts tokens that may still be generated: no draft or mask beyond them is useful, and a mask's position
    never passes the last token's, which keeps learned position tables in range.
    """
    drafts = min(drafts, remaining - 1)
    if strategy == "autoregressive":
        return plain()
    layout = linear(drafts, masks) if strategy == "linear" else quadratic(drafts, masks)
    if drafts + masks < remaining:
        return layout
    # Near the end: mask j after token r predicts token r + j + 1 of those remaining.
    blocks = (Block(after, min(count, remaining - 1 - after)) for after, count in layout.blocks)
    return Layout(layout.regular, tuple(block for block in blocks if block.masks > 0))


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
