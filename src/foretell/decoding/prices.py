"""What steps cost: as it was measured, corrected by what the latest of their kind have really taken."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foretell.decoding.calibration import Floats
from foretell.decoding.correction import CHAINS, Correction, Fit, Pace
from foretell.decoding.costs import Costs, Priced
from foretell.decoding.pausing import size_class
from foretell.layout import Layout

PLAIN_TIMED, TIMED = 4, 6  # steps that correct the costs of their kind, at least: plain ones are all alike
# Of plain steps without planning, of planned ones with neither drafts nor masks, drafts alone, masks; of a habit.
RESTING, PLANNED, DRAFTS, MASKS, HABIT = range(5)
# Times what planning takes by itself that it is guessed to cost a step, by the power of two of the sequences: of one
# more, as caches forget meanwhile; of many, whose steps it is the smallest part of, nothing until it was seen.
BESIDE = {0: 2, 1: 1, 2: 1}
WORTHWHILE = 0.008  # seconds of a plain step: to choose for every sequence takes up to 0.2 ms, twice the usual


class Prices:
    """Seconds of steps and of drafting, for blocks of up to k masks and as many sequences as share a step.

    table (k+1, k(k+1)+1): of a step that verifies d drafts and hangs M masks; drafting (k+1,): of making n drafts;
    resting: of a plain step without planning. Where sequences have rows of their own, `ragged`: without, with_masks,
    seconds of steps without masks and with some, by their rows beyond one of each sequence.
    """

    def __init__(self, costs: Costs, masks: int, own_rows: bool) -> None:
        """`own_rows`: sequences that share a step need not have as many rows each."""
        self.masks, self._own_rows = masks, own_rows
        self.sequences = 1
        # Of every kind; of steps with drafts or masks by the power of two of their sequences, as tables of few and of
        # many were measured each for itself.
        self._corrections: dict[tuple[int, int], Correction] = {}
        self._of_drafting = Correction(TIMED, CHAINS)  # of making drafts, by their number
        self._pace, self._taken = Pace(), 0  # steps
        self._widths = np.arange(1.0, masks + 2)[:, None] + np.arange(masks * (masks + 1) + 1)  # by drafts and masks
        self._priced: dict[int, Priced] = {}  # the last ones, by number of sequences
        self._fits: list[Fit | None] = []
        self._costs: Costs | None = None  # that hold from now on
        self._bare: tuple[Floats, Floats] | None = None  # `without` and `with_masks` as measured
        self.without = self.with_masks = np.zeros(1)
        self._hold(Priced(costs, costs.steps(masks), costs.drafting(masks), [1.0]))
        self.plain: Floats = self.measured[0, :1]  # (n,): seconds of a plain step of 1, 2, ... n sequences
        self.table, self.resting = self.measured, self.plain_seconds
        self.correct()

    def reprice(self, costs: Costs, plain: Floats) -> None:
        """From now on steps cost this, and plain ones (n,) of 1, 2, ... n sequences that, if n are decoded."""
        self.plain, self.sequences, self._costs = plain, len(plain), costs

    def renew(self) -> bool:
        """As `reprice` has said: a batch that thins out while nothing is planned has new costs at every other step.
        Whether there was anything to do; what it costs is then to be corrected."""
        if self._costs is None:
            return False
        costs, self._costs = self._costs, None
        known = self._priced.get(self.sequences)
        if known is None or known.costs is not costs:
            known = self._priced[self.sequences] = Priced.of(costs, self.plain, self.masks)
        self._hold(known)
        return True

    @property
    def plain_seconds(self) -> float:
        """Of a plain step, as measured."""
        return float(self.plain[-1])

    @property
    def ragged(self) -> bool:
        """Whether every sequence gets the layout that is best for it, whatever the others have."""
        return self._own_rows and self.sequences > 1 and self.plain_seconds >= WORTHWHILE

    def took(
        self,
        kind: int,
        layout: Layout,
        seconds: float,
        drafts: float,
        drafting: float,
        width: float | None = None,
        own: Sequence[Layout] = (),
    ) -> None:
        """A step of this kind that was filled up to this layout took so long, `drafting` of it for so many drafts of a
        sequence on average; `width`: rows of a sequence on average, if not all are the layout's; `own`: of a habit, the
        layouts of its sequences."""
        if kind == HABIT and self._costs is not None:
            return  # of fewer sequences, for which nobody has asked yet what they cost
        self._taken += 1
        usual = self._usual_drafting(drafts)
        if drafting > 0 and usual > 0:
            share = self._pace.usual(drafting / usual, drafts, None)
            self._of_drafting.took(drafts, share, self._taken)
            seconds -= drafting
        rows, expected = self._expected_of_all(own) if own else self._expected(layout, width)
        rows = rows if kind > PLANNED else self.sequences
        share = self._pace.usual(seconds / expected, rows, self._fits[kind])
        size = size_class(self.sequences) if kind > PLANNED else 0
        fewest = TIMED if kind > PLANNED else PLAIN_TIMED
        self._corrections.setdefault((kind, size), Correction(fewest)).took(rows, share, self._taken)

    def correct(self) -> float:
        """By what the latest steps took at the machine's usual pace; how many times as dear plain steps are then."""
        fits = [*map(self._fit, (RESTING, PLANNED, DRAFTS, MASKS, HABIT)), self._of_drafting.fit(self._taken)]
        if fits != self._fits:
            self._fits = fits
            self._refit()
        known, (resting, planned, *_) = self._usual, fits
        resting, planned = resting or planned or known, planned or resting or known
        plain_seconds = float(self.measured[0, 0]) * planned.at(self.sequences)
        # Planning costs nothing less; steps at rest come behind prompts and trials more often.
        self.resting = min(plain_seconds, float(self.measured[0, 0]) * resting.at(self.sequences))
        scale = plain_seconds / float(self.table[0, 0])
        self.table = self.measured * self._factors
        self.table[0, 0] = plain_seconds
        for axis in (0, 1) if self._falls else ():
            self.table[:, 1:] = np.maximum.accumulate(self.table[:, 1:], axis)
        self.drafting = np.maximum.accumulate(self._measured_drafting * self._drafting_factors)
        if self.ragged:
            self._correct_rows()
        return scale

    @property
    def pace(self) -> float:
        """How many times as long as usual all steps take at present."""
        return self._pace.level

    def of_habit(self, planning: float) -> Floats:
        """As `table`, of steps that nobody plans, which takes so long; a guess until some were timed, and when that is
        long ago: those of a busy minute would be refused for ever."""
        size = size_class(self.sequences)
        own = self._corrections.get((HABIT, size))  # of another number they say nothing
        habit = own.fit(self._taken) if own is not None and own.fresh(self._taken) else None
        if habit is not None:
            table = self.measured * habit.at_all(self._widths)
        else:
            table = self.table - BESIDE.get(size, 0) * planning
        table[0, 0] = self.resting
        return table

    @property
    def least_chance(self) -> float:
        """Of a first draft, below which neither it nor what comes behind it pays for its rows."""
        if self.ragged:
            more = (self.without[1 : self.masks + 1] - self.without[0]) * self.sequences
        else:
            more = (self.table - self.table[0]).min(1)[1:]
        return float((more / np.arange(1, self.masks + 1)).min()) / self.resting

    def _hold(self, known: Priced) -> None:
        self._known, self.measured, self._measured_drafting, self.shares = known
        self._as_lists = self.measured.tolist(), self._measured_drafting.tolist()
        self._bare = None

    def _fit(self, kind: int) -> Fit | None:
        """Of as many sequences or, where that is not known, of about as many."""
        own = size_class(self.sequences)
        sizes = sorted((size for of, size in self._corrections if of == kind), key=lambda size: abs(size - own))
        fits = (self._corrections[kind, size].fit(self._taken) for size in sizes)
        return next(filter(None, fits), None)

    def _usual_drafting(self, drafts: float) -> float:
        """Measured seconds of making so many."""
        seconds = self._as_lists[1]
        below = int(drafts)
        beyond = drafts - below
        return seconds[below] + beyond * (seconds[below + 1] - seconds[below]) if beyond else seconds[below]

    def _expected(self, layout: Layout, width: float | None) -> tuple[float, float]:
        """The rows of a sequence that count in such a step, and the seconds measured for it."""
        if layout.width == 1:
            return 1, self.plain_seconds
        if self.ragged and width is not None and self._bare is not None:
            seconds = self._bare[layout.masks > 0]
            return width, float(np.interp((width - 1) * self.sequences, np.arange(len(seconds)), seconds))
        return layout.width, self._as_lists[0][layout.regular - 1][layout.masks]

    def _expected_of_all(self, own: Sequence[Layout]) -> tuple[float, float]:
        """The same on average of these layouts, as a rule is solved for that is followed by all."""
        each = [self._expected(layout, None) for layout in own]
        return sum(rows for rows, _ in each) / len(own), sum(seconds for _, seconds in each) / len(own)

    def _refit(self) -> None:
        """Factors of all that is measured but plain steps, for any number of sequences."""
        *fits, drafting = self._fits
        known = next(filter(None, fits), Fit(0.0, 0.0, 0.0))
        # Busy machines slow all kinds of steps, idle ones not.
        self._usual = known = known._replace(level=max(known.level, 0.0), slope=0.0)
        self._usually = drafted, masked = [fit or known for fit in (fits[DRAFTS], fits[MASKS])]
        self._factors = masked.at_all(self._widths)
        self._factors[:, 0] = drafted.at_all(self._widths[:, 0])
        self._falls = masked.slope < 0  # perhaps faster with the width than what was measured rises
        self._drafting_factors = (drafting or known).at_all(np.maximum(np.arange(self.masks + 1), 1))

    def _correct_rows(self) -> None:
        if self._bare is None:
            self._bare = self._known.by_rows(self.sequences, self.masks)
        (bare, hanging), (drafted, masked) = self._bare, self._usually
        widths = 1 + np.arange(len(bare)) / self.sequences
        self.without, self.with_masks = bare * drafted.at_all(widths), hanging * masked.at_all(widths)
        self.without[0] = self.table[0, 0]
        for seconds in (self.without, self.with_masks):
            np.maximum.accumulate(seconds, out=seconds)
