"""How likely a draft holds: the sampler's own confidence, calibrated by what became of earlier drafts."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PRIOR_VARIANCE = {"bias": 1.0, "slope": 0.25, "place": 0.25}
DRIFT = 3e-4  # variance gained per block: what was learnt on another text fades
LIMIT = 6.0  # of a confidence's log-odds, about 0.25 %
ROUNDS = 3  # of fitting the same blocks
WINDOW = 32  # blocks whose confidences stand for those to come
TEXTS = 16  # whose ends tell how texts end
FIRST_GUESS = 0.6  # confidence of every draft before anything was seen


def log_odds(confidence: float) -> float:
    """Clipped."""
    if not 0 < confidence < 1:  # also NaN: half precision overflowed in the sampler
        return LIMIT if confidence >= 1 else -LIMIT
    return min(max(math.log(confidence / (1 - confidence)), -LIMIT), LIMIT)


class Calibration:
    """log-odds that draft j holds if those before it do = bias + place_j + slope · (log-odds of its confidence).

    A Bayesian logistic regression, fitted to some blocks at a time (Jaakkola and Jordan's variational bound: it never
    overshoots); its coefficients drift, so that it follows the text. It starts by believing the confidences.
    """

    def __init__(self, masks: int) -> None:
        self.masks = masks
        self.mean = np.zeros(masks + 2)  # bias, slope, places
        self.mean[1] = 1.0
        self._prior = np.array([PRIOR_VARIANCE["bias"], PRIOR_VARIANCE["slope"], *[PRIOR_VARIANCE["place"]] * masks])
        self.covariance = np.diag(self._prior)
        self._coefficients: list[float] = self.mean.tolist()
        self._news: list[tuple[Sequence[float], int]] = []
        self._reach: dict[tuple[float, ...], list[float]] = {}  # since learning last

    def chance(self, logit: float, place: int) -> float:
        """That draft `place`, from 0, holds if those before it do; for the log-odds of its confidence."""
        bias, slope = self._coefficients[:2]
        return 1 / (1 + math.exp(-bias - slope * logit - self._coefficients[2 + place]))

    def reach(self, logits: Sequence[float]) -> list[float]:
        """Log-odds of the confidences of drafts 1..n -> the chances that the first 0, 1, ... n hold."""
        known = self._reach.get(key := tuple(logits))  # those of the text's own drafts recur
        if known is None:
            known = [1.0]
            for place, logit in enumerate(logits):
                known.append(known[-1] * self.chance(logit, place))
            self._reach[key] = known
        return known

    def reaches(self, logits: Sequence[Sequence[float]]) -> Floats:
        """As `reach`, of many blocks of all k drafts at once: (N, k) -> (N, k+1)."""
        held = self.mean[0] + self.mean[1] * np.array(logits) + self.mean[2:]
        chances = np.ones((len(held), self.masks + 1))
        np.cumprod(1 / (1 + np.exp(-held)), axis=1, out=chances[:, 1:])
        return chances

    def decided(self, logits: Sequence[float], held: int) -> None:
        """Of drafts with these log-odds (n,) the first `held` held, and the next, if there is one, did not."""
        self._news.append((logits, held))

    def learn(self) -> None:
        """From all blocks decided since the last time."""
        blocks, self._news = self._news, []
        drafts = [
            (place, logit, place < held)
            for logits, held in blocks
            for place, logit in enumerate(logits[: held + 1])
        ]  # fmt: skip
        if not drafts:
            return
        places, logits, held = (np.array(column) for column in zip(*drafts, strict=True))
        features = np.zeros((len(drafts), self.masks + 2))
        features[:, 0], features[:, 1], features[np.arange(len(drafts)), 2 + places] = 1.0, logits, 1.0
        # Bounded: without news for long, ignorance doesn't exceed the prior's.
        variance = np.diag(self.covariance)
        grown = np.minimum(variance + DRIFT * len(blocks) * self._prior, np.maximum(variance, self._prior))
        precision = np.linalg.inv(self.covariance + np.diag(grown - variance))
        known = precision @ self.mean + (held - 0.5) @ features
        score = np.abs(features @ self.mean)
        for _ in range(ROUNDS):
            score = np.maximum(score, 1e-3)
            weight = np.tanh(score / 2) / (2 * score)
            self.covariance = np.linalg.inv(precision + (features.T * weight) @ features)
            self.mean = self.covariance @ known
            squares = (features @ (self.covariance + np.outer(self.mean, self.mean))) * features
            score = np.sqrt(squares.sum(1))
        self._coefficients = self.mean.tolist()
        self._reach.clear()


class Experience:
    """What decoding has taught: what the drafts of masks and of the text itself are worth, and what steps promised."""

    def __init__(self, masks: int) -> None:
        self.masks = masks
        self.calibration = Calibration(masks)
        self.lookup = Calibration(masks)  # its log-odds are those of `match_log_odds`
        self.stopped = 0.5  # share of the latest texts that ended before their limit
        self._recent: deque[list[float]] = deque(maxlen=WINDOW)  # of blocks, log-odds (k,); `WINDOW` of each sequence
        self._found: deque[list[float]] = deque(maxlen=WINDOW)  # of steps, log-odds (n,) of the text's own drafts

    def found(self, logits: list[float]) -> None:
        """After a step the text's own drafts had these log-odds (n,), n from 0."""
        self._found.append(logits)

    def made(self, confidences: Sequence[float]) -> list[float]:
        """A new block's confidences (n,) -> their log-odds, remembered as an example of what blocks promise."""
        logits = [log_odds(confidence) for confidence in confidences]
        # A block of fewer masks is taken to go on as it ends: its next drafts would be about as sure as its last.
        self._recent.append(logits + [logits[-1]] * (self.masks - len(logits)))
        return logits

    def ended(self, stopped: bool) -> None:
        """A text ended, before its limit if `stopped`."""
        self.stopped += (stopped - self.stopped) / TEXTS

    def begin_text(self, sequences: int = 1) -> None:
        """A new text, or so many, foretells nothing by itself yet. Recent blocks stay: they stand for what such texts
        promise."""
        self._found.clear()
        self._recent = deque(self._recent, maxlen=WINDOW * sequences)

    def recent_reach(self) -> tuple[Floats, Floats]:
        """Twice (N, k+1): the chances that the first 0..k drafts hold by all that is known now, of recent blocks and
        of the text's own drafts after the latest steps, 0 beyond their number.

        Side by side they stand for what comes: where every step hangs masks they are of the same places.
        """
        for calibration in (self.calibration, self.lookup):
            calibration.learn()
        recent = list(self._recent)[-WINDOW // 2 :] or [[log_odds(FIRST_GUESS)] * self.masks]
        # A batch's last blocks are those of its surest texts' ends: half of them from all phases of it.
        older = list(self._recent)[: -WINDOW // 2]
        recent = older[:: 2 * len(older) // WINDOW or 1] + recent
        nothing: list[list[float]] = [[]] * len(recent)
        found = np.zeros((len(recent), self.masks + 1))
        for row, logits in zip(found, [*nothing, *self._found][-len(recent) :], strict=True):
            row[: len(logits) + 1] = self.lookup.reach(logits)
        return self.calibration.reaches(recent), found
