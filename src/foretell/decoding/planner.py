"""Which layout next: the one of least expected seconds per token (docs/planner.md)."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foretell.decoding.calibration import Experience, Floats, means
from foretell.decoding.costs import Costs
from foretell.decoding.habit import STEPS_PLANNED, Habit
from foretell.decoding.prices import DRAFTS, HABIT, MASKS, PLANNED, RESTING, Prices
from foretell.decoding.problem import Problem, value_of
from foretell.decoding.shapes import Shapes, ahead, shapes
from foretell.decoding.trials import SETTLED, Trials
from foretell.layout import Block, Layout

FIRST_ROUNDS, ROUNDS = 10, 2  # of policy iteration, at most: from nothing, and from the last solution
FIRST_CLOSE, CLOSE = 0.01, 0.3  # tokens: a round that changes less is the last
# Steps between solutions, doubling from the first to the last: of one sequence and, at least, of a batch, each step of
# which tells as much as many of one.
SOLVE_EVERY, SOLVE_BATCH_EVERY = (8, 32), 2
SELDOM = 128  # steps between solutions in texts of a kind, at most
SOLVING = 0.03  # of plain decoding's time, that solutions may take in a text like the last ones
# A solution for so many times as many sequences, or as few, won't do, unless so few tokens are left. What becomes of
# more than a few as some of them end is not worth a solution.
APART, FEW, SHORT = 2, 4, 16
TRIED, FEWEST_TRIED = 4, 2  # masks: the first drafts tell most
UNTAUGHT = 16  # blocks of the text's own drafts that are learnt from at a time, at rest
PAYS = 0.93  # plain steps that a token must cost less than for anything else to be worth its trouble
HABIT_PAYS = 0.97  # the same for a habit, which is less trouble
# Of what planning takes of a plain step, by how much planned steps break their promise beyond habits, and at most.
DEARER, LEAN = 1 / 3, 0.07
REPEATS = 0.1  # of what masks promise, what the text itself may promise beside a habit
TEXTS = 4  # in a row in which nothing paid, after which only one of so many begins with masks


class Solution(NamedTuple):
    """Of a text, at its end, or of a batch, while most of it was there."""

    share: float  # of a plain step, that a token takes
    value: Floats
    few: NDArray[np.intp]  # those of the shapes that were best for some block
    shapes: Shapes


class Planner:
    """Chooses how many drafts to verify and how many masks to hang after each regular token, step by step.

    A renewal-reward problem: of all policies the one with the most tokens per second. Its state is the drafts at hand
    with their chances; `value[n]` is how many seconds n new drafts are worth less than none, averaged over the
    confidences of recent blocks, and `per_token` the seconds per token of the best policy. Both are solved for again
    and again while decoding goes on; what a layout is worth is then linear in the chances that the first 0, 1, ...
    drafts hold, and a step is decided by one small product.
    """

    own_rows = False  # whether sequences that share a step need not have as many rows each

    def __init__(self, costs: Costs, experience: Experience) -> None:
        self.masks = masks = experience.masks
        self.experience = experience
        self._choose_from(shapes(masks))
        self.prices = Prices(costs, masks, self.own_rows)
        self.value = np.zeros(masks + 1)
        self.per_token = self.prices.resting
        self._solved_for = 1  # sequences
        self._of_shared: tuple[Floats, Floats] | None = None  # weights of shapes that a step shares, seconds of pairs
        self._correct_costs()
        self._weigh()
        self._solved = False
        self._hangs_masks, self._pays = False, True
        self._began_with, self._paid, self._in_vain = 1, True, 0  # sequences, while most were there, beginnings
        self._alike, self._paid_before = 0, True  # texts in a row in which masks paid, or did not
        self._ended: deque[Solution] = deque(maxlen=TEXTS)
        self._whole: tuple[int, Solution, bool] | None = None  # of how many sequences, and whether it paid
        self._trials = Trials()
        self._until_solution, self._solve_every = 0, SOLVE_EVERY[0]
        self._solving = math.inf  # seconds that a solution takes, at least
        self.solved_in = 0.0  # seconds that one took before the last step, 0 if there was none
        self.habit = Habit()

    def reprice(self, costs: Costs, plain: Floats) -> None:
        """From now on steps cost this, and plain ones (n,) of 1, 2, ... n sequences that, if n are decoded."""
        self.prices.reprice(costs, plain)

    def _price(self) -> None:
        """As `reprice` has said, if that is new."""
        if self.prices.renew():
            self._choose_from(shapes(self.masks, self.sequences > 1, self.prices.ragged))
            self._correct_costs()  # which scales the solution
            self._weigh()

    def _choose_from(self, found: Shapes) -> None:
        """From now on, and at first from all of them (see `_best`)."""
        self.shapes, self._few = found, np.arange(len(found.layouts))

    @property
    def sequences(self) -> int:
        """That share a step."""
        return self.prices.sequences

    def layouts(
        self,
        reach: Sequence[Sequence[float]],
        remaining: Sequence[int],
        urgency: Sequence[float] | None = None,
    ) -> list[Layout]:
        """One layout per sequence, for the chances (m_b + 1,) that the first 0, 1, ... of its drafts hold, the
        tokens it may still get, and what a token of it is worth beside those of others (see `urgency`)."""
        self.solved_in = 0.0
        self._price()
        reach = [own[:left] for own, left in zip(reach, remaining, strict=True)]
        urgency = urgency or [1.0] * len(reach)
        if len(reach) == 1 and self.rests(remaining[0]):
            return [self.shapes.layouts[index] for index in self._drafts_alone(reach, self._gained(reach, urgency))]
        if self._apart(max(remaining)):
            self._until_solution = 0
        if self._until_solution == 0:
            self._until_solution = self._solve_every
            self._solve_every = min(2 * self._solve_every, max(SOLVE_EVERY[1], self._solve_every))
            self.solve()
            if self.habit.left:
                self._until_solution = STEPS_PLANNED
        self._until_solution -= 1
        if len(reach) > 1:
            chosen = self._best_together(reach, urgency)
        elif self._pays:
            chosen = [self._best(reach[0])]
        else:
            chosen = self._drafts_alone(reach, self._gained(reach, urgency))
        if not self._trials.due(any(self.shapes.hung[index] for index in chosen), max(remaining)):
            return [self.shapes.layouts[index] for index in chosen]
        self._until_solution = SETTLED
        most = max(FEWEST_TRIED, TRIED // self.sequences)  # of many sequences fewer tell as much
        most = most if self.experience.complete else self.masks
        return self._trial(Layout(1, (Block(0, min(most, self.masks)),)), len(chosen))

    def urgency(self, remaining: Sequence[int], refilled: bool) -> list[float]:
        """(B,): seconds that a token less to decode is worth in each sequence, 1 on average.

        A sequence that ends while others go on only makes their steps cheaper; without the one that ends last there
        would be none. Where texts stop before their limit, which that is can't be known; and if the batch is
        `refilled` all tokens are worth the same.
        """
        self._price()
        urgency = [1.0] * len(remaining)
        if refilled or len(remaining) == 1 or len(self.prices.shares) != len(remaining):
            return urgency
        known = 1 - self.experience.stopped
        order = sorted(range(len(remaining)), key=remaining.__getitem__, reverse=True)
        start = 0
        for _, rows in groupby(order, key=remaining.__getitem__):
            equal = list(rows)
            end = start + len(equal)
            share = sum(self.prices.shares[start:end]) / len(equal)
            for row in equal:
                urgency[row] += known * (share - 1.0)
            start = end
        return urgency

    def _best(self, reach: Sequence[float]) -> int:
        """The best shape for one sequence, for the chances that the first 0, 1, ... of its drafts hold.

        Of those that were best for any recent block: all of them are more than the processor has at hand.
        """
        states = len(reach)
        best = (self._scores[: self._few_ends[states - 1], :states] @ np.array(reach)).argmin()
        return int(self._few[best])

    def _best_together(self, reach: Sequence[Sequence[float]], urgency: Sequence[float]) -> list[int]:
        """The same for sequences that share a step: all pay for the most drafts and the most masks among them."""
        gained = self._gained(reach, urgency)
        if not (self._pays and self._hangs_masks):
            return self._drafts_alone(reach, gained)
        if all(gain <= dearer for gain, dearer in zip(gained[1:], self._dearer[1:], strict=False)):
            return [self._best([1.0])] * len(reach)
        shared = self.shapes.shared
        if self._of_shared is None:
            self._of_shared = shared.weights(self._weights), self.prices.table[:, self.shapes.totals]
        weights, seconds = self._of_shared
        # `value` sees one sequence that pays for the whole step: their mean is the step's.
        worth = weights @ ahead(reach, [weight / len(reach) for weight in urgency], self.masks + 1)  # (G, B)
        return shared.best(worth, int((seconds + shared.least(worth).sum(-1)).argmin()))

    def _gained(self, reach: Sequence[Sequence[float]], urgency: Sequence[float]) -> list[float]:
        """What verifying up to 0, 1, ... drafts gains, for the tokens that may be expected to hold."""
        gained, worth = [0.0], min(self.per_token, self.prices.resting)
        for r in range(1, max(map(len, reach))):
            held = sum(weight * own[r] for own, weight in zip(reach, urgency, strict=True) if len(own) > r)
            gained.append(gained[-1] + held * worth / len(reach))
        return gained

    def _drafts_alone(self, reach: Sequence[Sequence[float]], gained: Sequence[float]) -> list[int]:
        """The best shapes without masks, where only the number of drafts is to choose."""
        drafts = int((self.prices.table[: len(gained), 0] - gained).argmin())
        return [int(self.shapes.starts[min(drafts, len(own) - 1)]) for own in reach]

    def verifies(self, reach: Sequence[float]) -> tuple[int, float]:
        """How many drafts with these chances (n+1,) to verify of one sequence at rest, and the seconds beyond those of
        a plain step that this takes; such a step has to be planned for."""
        gained = self._gained([reach], [1.0])
        more = [0.0, *(seconds - self.prices.resting for seconds in self.prices.table[1 : len(gained), 0].tolist())]
        drafts = max(range(len(gained)), key=lambda drafts: gained[drafts] - more[drafts])
        return drafts, more[drafts]

    def begin_text(self) -> None:
        """A new text, or a batch of them, may be of another kind: try masks at once if plain decoding seems best; after
        some texts in which it did to their end, only at one of so many such beginnings."""
        self._in_vain = 0 if self._paid else self._in_vain + 1
        self._alike, self._paid_before = self._alike + 1 if self._paid == self._paid_before else 0, self._paid
        self._began_with = self.sequences
        grown = self.sequences > FEW and self.sequences >= APART * self._solved_for
        if self.habit.left and self.experience.alike and not grown and APART * self.sequences > self._solved_for:
            return
        self.habit.left = 0
        if grown:
            self._as_before()
        left = self._until_solution
        if self.sequences == 1 or not (self._solved and self._paid):
            self._solve_every = max(SOLVE_BATCH_EVERY, SOLVE_EVERY[0] // self.sequences)
        if self.sequences == 1 and self._solved:
            # Soon, then not so soon: earlier texts have told most of it, and many texts are short; not so soon either
            # where the last ones were of a kind.
            self._until_solution, self._solve_every = SETTLED, 2 * SOLVE_EVERY[0]
            if self._alike >= TEXTS and self.experience.alike:
                first, self._solve_every = self._seldom()
                self._until_solution = min(left, first)
            self._hope()
        self._trials.begin_text(not (self._in_vain * self.sequences >= TEXTS and self._in_vain % TEXTS))

    def _as_before(self) -> None:
        """A large batch begins as the last one of about its size was before it thinned out, so that it needs no
        solution at once."""
        if self._whole is not None:
            sequences, solution, pays = self._whole
            if sequences < APART * self.sequences and self.sequences < APART * sequences:
                self._take(solution, pays, sequences)

    def _hope(self) -> None:
        """Begins with the solution of the last texts' that promises most, where they differ: if this one is like that,
        each step until it shows would be lost, and if not, hardly one is."""
        self._price()
        self._ended.append(self._solution)
        best = min(self._ended, key=lambda solution: solution.share)
        if not self.experience.alike and best.value is not self.value:
            self._take(best, best.share < PAYS, self._solved_for)

    @property
    def _solution(self) -> Solution:
        return Solution(self.per_token / self.prices.resting, self.value, self._few, self.shapes)

    def _take(self, solution: Solution, pays: bool, sequences: int) -> None:
        """Goes on with an earlier one, for so many sequences, if it is one of these shapes."""
        self._price()
        if solution.shapes is self.shapes:
            self._solved_for = sequences
            self.per_token, self.value = solution.share * self.prices.resting, solution.value
            self._few, self._pays = solution.few, pays
            self._weigh()

    def _seldom(self) -> tuple[int, int]:
        """Steps before the first solution in a text like the last ones, and from it to the next: no sooner than what it
        takes is a small part of what is decoded meanwhile, so that a small model does not wait for it."""
        first, latest = SOLVE_EVERY
        seldom = min(SELDOM, max(first, math.ceil(self._solving / (SOLVING * self.prices.resting))))
        return seldom, max(seldom, latest)

    def rests(self, remaining: int) -> bool:
        """Whether neither planning nor masks promise to pay at the next step, nor is it time to try some, where a text
        may still get so many tokens; to be asked once before each step, which `layouts` does of one sequence."""
        if self._pays or self._apart(remaining) or not self._trials.rests(remaining):
            return False
        if self.experience.lookup.untaught >= UNTAUGHT:
            self.experience.lookup.learn()
        return True

    def rests_for(self, steps: int) -> int:
        """Of so many steps behind one at which it rests, how many it will rest at, too; nobody asks at those."""
        return self._trials.rests_for(steps)

    def _apart(self, remaining: int) -> bool:
        """Whether what pays may be another thing for as many sequences as there are now, one of which may still get so
        many tokens: fewer may gain what more did not, and more may lose what fewer gain."""
        thinned = self.sequences <= FEW and APART * self.sequences <= self._solved_for
        grown = self._pays and self.sequences >= APART * self._solved_for
        return remaining > SHORT and (thinned or grown)

    def wake(self) -> None:
        """There are signs that other steps pay now."""
        self._pays, self._until_solution = True, SETTLED

    @property
    def gain(self) -> float:
        """Tokens that the time of a plain step promises to give, above one."""
        return self.prices.resting / self.per_token - 1

    def probe_soon(self) -> None:
        """Hang masks at the next step, whether they seem worth it or not."""
        self._trials.soon()

    def took(
        self,
        layout: Layout,
        seconds: float,
        drafts: float = 0,
        drafting: float = 0.0,
        resting: bool = False,
        habit: Sequence[Layout] = (),
        width: float | None = None,
    ) -> None:
        """A step that was filled up to this layout took so long, `drafting` of it for so many drafts of a sequence on
        average. `resting`: nobody planned it; nor one of a habit, of these layouts of its sequences. `width`: rows of a
        sequence on average, if not all are the layout's."""
        kind = MASKS if layout.masks else DRAFTS if layout.regular > 1 else PLANNED
        kind = RESTING if resting else HABIT if habit else kind
        self.prices.took(kind, layout, seconds, drafts, drafting, width, habit)

    def _trial(self, layout: Layout, sequences: int) -> list[Layout]:
        """A step in which masks are tried, in this layout."""
        return [layout] * sequences

    def _correct_costs(self) -> None:
        """By what steps take, with which the solution changes as plain steps do."""
        scale = self.prices.correct()
        self.per_token, self.value = self.per_token * scale, self.value * scale
        table = self.prices.table
        self._problem = Problem(self.shapes, table[self.shapes.verified, self.shapes.hung], self.prices.drafting)
        self._dearer = (table - table[0]).min(1).tolist()  # (k+1,): what verifying d drafts adds, at least
        self.least_chance = self.prices.least_chance

    def solve(self) -> None:
        """Policy iteration over the recent blocks, going on from the last solution (docs/planner.md)."""
        begin = time.perf_counter()
        self._price()
        self._correct_costs()
        rounds, close = (ROUNDS, CLOSE) if self._solved else (FIRST_ROUNDS, FIRST_CLOSE)
        self._solved, self._solved_for = True, self.sequences
        self._improve(rounds, close)
        self._weigh()
        self._pays = self.per_token < PAYS * self.prices.resting
        self._find_habit()
        if 2 * self.sequences > self._began_with:  # the last texts of a batch are no measure of the next one
            self._paid = self._pays
            self._whole = self.sequences, self._solution, self._pays
        worth = self.value + self.prices.drafting
        self._hangs_masks = bool(worth.min() < 0)  # whether any block is worth its drafting
        self.solved_in = time.perf_counter() - begin
        self._solving = min(self._solving, self.solved_in)

    def _find_habit(self) -> None:
        """Whether the best rule that needs no planning is as good, for all that is known."""
        planning = self.habit.saves
        reach, found = self.experience.recent_reach()
        # Nobody would look for drafts of the text itself.
        repeats = found[:, 1:].sum() > REPEATS * reach[:, 1:].sum()
        known = planning is not None and self._solving < math.inf and self.experience.familiar
        if self.prices.ragged or repeats or not known:
            self.habit.end()
            return
        planning = (planning or 0.0) + self._solving / SOLVE_EVERY[1]
        seconds = self.prices.of_habit(planning)[self.shapes.verified, self.shapes.hung]
        promised = self.habit.solve(self._problem._replace(seconds=seconds), reach.mean(0))
        patience = self.habit.patience + min(LEAN, DEARER * planning / self.prices.resting)
        if promised < HABIT_PAYS * self.prices.resting and self.habit.dearer * promised < patience * self.per_token:
            self.habit.begin()
            self._pays = True
        else:
            self.habit.end()

    def kept(self, blind: bool, seconds: float, tokens: float) -> None:
        """A step, planned or a `blind` one of a habit, took so long and gave so many tokens a sequence."""
        if self.sequences == self._solved_for and (blind or self._pays):
            promised = tokens * (self.habit.per_token if blind else self.per_token)
            self.habit.kept(blind, seconds / self.prices.pace, promised)

    def keeps_habit(self) -> bool:
        """Whether the next step is one of a habit; to be asked once before each step.

        It outlasts sequences that leave a batch: for fewer, other layouts are best, but not by what it takes to solve
        for them again and again.
        """
        if self.sequences >= APART * self._solved_for:
            self.habit.left = 0  # a new batch, behind the last texts of another
        if self.habit.left == 0:
            return False
        self.habit.left -= 1
        return True

    def _improve(self, rounds: int, close: float) -> None:
        """So many rounds, or until one changes little."""
        # Sequences that share a step share its layout: what counts is the mean of as many.
        reach, found = (means(chances, self.sequences) for chances in self.experience.recent_reach())  # (N, k+1) each
        for _ in range(rounds):
            before = np.append(self.value, self.per_token)
            chosen, solved = self._problem.round(reach, found, self.value, self.per_token)
            self.value, self.per_token = value_of(solved)
            self._few = np.union1d(chosen, self.shapes.starts)
            if np.abs(before - np.append(self.value, self.per_token)).max() < close * self.per_token:
                break

    def _weigh(self) -> None:
        """What every shape is worth by the last solution."""
        self._weights = self._problem.worth(self.value, self.per_token)
        self._of_shared = None
        self._few_ends = self.shapes.verified[self._few].searchsorted(np.arange(self.masks + 1), side="right")
        self._scores = self._weights[self._few]
        self._scores[:, 0] += self._problem.seconds[self._few]  # the chance that no draft or more hold is 1
