"""How likely a draft holds: the sampler's own confidence, calibrated by what became of earlier drafts."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foretell.decoding.lookup import Looks

Floats = NDArray[np.float64]

PRIOR_VARIANCE = {"bias": 1.0, "slope": 0.25, "evidence": 0.25, "place": 0.25}
DRIFT = 3e-4  # variance gained per block: what was learnt on another text fades
LIMIT = 6.0  # of a confidence's log-odds, about 0.25 %
ROUNDS = 2  # of fitting the same blocks
WINDOW = 32  # blocks whose confidences stand for those to come
EARLIER = 4  # texts whose blocks do while a new one has told little
ALIKE = 0.2  # of the variance within a text, how much there is between texts: a first guess, worth `GUESSED` texts
GUESSED = 2
TELLING = 8  # blocks after which a text has told itself what it is like
FALL = -0.25  # of log-odds from draft to draft: a first guess, worth `GUESSED` blocks
TEXTS = 16  # whose ends tell how texts end
FIRST_GUESS = 0.6  # confidence of every draft before anything was seen


def log_odds(confidence: float) -> float:
    """Clipped."""
    if not 0 < confidence < 1:  # also NaN: half precision overflowed in the sampler
        return LIMIT if confidence >= 1 else -LIMIT
    return min(max(math.log(confidence / (1 - confidence)), -LIMIT), LIMIT)


class Calibration:
    """log-odds that draft j holds if those before it do = bias + place_j + slope · (log-odds of its confidence)
    + weight · (evidence for the whole block, as log-odds: 0 if there is none).

    A Bayesian logistic regression, fitted to some blocks at a time (Jaakkola and Jordan's variational bound: it never
    overshoots); its coefficients drift, so that it follows the text. It starts by believing the confidences.
    """

    def __init__(self, masks: int) -> None:
        self.masks = masks
        self.mean = np.zeros(masks + 3)  # bias, slope, weight of the evidence, places
        self.mean[1:3] = 1.0
        bias, slope, evidence, place = PRIOR_VARIANCE.values()
        self._prior = np.array([bias, slope, evidence, *[place] * masks])
        self.covariance = np.diag(self._prior)
        self._coefficients: list[float] = self.mean.tolist()
        self._news: list[tuple[Sequence[float], int, float]] = []
        self._reach: dict[tuple[float, ...], list[float]] = {}  # since learning last

    def chance(self, logit: float, place: int, evidence: float = 0.0) -> float:
        """That draft `place`, from 0, holds if those before it do; for the log-odds of its confidence."""
        bias, slope, weight = self._coefficients[:3]
        return 1 / (1 + math.exp(-bias - slope * logit - weight * evidence - self._coefficients[3 + place]))

    def reach(self, logits: Sequence[float], evidence: float = 0.0) -> list[float]:
        """Log-odds of the confidences of drafts 1..n -> the chances that the first 0, 1, ... n hold."""
        known = self._reach.get(key := (evidence, *logits))  # those of the text's own drafts recur
        if known is None:
            known = [1.0]
            for place, logit in enumerate(logits):
                known.append(known[-1] * self.chance(logit, place, evidence))
            self._reach[key] = known
        return known

    def reaches(self, logits: Sequence[Sequence[float]]) -> Floats:
        """As `reach`, of many blocks of all k drafts at once, without other evidence: (N, k) -> (N, k+1)."""
        held = self.mean[0] + self.mean[1] * np.array(logits) + self.mean[3:]
        chances = np.ones((len(held), self.masks + 1))
        np.cumprod(1 / (1 + np.exp(-held)), axis=1, out=chances[:, 1:])
        return chances

    def decided(self, logits: Sequence[float], held: int, evidence: float = 0.0) -> None:
        """Of drafts with these log-odds (n,) the first `held` held, and the next, if there is one, did not."""
        self._news.append((logits, held, evidence))

    @property
    def untaught(self) -> int:
        """Blocks decided since learning last."""
        return len(self._news)

    def learn(self) -> None:
        """From all blocks decided since the last time."""
        blocks, self._news = self._news, []
        drafts = [
            (place, logit, evidence, place < held)
            for logits, held, evidence in blocks
            for place, logit in enumerate(logits[: held + 1])
        ]  # fmt: skip
        if not drafts:
            return
        places, logits, evidence, held = (np.array(column) for column in zip(*drafts, strict=True))
        features = np.zeros((len(drafts), self.masks + 3))
        features[:, 0], features[:, 1], features[:, 2] = 1.0, logits, evidence
        features[np.arange(len(drafts)), 3 + places] = 1.0
        # Bounded: without news for long, ignorance doesn't exceed the prior's.
        variance = np.diag(self.covariance)
        grown = np.minimum(variance + DRIFT * len(blocks) * self._prior, np.maximum(variance, self._prior))
        covariance = self.covariance + np.diag(grown - variance)
        precision = np.linalg.inv(covariance)
        known = precision @ self.mean + (held - 0.5) @ features
        self.covariance = covariance
        for _ in range(ROUNDS):
            squares = (features @ (self.covariance + np.outer(self.mean, self.mean))) * features
            score = np.sqrt(np.maximum(squares.sum(1), 1e-6))
            weight = np.tanh(score / 2) / (2 * score)
            self.covariance = np.linalg.inv(precision + (features.T * weight) @ features)
            self.mean = self.covariance @ known
        self._coefficients = self.mean.tolist()
        self._reach.clear()


class Told(NamedTuple):
    """What a text's blocks promised: log-odds (k,) of each, and of the drafts that should hold the mean over blocks and
    the squares of the differences from it."""

    blocks: list[list[float]]
    mean: float
    squares: float


class Experience:
    """What decoding has taught: what the drafts of masks and of the text itself are worth, and what steps promised."""

    def __init__(self, masks: int) -> None:
        self.masks = masks
        self.calibration = Calibration(masks)
        self.lookup = Calibration(masks)  # of the text's own drafts: `Found.log_odds`, `Found.evidence`
        self.looks = Looks()
        # By how much the log-odds of draft j are beyond those of the one before, on average, and of how many blocks.
        self._falls, self._fell = [FALL] * masks, [GUESSED] * masks
        self.stopped = 0.5  # share of the latest texts that ended before their limit
        # Of blocks, log-odds (k,): of this text, or of those of a batch, and of each of the last ones.
        self._own: deque[list[float]] = deque(maxlen=WINDOW)
        self._told = 0  # blocks of this text, also those forgotten
        self._earlier: deque[Told] = deque(maxlen=EARLIER)
        self._apart = ALIKE  # variance between texts in units of that within one, of the drafts that should hold
        self.alike = False  # whether texts have lately been of a kind; those of a batch are taken for it
        self._found: deque[list[float]] = deque(maxlen=WINDOW)  # of steps, chances (n+1,) of the text's own drafts

    def found(self, reach: list[float]) -> None:
        """After a step these were the chances (n+1,) that the first 0..n of the text's own drafts hold, n from 0."""
        self._found.append(reach)

    def made(self, confidences: Sequence[float]) -> list[float]:
        """A new block's confidences (n,) -> their log-odds, remembered as an example of what blocks promise."""
        logits = [log_odds(confidence) for confidence in confidences]
        self._told += 1
        # A block of fewer masks is taken to go on as fuller ones did.
        whole = list(logits)
        for place in range(1, self.masks):
            if place < len(logits):
                self._falls[place] += (logits[place] - logits[place - 1] - self._falls[place]) / (self._fell[place] + 1)
                self._fell[place] = min(self._fell[place] + 1, WINDOW)
            else:
                whole.append(max(-LIMIT, whole[-1] + self._falls[place]))
        self._own.append(whole)
        return logits

    def ended(self, stopped: bool) -> None:
        """A text ended, before its limit if `stopped`."""
        self.stopped += (stopped - self.stopped) / TEXTS

    def begin_text(self, sequences: int = 1) -> None:
        """A new text, or so many, foretells nothing by itself yet. Earlier blocks stand for what such texts promise,
        until it has shown that itself; many at once show it soon, so that there each new one takes an earlier's place.
        """
        self._found.clear()
        many = sequences > 1
        if many and self._own and not self._told:  # nothing new: as the last batch found it
            self._own = deque(self._own, WINDOW * sequences)
            return
        if self._own:
            blocks = spread(list(self._own), min(len(self._own), WINDOW))
            promised = self.calibration.reaches(blocks).sum(1)
            self._earlier.append(Told(blocks, float(promised.mean()), float(promised.var()) * len(blocks)))
            self._apart = self._differ()
        self._own, self._told = deque(maxlen=WINDOW * sequences), 0
        self.alike = bool(self._earlier) if many else len(self._earlier) > 1 and self._apart < ALIKE
        if many:
            self._own.extend(block for text in self._earlier for block in text.blocks)
            self._earlier.clear()

    @property
    def complete(self) -> bool:
        """Whether a block of all masks was seen."""
        return self.masks == 1 or self._fell[-1] > GUESSED

    @property
    def familiar(self) -> bool:
        """Whether it is known what to expect of this text."""
        return self.alike or self._told >= TELLING

    def recent_reach(self) -> tuple[Floats, Floats]:
        """Twice (N, k+1): the chances that the first 0..k drafts hold by all that is known now, of blocks that stand
        for those to come and of the text's own drafts after the latest steps, 0 beyond their number.

        Side by side they stand for what comes: where every step hangs masks they are of the same places.
        """
        for calibration in (self.calibration, self.lookup):
            calibration.learn()
        own, earlier = list(self._own), [block for text in self._earlier for block in text.blocks]
        count = min(WINDOW, len(own))
        if earlier:
            # The best guess at a mean of which there are few examples, where those of like groups are known.
            count = round(WINDOW * self._told * self._apart / (1 + self._told * self._apart))
        if len(own) > count:  # a batch's last blocks are those of its surest texts' ends: half from all phases of it
            latest = own[len(own) - count // 2 :]
            own = spread(own[: len(own) - len(latest)], count - len(latest)) + latest
        blocks = spread(earlier, WINDOW - count) + spread(own, count)
        blocks = blocks or [[log_odds(FIRST_GUESS)] * self.masks]
        found = np.zeros((len(blocks), self.masks + 1))
        found[:, 0] = 1.0
        for row, reach in zip(found[::-1], reversed(self._found), strict=False):
            row[: len(reach)] = reach
        return self.calibration.reaches(blocks), found

    def _differ(self) -> float:
        """Variance between texts in units of that within one, by what was seen of the last ones."""
        texts, counts = len(self._earlier), [len(text.blocks) for text in self._earlier]
        within = sum(text.squares for text in self._earlier) / max(1, sum(counts) - texts)
        if texts < 2 or not within:
            return ALIKE
        middle = sum(text.mean for text in self._earlier) / texts
        variance = sum((text.mean - middle) ** 2 for text in self._earlier) / (texts - 1)
        between = max(0.0, variance / within - sum(1 / count for count in counts) / texts)
        return (between * (texts - 1) + ALIKE * GUESSED) / (texts - 1 + GUESSED)


def spread(blocks: list[list[float]], count: int) -> list[list[float]]:
    """So many of these (k,) in order, evenly from all: some left out, or some more than once; none of none."""
    return [blocks[number * len(blocks) // count] for number in range(count)] if blocks else []


def means(chances: Floats, count: int) -> Floats:
    """(N, k+1) -> (N - count + 1, k+1), or (1, k+1): of that many in a row, or of all."""
    count = min(count, len(chances))
    sums = np.cumsum(np.vstack([np.zeros_like(chances[:1]), chances]), axis=0)
    return (sums[count:] - sums[:-count]) / count
