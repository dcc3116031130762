"""The planner's problem with costs as they are known now: a round of policy iteration (docs/planner.md)."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foretell import native
from foretell.decoding.calibration import Floats
from foretell.decoding.shapes import Shapes

ENDS = 1e-3  # chance that drafts at hand are lost, as by the end of the text: what would go on for ever has a value


class Problem(NamedTuple):
    """What there is to choose from, and what it costs.

    seconds (L,): of a step of every shape. drafting (k+1,): of making the drafts of a block of n masks.
    """

    shapes: Shapes
    seconds: Floats
    drafting: Floats

    def worth(self, value: Floats, per_token: float) -> Floats:
        """value (k+1,) of drafts at hand -> (L, k+1): what S_r, the chance that the first r drafts hold, adds to a
        step's seconds by every shape.

        Token r + 1 is worth `per_token`, and exactly r hold with chance S_r - S_{r+1}: that block's drafts remain.
        """
        left = np.take(value + self.drafting, self.shapes.blocks)
        left[:, 1:] -= left[:, :-1].copy()
        left -= per_token
        left *= self.shapes.there
        return left

    def improved(
        self, reach: Floats, found: Floats, value: Floats, per_token: float
    ) -> tuple[NDArray[np.intp], Floats]:
        """The best shapes (N, k+1) for n = 0..k drafts at hand, and the chances (N, k+1, k+1) that they go by, of the
        chances (N, k+1) that the first 0..k drafts of a block hold, and of the text's own drafts.

        With n drafts of a block up to n may be verified; or those of the text itself, which are there with any n.
        """
        states, worth = reach.shape[1], self.worth(value, per_token).T
        scores = reach @ worth
        scores += self.seconds  # (N, L)
        spans = zip(self.shapes.starts, self.shapes.ends, strict=True)
        best = np.stack([scores[:, start:end].argmin(1) + start for start, end in spans], 1)
        least = np.take_along_axis(scores, best, 1)
        lower = np.minimum.accumulate(least, 1)
        at = np.maximum.accumulate(np.where(least == lower, np.arange(states), 0), 1)
        best, chances = np.take_along_axis(best, at, 1), np.repeat(reach[:, None], states, 1)
        if (rows := found[:, 1].nonzero()[0]).size:
            of_text = found[rows] @ worth
            of_text += self.seconds
            other = of_text.argmin(1)[:, None]
            instead = np.take_along_axis(of_text, other, 1) < lower[rows]
            best[rows] = np.where(instead, other, best[rows])
            chances[rows] = np.where(instead[..., None], found[rows, None], chances[rows])
        return best, chances

    def round(self, reach: Floats, found: Floats, value: Floats, per_token: float) -> tuple[NDArray[np.intp], Floats]:
        """A round of policy iteration: the best shapes (N, k+1) as `improved` finds them, and `solved` for those."""
        if (library := native.library()) is None:
            chosen, chances = self.improved(reach, found, value, per_token)
            return chosen, self.solved(chosen, chances)
        count, states = reach.shape
        chosen, steps, moves = np.empty((count, states), np.int64), np.empty((3, states)), np.empty((states, states))
        given = [np.ascontiguousarray(array) for array in (reach, found, value, self.seconds, self.drafting)]
        at = [array.ctypes.data for array in (*given, chosen, *steps, moves)]
        choices = ctypes.byref(self.shapes.choices)
        library.foretell_improve(choices, count, *at[:3], per_token, *at[3:])
        return chosen, settled(steps, moves)

    def solved(self, chosen: NDArray[np.intp], chances: Floats) -> Floats:
        """If these shapes (N, k+1) are taken with n = 0..k drafts at hand that hold with these chances (N, k+1, k+1):
        of the seconds of steps, of their rows and of their number, (k+1, 3), what a token takes, then what 1..k drafts
        at hand are worth, as if that were what counts."""
        states = chosen.shape[1]
        held = chances * self.shapes.there[chosen]  # (N, k+1, k+1): that the first r drafts hold and were verified
        exactly = held.copy()
        exactly[..., :-1] -= held[..., 1:]
        left = self.shapes.blocks[chosen]  # drafts at hand then
        seconds = (self.seconds[chosen] + (exactly * self.drafting[left]).sum(-1)).mean(0)
        rows, tokens = self.shapes.widths[chosen].mean(0), held.sum(-1).mean(0)
        cells = np.arange(states)[:, None] * states + left
        moves = np.bincount(cells.ravel(), exactly.ravel(), states**2).reshape(states, states) / len(chosen)
        return settled(np.stack([seconds, rows, tokens]), moves)


def settled(steps: Floats, moves: Floats) -> Floats:
    """Of steps with n = 0..k drafts at hand the seconds, rows and tokens, (3, k+1), and moves (k+1, k+1) to as many
    drafts at hand -> `Problem.solved`."""
    seconds, rows, tokens = steps
    # h = seconds - per_token · tokens + moves · h with h(0) = 0, of which per_token takes the place.
    unknown = np.eye(len(moves)) - (1 - ENDS) * moves
    unknown[:, 0] = tokens
    return np.linalg.solve(unknown, np.stack([seconds, rows, np.ones(len(moves))], 1))


def value_of(solved: Floats) -> tuple[Floats, float]:
    """`Problem.solved` -> value (k+1,) of drafts at hand, in seconds, and seconds per token."""
    per_token, *value = solved[:, 0].tolist()
    return np.array([0.0, *value]), per_token
