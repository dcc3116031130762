"""Whether several tokens per step pay at all here: adaptive decoding should never be slower than plain decoding."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence

FIRST = 9  # plain steps that tell what such a step takes, before anything else
COLD = 4  # of a pause: steps behind a prompt or those of another kind take up to half as long again
LATEST = 16  # plain steps whose mean counts
DISTURBED = 1.5  # times the median of them: more counts for nothing
RENEWED = 512  # steps without a pause after which plain steps are timed again
TRIAL = 3  # steps before a pause, at least
SURE = 1.5  # standard deviations, roughly, that losses must be away from none
EXPECTED = 4.0  # squared plain steps: what one step may well gain that nothing has been seen of yet
BELIEVED = 6  # plain steps' time of what the planner promises that losses must outweigh; half as many after a failure
PAUSES = (32, 1024)  # steps: the first, and the longest; each is `LONGER` times as long as the last, while trials fail
LONGER = 4
WOKEN_BY = 6  # first drafts of the text itself that would have held in a row: it has begun to repeat itself
IN_NEW_TEXT = 1 / 4  # of a pause, how long it goes on for at most in a new text, which may be of another kind
FADES = 1 - 1 / 64  # weight of the sums below from step to step
ACQUITTED = 1 / 2  # of the losses that made for a pause: if no more are left by plain steps timed anew, it is over
NEWEST = 1 / 2  # weight of the last batch in what tokens of such a batch are worth


class Pause:
    """Compares steps that look for drafts, plan and learn with plain steps that do nothing of the kind, both by the
    clock, and pauses the former where they lose.

    It trusts no table and no calibration, so that whatever they get wrong costs little. A trial ends once its losses,
    against plain steps for the tokens it gave, outweigh what chance makes of them; and goes on after all if plain steps
    turn out to have become slower, too, since they were timed.
    """

    def __init__(self) -> None:
        # Of plain steps, by the power of two of their sequences: seconds taken, as a share of those measured.
        self._plain: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=LATEST))
        self._paused, self._left = False, 0  # whether, and for how many steps
        self._rested = 0  # since it began
        self.ended = False  # whether a pause was over by itself when `paused` was asked last
        self._woken = 0  # times that a pause ended early, in this text or since one ended by itself
        self._for_text = PAUSES[0]
        self._failed = 0  # trials, since one went well
        self._since_pause = 0
        self._worth: dict[int, float] = {}  # of a token in batches that are not refilled, by power of two
        # Of a trial: whether the first step of it or of a text is over, the other steps, and sums over them.
        self._warm, self._steps, self._lost, self._squares = False, 0, 0.0, 0.0
        self._spent = 0.0  # of what was lost: plain steps that the time would have been enough for
        # Of a pause that losses began: what a plain step was taken for, and what the first ones take, of so many
        # sequences.
        self._believed = 1.0
        self._timed_anew: list[tuple[int, float]] | None = None

    def begin_text(self, sequences: int) -> None:
        """Before the first step of one or more texts."""
        self._woken = 0
        if len(self._plain[size_class(sequences)]) < FIRST - COLD:
            self._pause(FIRST)
        elif self._paused:
            self._left = min(self._left, self._for_text)
        else:
            self._warm = False  # short texts alone would never lose enough: the trial goes on

    def paused(self) -> bool:
        """Whether the next step should be a plain one without anything else; to be asked once before each step."""
        if not self._paused and self._since_pause >= RENEWED:
            self._pause(FIRST)
        self.ended = self._paused and self._left == 0
        if self.ended:
            self._paused, self._woken = False, 0
            self._try_anew()
        elif self._paused:
            self._left -= 1
        return self._paused

    @property
    def cold(self) -> bool:
        """Whether the last step was too soon to tell what plain steps take."""
        return self._paused and self._rested <= COLD

    def pass_over(self, steps: int) -> int:
        """Of so many steps of a pause how many need not be asked about; none while plain steps are timed."""
        steps = min(steps, self._left) if self._rested >= FIRST else 0
        self._left -= steps
        return steps

    def foretold(self, run: int) -> bool:
        """Nothing was looked for, and so many drafts in a row would have held; whether that ends a pause. Should the
        trial fail nevertheless, it takes twice as many the next time."""
        if run < WOKEN_BY << self._woken:
            return False
        self._woken += 1
        if self._paused:
            self._paused = False
            self._try_anew()
        return True

    def worth(self, sequences: int) -> float:
        """Plain steps that a token counted by `worked` saves, in batches that are not refilled: see `Batch`."""
        return self._worth.get(size_class(sequences), 1.0)

    def learn_worth(self, sequences: int, worth: float) -> None:
        """What it was in such a batch."""
        before = self._worth.get(size_class(sequences), worth)
        self._worth[size_class(sequences)] = before + NEWEST * (worth - before)

    def rested(self, sequences: int, share: float) -> None:
        """A plain step during a pause took this share of the seconds measured for it."""
        self._rested += 1
        if self._rested <= COLD:
            return
        self._plain[size_class(sequences)].append(share)
        if self._timed_anew is None:
            return
        self._timed_anew.append((sequences, share))
        if len(self._timed_anew) == FIRST - COLD:
            self._judge_again(self._timed_anew)
            self._timed_anew = None

    def began(self) -> None:
        """A step other than a plain one, whose seconds don't count: it found no drafts, and made some for the next."""
        self._since_pause, self._warm = self._since_pause + 1, True

    def worked(self, sequences: int, share: float, tokens: float, gain: float = 0.0) -> None:
        """Another step took so many times the seconds measured for a plain one, and gave so many tokens a sequence.

        `gain`: tokens that the planner promises for the time of a plain step, above one.
        """
        if not self._warm:
            return self.began()
        self._since_pause += 1
        believed = self._plain_share(sequences)
        spent, lost = share / believed, share / believed - tokens  # in plain steps
        self._steps += 1
        self._spent = FADES * self._spent + spent
        self._lost = FADES * self._lost + lost
        self._squares = FADES * self._squares + lost**2
        if self._steps < TRIAL:
            return
        chance = SURE * math.sqrt(self._squares + EXPECTED / sequences)
        if self._lost - (BELIEVED >> self._failed) * gain > chance:
            steps = min(PAUSES[0] * LONGER**self._failed, PAUSES[1])
            self._failed, self._for_text = self._failed + 1, int(IN_NEW_TEXT * steps)
            self._pause(steps)
            self._believed, self._timed_anew = believed, []
        elif self._lost < -chance or (self._steps >= PAUSES[0] and self._lost < 0):
            self._failed = 0

    def _judge_again(self, timed: list[tuple[int, float]]) -> None:
        """Plain steps at the beginning of a pause, of so many sequences, took these shares of the seconds measured."""
        slower = sorted(share for _, share in timed)[len(timed) // 2] / self._believed
        lost = self._lost - self._spent * (1 - 1 / slower)
        if lost > ACQUITTED * self._lost:
            return
        self._paused, self._failed = False, self._failed - 1
        self._lost, self._spent = lost, self._spent / slower
        self._plain.clear()
        for sequences, share in timed:
            self._plain[size_class(sequences)].append(share)

    def _plain_share(self, sequences: int) -> float:
        own = size_class(sequences)
        known = [size for size, shares in self._plain.items() if shares]
        if not known:
            return 1.0
        shares = sorted(self._plain[min(known, key=lambda size: abs(size - own))])
        usual = [share for share in shares if share < DISTURBED * shares[len(shares) // 2]]
        return sum(usual) / len(usual)

    def _pause(self, steps: int) -> None:
        self._paused, self._left, self._since_pause, self._timed_anew, self._rested = True, steps, 0, None, 0

    def _try_anew(self) -> None:
        self._warm, self._steps, self._lost, self._squares, self._spent = False, 0, 0.0, 0.0, 0.0
        self._timed_anew = None


class Batch:
    """A batch that is not refilled, from its first step on: what its tokens were worth shows when all have ended.

    Step by step a token is taken for its share of a plain step. But the batch takes as long as its longest text, and a
    step of a few sequences hardly less than one of many, so tokens of the texts that end early save next to nothing.
    """

    def __init__(self, plain: Sequence[float]) -> None:
        """plain (n,): seconds of plain steps of 1, 2, ... n sequences."""
        self.plain = [float(seconds) for seconds in plain]
        self.lengths: list[int] = []  # of the texts that have ended
        self.rested, self.worked = 0.0, 0.0  # seconds of plain steps that paused and other steps were counted as

    def step(self, sequences: int, tokens: float, paused: bool) -> None:
        """A step gave so many tokens a sequence."""
        seconds = self.plain[sequences - 1] * tokens
        if paused:
            self.rested += seconds
        else:
            self.worked += seconds

    @property
    def whole(self) -> bool:
        """Whether all texts have ended."""
        return len(self.lengths) == len(self.plain)

    @property
    def worth(self) -> float | None:
        """Seconds that plain decoding would have taken for the tokens of steps that were not paused, as a share of
        what they were counted as; None if those were less than half of it all."""
        if self.worked <= self.rested:
            return None
        steps = zip(sorted(self.lengths), [0, *sorted(self.lengths)], range(len(self.plain), 0, -1), strict=False)
        seconds = sum((length - before) * self.plain[sequences - 1] for length, before, sequences in steps)
        return max(0.0, seconds - self.rested) / self.worked


def size_class(sequences: int) -> int:
    """0 for one, 1 for two, 2 for three and four, and so on."""
    return (sequences - 1).bit_length()
