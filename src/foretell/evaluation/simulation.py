"""The planner against a simulated model: drafts that hold by a known profile, steps of known cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foretell.decoding.calibration import Experience
from foretell.decoding.costs import MASKED_WIDTHS, REGULAR_WIDTHS, Costs
from foretell.decoding.planner import Planner
from foretell.evaluation.acceptance_profiles import check_profile
from foretell.evaluation.optimum import Cost

MUCH = 10**6  # tokens that a text may still get: the end never matters


def noisy_costs(masks: int, cost: Cost, noise: float, random: np.random.Generator) -> Costs:
    """What a planner would measure: cost at the widths it times, each off by a normal error of `noise` parts."""
    widest = (masks + 1) ** 2

    def timed(regular: int, hung: int) -> float:
        return cost(regular, hung) * float(np.exp(noise * random.standard_normal()))

    return Costs(
        regular={width: timed(width, 0) for width in REGULAR_WIDTHS if width <= masks + 1},
        masked={width: timed(1, width - 1) for width in {*MASKED_WIDTHS, widest} if 2 <= width <= widest},
        drafts={masks: 0.0},
    )


def simulate(
    profile: Sequence[float],
    cost: Cost,
    steps: int = 3000,
    *,
    informed: float = 0.0,
    cost_noise: float = 0.0,
    seed: int = 0,
) -> float:
    """Tokens per second of a planner that starts without any experience and must find costs and profile itself.

    The chance of draft j, if those before it hold, is that of `profile` on average. With `informed` 0 confidences say
    nothing (0.5); above, every draft's chance is drawn from a beta distribution with that standard deviation as a share
    of the greatest possible, and is its confidence.
    """
    profile = check_profile(profile)
    masks, random = len(profile), np.random.default_rng(seed)
    chances = np.array(profile) / np.array([1.0, *profile[:-1]])
    experience = Experience(masks)
    planner = Planner(noisy_costs(masks, cost, cost_noise, random), experience)
    logits: list[float] = []
    holding = 0  # of the drafts at hand: their confidences, and how many of them will hold
    tokens, seconds = 0, 0.0
    for _ in range(steps):
        (layout,) = planner.layouts([experience.calibration.reach(logits)], [MUCH])
        accepted = min(layout.regular - 1, holding)
        tokens, seconds = tokens + accepted + 1, seconds + cost(layout.regular, layout.masks)
        experience.calibration.decided(logits, holding)
        rows = layout.block_rows(accepted)
        made = 0 if rows is None else rows.stop - rows.start
        logits, holding = [], 0
        if made:
            own = chances[:made]
            if informed:
                weight = 1 / informed**2 - 1
                own = np.clip(random.beta(weight * own, weight * (1 - own)), 0.001, 0.999)
            holding = int(np.cumprod(random.random(made) < own).sum())
            logits = experience.made(own.tolist() if informed else [0.5] * made)
    return tokens / seconds
