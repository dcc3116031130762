"""Which layout next: the one of least expected seconds per token (docs/planner.md)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foretell.decoding.calibration import Experience, Floats
from foretell.decoding.costs import Costs
from foretell.layout import Block, Layout

SWEEPS = 3  # of value iteration per solution, each going on from the last
SOLVE_EVERY = (1, 16)  # steps between solutions, doubling from the first to the second
SETTLED = 4  # solutions after which nothing new is found, unless drafts were made in between
PROBE_EVERY = (8, 256)  # steps without masks before some are tried again, fourfold while that is in vain
PROBE_MASKS = 4  # the first drafts tell most


class Planner:
    """Chooses how many drafts to verify and how many masks to hang after each regular token, step by step.

    A renewal-reward problem: of all policies the one with the most tokens per second. Its state is the drafts at hand
    with their chances; `value[n]` is how many seconds n new drafts are worth less than none, averaged over the
    confidences of recent blocks, and `per_token` the seconds per token of the best policy. Both are solved for again
    and again while decoding goes on.
    """

    def __init__(self, costs: Costs, experience: Experience, stops_early: bool = False) -> None:
        """`stops_early`: drafting ends where drafts become unlikely (`floor`); for devices that need no waiting."""
        self.masks = masks = experience.masks
        self.experience = experience
        self.stops_early, self.floor = stops_early, 0.0
        self.seconds = costs.steps(masks)  # (k+1, k(k+1)+1): of a step by drafts verified and masks hung
        self._chain = np.diff(costs.drafting(masks))  # (k,): seconds of each draft of the sampler chain
        self.drafting = costs.drafting(masks)  # (k+1,): expected of a block of n masks
        self.value = np.zeros(masks + 1)
        self.per_token = float(self.seconds[0, 0])
        self._until_solution, self._solve_every = 0, SOLVE_EVERY[0]
        self._without_masks, self._probe_every = 0, PROBE_EVERY[0]
        self._without_drafts: Layout | None = None  # the best step where none is at hand, until the next solution
        self._solutions, self._blocks = 0, 0  # since drafts were made, and how many blocks there were then

    def layouts(self, drafts: Sequence[Floats], remaining: Sequence[int]) -> list[Layout]:
        """One layout per sequence, for log-odds of its drafts' confidences (m_b,) and the tokens it may still get.

        All verify at most one common number of drafts and hang at most one common number of masks.
        """
        self._solve_if_due()
        held = [min(len(own), left - 1) for own, left in zip(drafts, remaining, strict=True)]
        if not any(held):  # plain decoding mostly: nothing but the next solution can change this answer
            if self._without_drafts is None:
                (self._without_drafts,) = self._best([np.zeros(0)], [0])
            masks = self._without_drafts.masks
            probe = Layout(1, (Block(0, min(PROBE_MASKS, self.masks)),))
            return [probe if self._probe(masks) else self._without_drafts] * len(remaining)
        layouts = self._best(drafts, held)
        self._probe(layouts[0].width - 1)
        return layouts

    def _solve_if_due(self) -> None:
        if self._until_solution == 0:
            self._solve_every = min(2 * self._solve_every, SOLVE_EVERY[1])
            self._until_solution = self._solve_every
            if self.experience.blocks != self._blocks:
                self._solutions, self._blocks = 0, self.experience.blocks
            if self._solutions < SETTLED:
                self._solutions += 1
                self.solve()
                self._without_drafts = None
        self._until_solution -= 1

    def _best(self, drafts: Sequence[Floats], held: Sequence[int]) -> list[Layout]:
        """The layouts of least expected seconds, for sequences of which `held` drafts may be verified."""
        chances = np.zeros((len(drafts), self.masks))
        for row, own in enumerate(drafts):
            chances[row, : held[row]] = self.experience.calibration.chances(own)[: held[row]]
        most = max(held)
        reach = reached(chances[:, :most])
        gains = self._gains(exact(reach))
        order = np.argsort(-gains, axis=-1)
        worth = prefix_sums(np.take_along_axis(gains, order, -1))
        worth += self.per_token * np.cumsum(reach, axis=1)[..., None]  # (B, most+1, M+1): verifying d, hanging M
        # A sequence with fewer drafts verifies those it has: its further rows are filler.
        own_drafts = np.minimum(np.arange(most + 1), np.array(held)[:, None])  # (B, most+1)
        rows = np.arange(len(drafts))[:, None]
        # `worth` is in shares of a whole batch's step, as `solve` sees one sequence alone: their mean is the step's.
        scores = self.seconds[: most + 1, : worth.shape[-1]] - worth[rows, own_drafts].mean(0)
        verified, hung = np.unravel_index(int(scores.argmin()), scores.shape)
        result = []
        for row in range(len(drafts)):
            d = int(own_drafts[row, verified])
            counts = np.bincount(order[row, d, :hung] // self.masks, minlength=d + 1)
            blocks = tuple(Block(after, int(count)) for after, count in enumerate(counts[: d + 1]) if count)
            result.append(Layout(d + 1, blocks))
        return result

    def begin_text(self) -> None:
        """A new text may be of another kind: plan anew, and try masks at once if plain decoding seems best."""
        self._until_solution = self._solutions = 0
        self._solve_every = SOLVE_EVERY[0]
        self._without_masks = self._probe_every = PROBE_EVERY[0]

    def _probe(self, more: int) -> bool:
        """Whether to hang masks although plain decoding seems best: what is never tried is never seen to get better."""
        if more:
            self._without_masks, self._probe_every = 0, PROBE_EVERY[0]
            return False
        self._without_masks += 1
        if self._without_masks < self._probe_every:
            return False
        self._without_masks, self._probe_every = 0, min(4 * self._probe_every, PROBE_EVERY[1])
        return True

    def solve(self, sweeps: int = SWEEPS) -> None:
        """Relative value iteration over the recent blocks, going on from the last solution (docs/planner.md)."""
        reach = reached(self.experience.recent_chances())
        if self.stops_early:
            # A draft is worth a token's seconds times the chance that it is reached, and those after it once more.
            self.floor = float(self._chain.mean()) / self.per_token / 2
            made = (reach[:, :-1] >= self.floor).mean(0)
            self.drafting = np.append(0.0, np.cumsum(self._chain * made))
        tokens = np.cumsum(reach, axis=1)  # (N, k+1) expected of a step that verifies d drafts
        exactly = exact(reach)
        for _ in range(sweeps):
            gains = -np.sort(-self._gains(exactly), axis=-1)
            best = (self.seconds - prefix_sums(gains)).min(-1) - self.per_token * tokens
            value = np.minimum.accumulate(best, axis=1).mean(0)  # with n drafts at hand up to n may be verified
            # Too large a step would swing: no step decides more tokens than this.
            self.per_token += value[0] / float(tokens[:, -1].mean())
            self.value = (self.value + value - value[0]) / 2  # half a step: whole ones may swing between states

    def _gains(self, exactly: Floats) -> Floats:
        """(N, D+1, D+1) of `exact` -> (N, D+1, (D+1)k): seconds that one more mask at token index // k saves.

        Its share of the value of new drafts, times the chance that exactly r drafts hold. Shares never grow with the
        mask's number, so the M best gains are those of the M masks best hung.
        """
        shares = -np.diff(lower_hull(self.value + self.drafting))  # (k,)
        return (exactly[..., None] * shares).reshape(*exactly.shape[:2], -1)


def prefix_sums(gains: Floats) -> Floats:
    """(..., n) -> (..., n+1): of the first 0, 1, ... n."""
    sums = np.zeros((*gains.shape[:-1], gains.shape[-1] + 1))
    np.cumsum(gains, axis=-1, out=sums[..., 1:])
    return sums


def reached(chances: Floats) -> Floats:
    """(N, k) chances of each draft if those before hold -> (N, k+1): that the first d hold, d = 0..k."""
    return np.concatenate([np.ones((len(chances), 1)), np.cumprod(chances, axis=1)], axis=1)


def exact(reach: Floats) -> Floats:
    """(N, D+1) of `reached` -> (N, D+1, D+1): [., d, r] the chance that exactly r drafts hold when d are verified."""
    verified, held = np.ogrid[: reach.shape[1], : reach.shape[1]]
    fails = np.append(reach[:, :-1] - reach[:, 1:], np.zeros((len(reach), 1)), axis=1)
    return np.where(held < verified, fails[:, None], np.where(held == verified, reach[:, None], 0.0))


def lower_hull(values: Floats) -> Floats:
    """The greatest convex sequence below `values` (n,)."""
    corners = [0]
    for index in range(1, len(values)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (values[b] - values[a]) * (index - a) < (values[index] - values[a]) * (b - a):
                break
            corners.pop()
        corners.append(index)
    return np.interp(np.arange(len(values)), corners, values[corners])
