"""What steps really take against what was measured for them: the context is another, or the machine was busy then."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import numpy as np

from foretell.decoding.calibration import Floats

LATEST, AGED = 64, 400  # steps that count, and after how many of any kind most no longer do
NEWS = 1 / 8  # of the steps that count, how many new ones make it worth to fit them again
SPREAD, SLOPE = 0.1, 0.1  # of logarithms: usual deviation of a step, and of the power of the width
SMALL = 0.03  # deviations below count as so large
ROUNDS = 4  # of fitting
DISTURBED = math.log(1.5)  # steps that take so much longer than usual count for nothing
CHAINS = math.log(4.0)  # as much longer making drafts may well take, which are gone over once or several times
FOLLOWS = 1 / 4  # of what a step takes beyond the expected, how much is the machine's pace from then on
SURPRISE = 0.2  # of logarithms: more is taken for so much, as single steps are disturbed
# Of the pace, how much is gone at every step: steps are disturbed but never the other way round, so that it would rise
# and rise, and what the steps cost that are fitted by it fall, beside those of kinds not seen for long.
RETURNS = 1 / 32


class Fit(NamedTuple):
    """How a kind of step is corrected."""

    level: float  # logarithm of the factor at the usual width
    slope: float
    usual: float  # logarithm of that width

    @property
    def factor(self) -> float:
        """At the usual width."""
        return float(np.exp(self.level))

    def at(self, width: float) -> float:
        """The factor for steps of so many rows."""
        return math.exp(self.level + self.slope * (math.log(width) - self.usual))

    def at_all(self, widths: Floats) -> Floats:
        """The same for many widths (...)."""
        factors: Floats = np.exp(self.level + self.slope * (np.log(widths) - self.usual))
        return factors


class Pace:
    """How many times as long as usual all steps take, as the machine is busy or not: the latest of known kinds tell.

    Without it a kind of steps last seen in a busy minute would seem dear beside one seen in a quiet one.
    """

    def __init__(self) -> None:
        self._level = 0.0  # logarithm

    @property
    def level(self) -> float:
        """The factor."""
        return math.exp(self._level)

    def usual(self, share: float, width: float, fit: Fit | None) -> float:
        """The share of the measured seconds that a step of this kind and width would have taken at the usual pace."""
        found = share * math.exp(-self._level)
        if fit is not None:
            surprise = math.log(found) - fit.level - fit.slope * (math.log(width) - fit.usual)
            self._level += FOLLOWS * min(max(surprise, -SURPRISE), SURPRISE) - RETURNS * self._level
        return found


class Correction:
    """Of one kind of step: seconds = seconds measured · factor · (width / usual width)^slope.

    Fitted to the latest steps by least absolute deviations, as the first steps of a layout and disturbances take far
    longer. What counts is what steps take on average, so the factor is raised by what they take beyond the usual: now
    and then the planner solves its problem in one. The slope is believed to be 0 until widths that differ tell another:
    a table measured while something else kept the machine busy is too flat, not only too high. What is long ago is
    forgotten but for as many steps as a fit takes: all of it, and a kind that was seen to be dear would be taken for
    one as cheap as the others every so often; none of it, and a few trials would not outweigh a busy hour.
    """

    def __init__(self, fewest: int, disturbed: float = DISTURBED) -> None:
        """`fewest`: steps that a fit takes: before them nothing is corrected; `disturbed`: logarithm of how many times
        as long as usual steps take that count for nothing."""
        self.fewest, self._disturbed = fewest, disturbed
        # Logarithms of the width and of the share of the measured seconds; when.
        self._steps: deque[tuple[float, float, int]] = deque(maxlen=LATEST)
        self._known: Fit | None = None
        self._news = 0  # steps since then

    def took(self, width: float, share: float, now: int = 0) -> None:
        """A step of so many rows took this share of the seconds measured for it; `now`: steps of any kind so far."""
        self._steps.append((math.log(width), math.log(share), now))
        self._news += 1

    def fresh(self, now: int) -> bool:
        """Whether the latest of them is not long ago."""
        return bool(self._steps) and self._steps[-1][2] >= now - AGED

    def fit(self, now: int = 0) -> Fit | None:
        """None while too few steps are known. Of many, few new ones make no other fit: not every solution needs one."""
        while len(self._steps) > self.fewest and self._steps[0][2] < now - AGED:
            self._steps.popleft()
            self._news += 1
        if self._news > NEWS * len(self._steps) or (self._news and self._known is None):
            self._known, self._news = self._fitted() if len(self._steps) >= self.fewest else None, 0
        return self._known

    def _fitted(self) -> Fit:
        widths, shares, _ = np.array(self._steps).T
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
        return Fit(level + math.log(np.exp(beyond[beyond < self._disturbed]).mean()), slope, usual)
