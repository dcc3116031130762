"""Steps that nobody plans but that hang masks nevertheless: a small model feels what planning takes."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

import numpy as np

from foretell.decoding.calibration import Floats
from foretell.decoding.problem import Problem, value_of
from foretell.layout import Layout

STEPS = (16, 512)  # of a habit, doubling from the first to the last while it is confirmed
STEPS_PLANNED = 16  # behind one, which tell whether it is still good
ROUNDS = 12  # of policy iteration, from the last solution, at most: it is followed for long
SLACK = 0.15  # of the tokens that a step should give, how many may be missing, or too many
# After so many solutions in a row that found something else better, one that is hardly worse is tried, too: what such
# steps really take shows only then.
SELDOM, NEARLY = 8, 1.06
FADES = 1 - 1 / 256  # weight of what was promised and taken, from step to step
BELIEVED = 1 / 4  # of all that, how much is taken for a promise kept
FORGOTTEN = 0.9  # weight of what a habit took and promised, from one refusal to the next
MISSING = 15.0  # tokens beyond these, of a sequence, after which a habit is over; too many are as good a sign


class Habit:
    """Layouts that depend on nothing but how many drafts are at hand.

    Which layout is best hangs on how sure the drafts at hand are, too. But to read that, to choose, to follow what
    becomes of them and to learn from it can take more of a step than it saves. So the planner also solves for the best
    rule that needs nothing of it, and where that promises as much it is followed for some steps, as blindly as a fixed
    strategy. It ends early if steps give less than it promised, or more: the text has become another.
    """

    def __init__(self) -> None:
        self.left = 0  # steps
        self.layouts: Sequence[Layout] = ()  # (k+1,) by drafts at hand
        self._tokens: Sequence[float] = ()  # (k+1,) that a step should give
        self._missing, self._beyond = 0.0, 0.0
        self._steps, self._refused = STEPS[0], 0
        self._solution: tuple[Floats, float] | None = None  # value (k+1,) and seconds per token of the best such rule
        # Of planned steps and of a habit's: seconds taken, and those promised for the tokens that they gave.
        self._took, self._promised = [0.0, 0.0], [0.0, 0.0]
        self._planning: deque[float] = deque(maxlen=STEPS_PLANNED)  # seconds that the latest planned steps took for it

    @property
    def saves(self) -> float | None:
        """Seconds of planning, of a step; None before there was any."""
        return statistics.median(self._planning) if self._planning else None

    def planned(self, seconds: float) -> None:
        """To plan a step took so long, and what belongs to it."""
        self._planning.append(seconds)

    def kept(self, blind: bool, seconds: float, promised: float) -> None:
        """A planned step, or a `blind` one of a habit, took so long, and its tokens should have taken that."""
        self._took[blind] = FADES * self._took[blind] + seconds
        self._promised[blind] = FADES * self._promised[blind] + promised

    @property
    def dearer(self) -> float:
        """How many times as much steps of a habit take beyond what they promised as planned ones do, by the clock."""
        believed = BELIEVED * (sum(self._took) + sum(self._promised)) / 2
        planned, blind = (
            (took + believed) / (promised + believed) if promised else 1.0
            for took, promised in zip(self._took, self._promised, strict=True)
        )
        return blind / planned

    @property
    def per_token(self) -> float:
        """Seconds that it promises; 0 before there was any."""
        return self._solution[1] if self._solution else 0.0

    def solve(self, problem: Problem, reach: Floats) -> float:
        """Finds the best such rule, for the chances (k+1,) that the first 0..k drafts of a block hold on average;
        seconds per token."""
        value, per_token = self._solution or (np.zeros(len(reach)), problem.seconds[0])
        mean, nothing = reach[None], np.zeros((1, len(reach)))
        rule: list[int] = []
        for _ in range(ROUNDS):
            chosen, solved = problem.round(mean, nothing, value, per_token)
            value, per_token = self._solution = value_of(solved)
            before, rule = rule, chosen[0].tolist()
            if rule == before:
                break
        self.layouts = [problem.shapes.layouts[index] for index in rule]
        self._tokens = (reach * problem.shapes.there[rule]).sum(1).tolist()
        return per_token

    @property
    def patience(self) -> float:
        """How many times as long as planned steps it may take for a token."""
        return NEARLY if self._refused >= SELDOM else 1.0

    def begin(self) -> None:
        """It is followed for some steps."""
        self._missing, self._beyond, self._refused = 0.0, 0.0, 0
        self.left, self._steps = self._steps, min(2 * self._steps, STEPS[1])

    def end(self) -> None:
        """Something else is better; the next time it is short again. What was bad luck is forgotten by and by."""
        self.left, self._steps, self._refused = 0, STEPS[0], self._refused + 1
        self._took[True], self._promised[True] = FORGOTTEN * self._took[True], FORGOTTEN * self._promised[True]

    def gave(self, drafts: int, tokens: int, sequences: int) -> None:
        """A step gave one of so many sequences, with so many drafts at hand, so many tokens."""
        expected = self._tokens[drafts]
        self._missing = max(0.0, self._missing + ((1 - SLACK) * expected - tokens) / sequences)
        self._beyond = max(0.0, self._beyond + (tokens - (1 + SLACK) * expected) / sequences)
        if max(self._missing, self._beyond) > MISSING:
            self.end()
