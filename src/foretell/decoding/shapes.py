"""The layouts that a planner chooses from, as tables."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from foretell.decoding.calibration import Floats
from foretell.layout import Block, Layout

NEVER = 1e6  # seconds, of a layout that a sequence can't take
PRICES = 15  # of a row, at which it is asked what sequences would take
SIZES = {False: 4, True: 2}  # parts of k masks that blocks come in, for one sequence and for several


class Shapes:
    """L layouts, by drafts verified and masks in all: few enough to weigh all of them at every step.

    layouts: the layouts in that order. verified, hung, widths (L,): drafts that they verify, masks
    and rows in all. blocks (L, k+1):
    masks after each token; there (L, k+1): 1 for the tokens that they have. totals (T,): the different numbers of
    masks. starts, ends (k+1,): the first of those with d drafts, which hangs no masks, and what comes behind the last.
    """

    def __init__(self, layouts: tuple[Layout, ...], masks: int) -> None:
        self.layouts = layouts
        self.blocks = np.array([[dict(layout.blocks).get(r, 0) for r in range(masks + 1)] for layout in layouts])
        self.verified = np.array([layout.regular - 1 for layout in layouts])
        self.hung = self.blocks.sum(1)
        self.widths = 1 + self.verified + self.hung
        self.there = (np.arange(masks + 1) <= self.verified[:, None]).astype(float)
        self.ends = np.searchsorted(self.verified, np.arange(masks + 1), side="right")
        self.starts = np.append(0, self.ends[:-1])
        self.totals = np.unique(self.hung)

    @cached_property
    def choices(self) -> Choices:
        return Choices(self)

    @cached_property
    def shared(self) -> Shared:
        return Shared(self)

    @cached_property
    def apart(self) -> Apart:
        return Apart(self)


class Choices(ctypes.Structure):
    """`Choices` of planned.cpp."""

    _fields_ = [
        *((name, ctypes.c_long) for name in ("layouts", "states")),
        *((name, ctypes.c_void_p) for name in ("verified", "blocks", "starts", "ends")),
    ]

    def __init__(self, shapes: Shapes) -> None:
        tables = shapes.verified, shapes.blocks.T, shapes.starts, shapes.ends
        self._kept = [np.ascontiguousarray(table, np.int64) for table in tables]
        super().__init__(*shapes.blocks.shape, *(table.ctypes.data for table in self._kept))


class Shared:
    """The same layouts for sequences that share a step: all pay for the most drafts and the most masks among them.

    A pair is a number of drafts and one of `totals`: (k+1)·T of them, in order. worth (G, B) below has a row for every
    layout, by pairs, and one for every pair that no layout has; `rows` (G,) says which layout, or any.
    """

    def __init__(self, shapes: Shapes) -> None:
        states = len(shapes.ends)
        own = [
            np.flatnonzero((shapes.verified == drafts) & (shapes.hung == total))
            for drafts in range(states)
            for total in shapes.totals
        ]
        self.rows = np.concatenate([found if len(found) else [0] for found in own])
        sizes = np.array([max(1, len(found)) for found in own])
        self._starts = np.cumsum(sizes) - sizes
        self._pairs = states, len(shapes.totals)
        missing = np.repeat([not len(found) for found in own], sizes)
        # (G, k+1): for sequences with n = 0..k drafts at hand, whether the row verifies more, or is none.
        self._never = (shapes.verified[self.rows][:, None] > np.arange(states)) | missing[:, None]
        drafts, hung = np.where(missing, states, shapes.verified[self.rows]), shapes.hung[self.rows]
        self._fitting = [
            np.flatnonzero((drafts <= most) & (hung <= total)) for most in range(states) for total in shapes.totals
        ]

    def weights(self, weights: Floats) -> Floats:
        """(L, k+1) that a layout's worth is linear in -> (G, 2(k+1)), for `ahead`."""
        return np.hstack([weights[self.rows], NEVER * self._never])

    def least(self, worth: Floats) -> Floats:
        """worth (G, B) -> (k+1, T, B): the least of the layouts with at most d drafts and `totals[t]` masks."""
        least = np.minimum.reduceat(worth, self._starts, axis=0).reshape(*self._pairs, -1)
        np.minimum.accumulate(least, axis=0, out=least)
        return np.minimum.accumulate(least, axis=1, out=least)

    def best(self, worth: Floats, pair: int) -> list[int]:
        """The layout of every sequence, of those with at most as many drafts and masks as a pair, by its place."""
        fitting = self._fitting[pair]
        return self.rows[fitting[worth[fitting].argmin(0)]].tolist()


def ahead(reach: Sequence[Sequence[float]], weights: Sequence[float], states: int) -> Floats:
    """Chances (n_b + 1,) that the first 0..n_b drafts of a sequence hold, times its weight -> (2(k+1), B), by which
    weights of layouts and of those that it can't take are multiplied; states: k+1."""
    padded = [
        [*[weight * chance for chance in own], *[0.0] * (states - 1), 1.0, *[0.0] * (states - len(own))]
        for own, weight in zip(reach, weights, strict=True)
    ]
    return np.array(padded).T


class Apart:
    """The same layouts for sequences that share a step in which each has rows of its own: they share the price of one.

    worth (L, B) below has a row for every layout, by width; least (W, B) one for every width, `widths` (W,) rows.
    """

    def __init__(self, shapes: Shapes) -> None:
        states, width = len(shapes.ends), shapes.widths
        self._order = np.argsort(width, kind="stable")
        self.widths, self._starts = np.unique(width[self._order], return_index=True)
        self._ends = np.append(self._starts[1:], len(width))
        # (L, k+1): for sequences with n = 0..k drafts at hand, whether the layout verifies more.
        self._never = shapes.verified[self._order][:, None] > np.arange(states)

    def weights(self, weights: Floats) -> Floats:
        """(L, k+1) that a layout's worth is linear in -> (L, 2(k+1)), for `ahead`."""
        return np.hstack([weights[self._order], NEVER * self._never])

    def least(self, worth: Floats) -> Floats:
        """worth (L, B) -> (W, B)."""
        return np.minimum.reduceat(worth, self._starts, axis=0)

    def best(self, worth: Floats, picks: NDArray[np.intp]) -> list[int]:
        """The layout of every sequence among those of the width with its number in `picks` (B,)."""
        spans = zip(self._starts[picks].tolist(), self._ends[picks].tolist(), strict=True)
        return [int(self._order[start + worth[start:end, b].argmin()]) for b, (start, end) in enumerate(spans)]


def cheapest(seconds: Floats, widths: NDArray[np.intp], least: Floats) -> tuple[float, NDArray[np.intp]]:
    """The widths of B sequences that cost least in all, as numbers (B,) of `widths`, and what they cost.

    seconds (T,): of a step, by the rows beyond one of each; widths (W,), from 1 on: to choose from; least (W, B): what
    each costs beside the step. At a price of a row every sequence knows its best width by itself. From a price at which
    all have one row down to nothing they take more, one after the other, and somewhere on that way it is cheapest.
    """
    sequences = least.shape[1]
    dearest = max(np.diff(seconds).max(), 1e-9)
    prices = np.append(dearest * np.geomspace(2.0, 1 / 32, PRICES), 0.0)
    picks = (least + prices[:, None, None] * widths[:, None]).argmin(1)  # (P, B)
    picks = np.vstack([np.zeros((1, sequences), picks.dtype), picks])
    rows, worth = widths[picks], np.take_along_axis(least, picks, 0)
    beyond = np.append(0, np.diff(rows, axis=0).ravel().cumsum())
    total = worth[0].sum() + np.append(0.0, np.diff(worth, axis=0).ravel().cumsum())
    total += seconds[np.minimum(beyond, len(seconds) - 1)]
    at = int(total.argmin())
    step, number = divmod(at, sequences)
    found = picks[step].copy()
    if number:
        found[:number] = picks[step + 1, :number]
    return float(total[at]), found


@lru_cache(maxsize=16)
def shapes(masks: int, several: bool = False, ragged: bool = False) -> Shapes:
    """For blocks of up to so many masks; `several`: for steps that sequences share, `ragged` ones if each has rows of
    its own.

    Blocks of two sizes, the larger one after the last draft, after another token, or after both: where the run of
    drafts that hold will likely end. For one sequence sizes are quarters of k, and there are full blocks after any two
    to four tokens too, for machines with cheap rows. Sequences that share a step have to compromise anyway, and as many
    shapes as that would take a good part of a small model's step to weigh for all of them: halves of k are enough.
    Where each has rows of its own one or two masks may be all that pays: those too, most after the last draft.
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
        if ragged:
            few = sorted({*sizes, *range(min(2, masks) + 1)})
            spots += [((drafts,), large, small) for large in few for small in few if small <= large]
        for spot, large, small in spots:
            counts = [large if r in spot else small for r in range(drafts + 1)]
            found.add((drafts + 1, tuple(Block(r, count) for r, count in enumerate(counts) if count)))
    ordered = sorted(found, key=lambda layout: (layout[0], sum(block.masks for block in layout[1]), layout[1]))
    return Shapes(tuple(Layout(regular, blocks) for regular, blocks in ordered), masks)
