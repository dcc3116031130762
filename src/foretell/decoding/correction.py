"""What steps really take against what was measured for them: the context is another, or the machine was busy then."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import numpy as np

from foretell.decoding.calibration import Floats

LATEST = 64  # steps that count
SPREAD, SLOPE = 0.1, 0.1  # of logarithms: usual deviation of a step, and of the power of the width
SMALL = 0.03  # deviations below count as so large
ROUNDS = 4  # of fitting
DISTURBED = math.log(1.5)  # steps that take so much longer than usual count for nothing


class Fit(NamedTuple):
    """How a kind of step is corrected."""

    level: float  # logarithm of the factor at the usual width
    slope: float
    usual: float  # logarithm of that width

    @property
    def factor(self) -> float:
        """At the usual width."""
        return float(np.exp(self.level))

    def at(self, widths: Floats | float) -> Floats:
        """Factors (...) for steps of so many rows (...)."""
        factors: Floats = np.exp(self.level + self.slope * (np.log(widths) - self.usual))
        return factors


class Correction:
    """Of one kind of step: seconds = seconds measured · factor · (width / usual width)^slope.

    Fitted to the latest steps by least absolute deviations, as the first steps of a layout and disturbances take far
    longer. What counts is what steps take on average, so the factor is raised by what they take beyond the usual: now
    and then the planner solves its problem in one. The slope is believed to be 0 until widths that differ tell another:
    a table measured while something else kept the machine busy is too flat, not only too high.
    """

    def __init__(self, fewest: int) -> None:
        """`fewest`: steps, before which nothing is corrected."""
        self.fewest = fewest
        self._steps: deque[tuple[float, float]] = deque(maxlen=LATEST)  # log width, log share of the measured seconds
        self._known: Fit | None = None
        self._news = False  # since then

    def took(self, width: int, share: float) -> None:
        """A step of so many rows took this share of the seconds measured for it."""
        self._steps.append((math.log(width), math.log(share)))
        self._news = True

    def fit(self) -> Fit | None:
        """None while too few steps are known."""
        if self._news and len(self._steps) >= self.fewest:
            self._known, self._news = self._fitted(), False
        return self._known

    def _fitted(self) -> Fit:
        widths, shares = np.array(self._steps).T
        middle = len(shares) // 2
        usual, level, slope = float(np.sort(widths)[middle]), float(np.sort(shares)[middle]), 0.0
        away = widths - usual
        basis = np.stack([np.ones_like(away), away])
        columns = np.stack([*basis, shares], 1)
        for _ in range(ROUNDS if away.any() else 0):
            weights = 1 / (SPREAD * np.maximum(np.abs(shares - level - slope * away), SMALL))
            (total, first, one), (_, second, other) = ((weights * basis) @ columns).tolist()
            second += SLOPE**-2
            determinant = total * second - first**2
            level, slope = (second * one - first * other) / determinant, (total * other - first * one) / determinant
        beyond = shares - level - slope * away
        return Fit(level + math.log(np.exp(beyond[beyond < DISTURBED]).mean()), slope, usual)
