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
LIMIT = 6.0  # of a confidence's logit, about 0.25 %
WINDOW = 32  # blocks whose confidences stand for those to come
OF_LAST_TEXT = 4  # of them are kept when a new text begins, which may be of another kind
FIRST_GUESS = 0.6  # confidence of every draft before anything was seen


def logit(confidence: Floats) -> Floats:
    """Clipped log-odds."""
    p = np.fmin(np.fmax(confidence, 1e-9), 1 - 1e-9)  # fmax passes over NaN: half precision overflowed in the sampler
    return np.clip(np.log(p) - np.log1p(-p), -LIMIT, LIMIT)


class Calibration:
    """log-odds that draft j holds if those before it do = bias + place_j + slope · (log-odds of its confidence).

    A Bayesian logistic regression, updated draft by draft with the Laplace approximation; its coefficients drift, so
    that it follows the text. It starts by believing the confidences.
    """

    def __init__(self, masks: int) -> None:
        self.masks = masks
        self.mean = np.zeros(masks + 2)  # bias, slope, places
        self.mean[1] = 1.0
        variance = [PRIOR_VARIANCE["bias"], PRIOR_VARIANCE["slope"], *[PRIOR_VARIANCE["place"]] * masks]
        self.covariance = np.diag(variance)
        self._drift = DRIFT * np.diag(variance)
        self._coefficients: list[float] = self.mean.tolist()

    def chances(self, logits: Floats) -> Floats:
        """Log-odds of confidences (..., n) of drafts 1..n -> the chance that each holds if those before it do."""
        score = self.mean[0] + self.mean[1] * logits + self.mean[2 : 2 + logits.shape[-1]]
        return 1 / (1 + np.exp(-score))

    def chance_of_all(self, confidences: Sequence[float]) -> float:
        """The chance that drafts 1..n of these confidences all hold: `chances` in plain Python, for every new draft."""
        bias, slope, *places = self._coefficients
        chance = 1.0
        for confidence, place in zip(confidences, places, strict=False):
            p = min(max(confidence, 1e-9), 1 - 1e-9) if confidence == confidence else 1e-9
            score = bias + slope * min(max(math.log(p / (1 - p)), -LIMIT), LIMIT) + place
            chance /= 1 + math.exp(-score)
        return chance

    def learn(self, logits: Floats, held: int) -> None:
        """The first `held` of the drafts with these log-odds (n,) held, and the next, if there is one, did not."""
        for place in range(min(held + 1, len(logits))):
            feature = np.zeros(self.masks + 2)
            feature[0], feature[1], feature[2 + place] = 1.0, logits[place], 1.0
            chance = 1 / (1 + math.exp(-float(feature @ self.mean)))
            spread = self.covariance @ feature
            weight = chance * (1 - chance)
            self.covariance -= np.outer(spread, spread) * (weight / (1 + weight * float(feature @ spread)))
            self.mean += self.covariance @ feature * ((place < held) - chance)
        # Bounded: without news for long, ignorance doesn't exceed the prior's.
        grow = np.diag(self.covariance) < np.diag(self._drift) / DRIFT
        self.covariance[grow, grow] += np.diag(self._drift)[grow]
        self._coefficients = self.mean.tolist()


class Experience:
    """What decoding has taught about a drafter: its calibration, and how sure its recent blocks were."""

    def __init__(self, masks: int) -> None:
        self.masks = masks
        self.calibration = Calibration(masks)
        self._recent: deque[Floats] = deque(maxlen=WINDOW)  # log-odds (k,)
        self.blocks = 0  # ever made

    def made(self, confidences: Floats) -> Floats:
        """A new block's confidences (n,) -> their log-odds, remembered as an example of what blocks promise."""
        logits = logit(confidences)
        self.blocks += 1
        # A block of fewer masks is taken to go on as it ends: its next drafts would be about as sure as its last.
        self._recent.append(np.concatenate([logits, np.full(self.masks - len(logits), logits[-1])]))
        return logits

    def begin_text(self) -> None:
        """Forgets most of what blocks of earlier texts were like; what confidences are worth stays."""
        while len(self._recent) > OF_LAST_TEXT:
            self._recent.popleft()

    def recent_chances(self) -> Floats:
        """(N, k): the chances of recent blocks' drafts, each if those before it hold."""
        recent = list(self._recent) or [logit(np.full(self.masks, FIRST_GUESS))]
        return self.calibration.chances(np.stack(recent))
