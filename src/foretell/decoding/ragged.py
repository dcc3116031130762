"""The planner where sequences that share a step need not have as many rows each (docs/planner.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from foretell.decoding.calibration import Experience
from foretell.decoding.costs import Costs
from foretell.decoding.planner import Planner
from foretell.decoding.problem import Problem
from foretell.decoding.shapes import NEVER, ahead, cheapest
from foretell.layout import Layout, plain

PROBED = 2  # sequences on which masks are tried: they tell as much as all, and cost less
MORE_ROUNDS = 3  # times as many of policy iteration, as the price of a row is sought along
NEAR, FURTHER = 1.05, 1.5  # times a price: close to another, and the next to try


class RaggedPlanner(Planner):
    """Of several sequences each takes the layout that is best for it; what they share is the price of a row.

    A step costs what its rows cost together. In the long run, with the mean width q of the best policy, that is as if
    a layout of w rows cost C(q) + (w - q) · C'(q), so that a sequence can be solved for by itself. At a step the
    sequences' own layouts are weighed against the very cost of all their rows.
    """

    own_rows = True

    def __init__(self, costs: Costs, experience: Experience) -> None:
        self._price_of_row: float | None = None  # of every sequence
        super().__init__(costs, experience)

    def _best_together(self, reach: Sequence[Sequence[float]], urgency: Sequence[float]) -> list[int]:
        if not self.prices.ragged:
            return super()._best_together(reach, urgency)
        sequences, states = len(reach), self.masks + 1
        without = self._drafts_each(reach, urgency)
        if not (self._pays and self._hangs_masks):
            return without[1]
        apart = self.shapes.apart
        if self._of_shared is None:
            self._of_shared = apart.weights(self._weights), self.prices.with_masks
        weights, seconds = self._of_shared
        worth = weights @ ahead(reach, [weight / sequences for weight in urgency], states)  # (L, B)
        least, picks = cheapest(seconds, apart.widths, apart.least(worth))
        return apart.best(worth, picks) if least < without[0] else without[1]

    def _drafts_each(self, reach: Sequence[Sequence[float]], urgency: Sequence[float]) -> tuple[float, list[int]]:
        """Seconds beside what tokens are worth, and the best shapes, without masks."""
        sequences, most = len(reach), max(map(len, reach))
        worth = (self.per_token if self._pays else min(self.per_token, self.prices.resting)) / sequences
        least = np.full((most, sequences), NEVER)
        for b, (own, weight) in enumerate(zip(reach, urgency, strict=True)):
            least[: len(own), b] = -worth * weight * np.cumsum(own)
        # Rows get dearer and drafts less likely: where no first draft pays for a row, nothing does.
        first = max((weight * own[1] for own, weight in zip(reach, urgency, strict=True) if len(own) > 1), default=0.0)
        if worth * first <= self.prices.without[1] - self.prices.without[0]:
            return float(self.prices.without[0] + least[0].sum()), [int(self.shapes.starts[0])] * sequences
        total, picks = cheapest(self.prices.without, np.arange(1, most + 1), least)
        return total, self.shapes.starts[picks].tolist()

    def _trial(self, layout: Layout, sequences: int) -> list[Layout]:
        return [layout] * PROBED + [plain()] * (sequences - PROBED) if self.prices.ragged else [layout] * sequences

    def _improve(self, rounds: int, close: float) -> None:
        """With every round the price of a row is sought along at which the best policy has the rows that are best at
        that price; where one row is free and the next is not, it lies in between."""
        if not self.prices.ragged:
            super()._improve(rounds, close)
            return
        reach, found = self.experience.recent_reach()
        low, high = 0.0, math.inf
        widths = 1 + np.arange(len(self.prices.with_masks)) / self.sequences
        price = self._price_of_row or self.prices.resting
        for _ in range(MORE_ROUNDS * rounds):
            before = np.append(self.value, self.per_token)
            problem = Problem(self.shapes, price * self.shapes.widths, self.prices.drafting)
            _, solved = problem.round(reach, found, self.value, self.per_token)
            # Steps with masks cost no less than this line, and as much at the best mean width.
            beyond = self.prices.with_masks - price * widths
            best = int(beyond.argmin())
            self.per_token, *value = solved[:, 0] + beyond[best] * solved[:, 2]
            self.value = np.array([0.0, *value])
            self._price_of_row = price
            low, high = (price, high) if solved[0, 1] > widths[best] * solved[0, 2] else (low, price)
            changed = np.abs(before - np.append(self.value, self.per_token)).max()
            if high < NEAR * low and changed < close * self.per_token:
                break
            if low and high < math.inf:
                price = math.sqrt(low * high)
            else:
                price = low * FURTHER or high / FURTHER
