"""The layouts that a planner chooses from, as tables."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import numpy as np

from foretell.decoding.calibration import Floats
from foretell.layout import Block, Layout

SIZES = {False: 4, True: 2}  # parts of k masks that blocks come in, for one sequence and for several


class Shapes:
    """L layouts, by drafts verified: few enough to weigh all of them at every step.

    layouts: the layouts, by drafts and then by blocks. verified, hung (L,): drafts that they verify, and masks in all.
    blocks (L, k+1): masks after each token; there (L, k+1): 1 for the tokens that they have. totals (T,): the different
    numbers of masks. starts, ends (k+1,): the first of those with d drafts, which hangs no masks, and what comes behind
    the last.
    """

    def __init__(self, layouts: tuple[Layout, ...], masks: int) -> None:
        self.layouts = layouts
        self.blocks = np.array([[dict(layout.blocks).get(r, 0) for r in range(masks + 1)] for layout in layouts])
        self.verified = np.array([layout.regular - 1 for layout in layouts])
        self.hung = self.blocks.sum(1)
        self.there = (np.arange(masks + 1) <= self.verified[:, None]).astype(float)
        self.ends = np.searchsorted(self.verified, np.arange(masks + 1), side="right")
        self.starts = np.append(0, self.ends[:-1])
        self.totals, column = np.unique(self.hung, return_inverse=True)
        # In order of (drafts, masks), where each such pair starts, and the pairs.
        self._by_pair = np.lexsort((column, self.verified))
        pairs = np.stack([self.verified, column])[:, self._by_pair]
        self._pair_starts = np.flatnonzero(np.append(True, (pairs[:, 1:] != pairs[:, :-1]).any(0)))
        self._pairs = pairs[0, self._pair_starts], pairs[1, self._pair_starts]

    def least(self, worth: Floats) -> Floats:
        """worth (L, B) -> (k+1, T, B): the least of the shapes with at most d drafts and `totals[t]` masks."""
        least = np.full((len(self.ends), len(self.totals), worth.shape[1]), np.inf)
        least[self._pairs] = np.minimum.reduceat(worth[self._by_pair], self._pair_starts, axis=0)
        np.minimum.accumulate(least, axis=0, out=least)
        np.minimum.accumulate(least, axis=1, out=least)
        return least


@lru_cache(maxsize=16)
def shapes(masks: int, several: bool = False) -> Shapes:
    """For blocks of up to so many masks; `several`: for steps that sequences share.

    Blocks of two sizes, the larger one after the last draft, after another token, or after both: where the run of
    drafts that hold will likely end. For one sequence sizes are quarters of k, and there are full blocks after any two
    to four tokens too, for machines with cheap rows. Sequences that share a step have to compromise anyway, and as many
    shapes as that would take a good part of a small model's step to weigh for all of them: halves of k are enough.
    """
    parts = SIZES[several]
    sizes = sorted({round(masks * part / parts) for part in range(parts + 1)})
    pairs = [(large, small) for large in sizes for small in sizes if small <= large]
    found = set()
    for drafts in range(masks + 1):
        spots = [(spot, *pair) for spot in combinations(range(drafts + 1), 1) for pair in pairs]
        spots += [((spot, drafts), *pair) for spot in range(drafts) for pair in pairs]
        if not several:
            spots += [(spot, masks, 0) for size in (2, 3, 4) for spot in combinations(range(drafts + 1), size)]
        for spot, large, small in spots:
            counts = [large if r in spot else small for r in range(drafts + 1)]
            found.add((drafts + 1, tuple(Block(r, count) for r, count in enumerate(counts) if count)))
    return Shapes(tuple(Layout(regular, blocks) for regular, blocks in sorted(found)), masks)
