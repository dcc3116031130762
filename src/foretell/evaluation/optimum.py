"""The exact optimum of the choice of layouts: what no planner can beat, given costs and an acceptance profile.

Decoding is a semi-Markov decision process. The state is the number m of drafts at hand. A step verifies d <= m of them
and hangs n_r masks after each regular token r = 0..d; that is a layout. If a drafts hold it yields a + 1 tokens and
leaves n_a drafts at hand. What is maximised is tokens per second in the long run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foretell.errors import ForetellError
from foretell.evaluation.acceptance_profiles import check_profile
from foretell.layout import Block, Layout, linear, plain, quadratic

Cost = Callable[[int, int], float]  # R regular rows and M masks -> seconds of a step
DraftCost = Callable[[int], float]  # masks in the surviving block -> seconds of making its drafts
Policy = tuple[Layout, ...]  # [m]: the layout of a step with m drafts at hand
Array = NDArray[np.float64]

PRECISION = 1e-9  # relative, of the rate
SWEEPS = 100_000


@dataclass(frozen=True)
class Optimum:
    """`rate` in tokens per second is that of `policy`, and no policy has a higher one."""

    rate: float
    policy: Policy


def free(masks: int) -> float:
    """A `DraftCost` of nothing."""
    return 0.0


def by_width(seconds: Mapping[int, float]) -> Cost:
    """Seconds at some widths R + M -> cost at every width between them, on straight lines.

    Raises ForetellError for a table without positive seconds, and on a call for a width outside the table.
    """
    if not seconds or min(seconds.values()) <= 0:
        raise ForetellError("a table of costs needs at least one width, and seconds above 0 at each")
    widths = sorted(seconds)
    values = [seconds[width] for width in widths]

    def cost(regular: int, masks: int) -> float:
        width = regular + masks
        if not widths[0] <= width <= widths[-1]:
            raise ForetellError(f"the table of costs covers widths {widths[0]} to {widths[-1]}, not {width}")
        return float(np.interp(width, widths, values))

    return cost


def optimum(profile: Sequence[float], cost: Cost, draft_cost: DraftCost = free) -> Optimum:
    """The best policy with up to k = len(profile) masks a block, and its rate.

    Dinkelbach: with seconds priced at the rate g of the best policy so far, a policy that gains more tokens than its
    seconds are worth has a higher rate; when there is none, g is the optimum. Any state leads to any other (verify
    nothing, hang that many masks), so the best gain is the same from all of them and value iteration finds it.
    Raises ForetellError for chances that are no profile.
    """
    profile = check_profile(profile)
    process = _Process(profile, cost, draft_cost)
    policy: Policy = (plain(),) * (len(profile) + 1)
    best = rate(policy, profile, cost, draft_cost)
    while True:
        challenger = process.best_policy(best)
        found = rate(challenger, profile, cost, draft_cost)
        if found <= best * (1 + PRECISION):
            return Optimum(best, policy)
        policy, best = challenger, found


def rate(policy: Policy, profile: Sequence[float], cost: Cost, draft_cost: DraftCost = free) -> float:
    """Tokens per second in the long run of a policy that starts without drafts.

    Raises ForetellError if a layout verifies more drafts than are at hand or a block holds more masks than there are
    states.
    """
    states = len(policy)
    moves, tokens, seconds = np.zeros((states, states)), np.zeros(states), np.zeros(states)
    for m, layout in enumerate(policy):
        masks = block_sizes(layout)
        if layout.regular - 1 > m or max(masks) >= states:
            raise ForetellError(f"{layout.regular - 1} drafts verified with {m} at hand, masks {masks}: no such policy")
        chances = ends(profile, layout.regular - 1)
        for accepted, (chance, left) in enumerate(zip(chances, masks, strict=True)):
            moves[m, left] += chance
            tokens[m] += chance * (accepted + 1)
            seconds[m] += chance * draft_cost(left)
        seconds[m] += cost(layout.regular, layout.masks)
    # Lingering in every state half of the time changes no long-run share and makes the shares converge.
    shares = (moves + np.eye(states)) / 2
    for _ in range(64):
        shares = shares @ shares
        shares /= shares.sum(1, keepdims=True)
    return float(shares[0] @ tokens / (shares[0] @ seconds))


def fixed_rate(strategy: str, masks: int, profile: Sequence[float], cost: Cost, draft_cost: DraftCost = free) -> float:
    """Tokens per second of always "autoregressive", "linear" or "quadratic" with `masks` masks.

    Raises ForetellError for another strategy, and for more masks than the profile has chances.
    """
    profile = check_profile(profile)
    if not 1 <= masks <= len(profile):
        raise ForetellError(f"masks must be 1 to {len(profile)}, the length of the profile, not {masks}")
    if strategy == "autoregressive":
        policy: Policy = (plain(),)
    elif strategy in ("linear", "quadratic"):
        layout = linear if strategy == "linear" else quadratic
        policy = tuple(layout(m, masks) for m in range(masks + 1))
    else:
        raise ForetellError(f"strategy must be autoregressive, linear or quadratic, not {strategy!r}")
    return rate(policy, profile, cost, draft_cost)


def ends(profile: Sequence[float], drafts: int) -> list[float]:
    """[a]: chance that exactly a of `drafts` verified drafts hold."""
    reached = [1.0, *profile[:drafts], 0.0]
    return [reached[a] - reached[a + 1] for a in range(drafts + 1)]


def block_sizes(layout: Layout) -> list[int]:
    """[r]: masks hung after regular token r, 0 where no block hangs."""
    masks = dict(layout.blocks)
    return [masks.get(r, 0) for r in range(layout.regular)]


class _Process:
    """The decision process with its costs in tables, for `optimum`."""

    def __init__(self, profile: Sequence[float], cost: Cost, draft_cost: DraftCost) -> None:
        self.profile = profile
        self.k = k = len(profile)
        self.seconds = [np.array([cost(d + 1, total) for total in range((d + 1) * k + 1)]) for d in range(k + 1)]
        self.draft_seconds = np.array([draft_cost(masks) for masks in range(k + 1)])
        self.tokens = np.cumsum([1.0, *profile])  # [d]: expected of a step that verifies d drafts

    def best_policy(self, price: float) -> Policy:
        """Maximises tokens - price * seconds per step: value iteration until every state's gain is nearly the same."""
        values = np.zeros(self.k + 1)
        for _ in range(SWEEPS):
            steps = [self.best_step(d, price, values) for d in range(self.k + 1)]
            best = np.maximum.accumulate([value for value, _ in steps])  # with m at hand, any d <= m
            gains = best - values
            if np.ptp(gains) < PRECISION:
                break
            values = values + gains / 2  # half a step: whole ones may swing for ever between two states
            values -= values[0]
        else:
            raise ForetellError("the optimum was not found: value iteration did not settle; are the costs finite?")
        return tuple(steps[int(np.argmax([value for value, _ in steps[: m + 1]]))][1] for m in range(self.k + 1))

    def best_step(self, drafts: int, price: float, values: Array) -> tuple[float, Layout]:
        """Value and layout of the best step that verifies exactly `drafts`: a knapsack over masks, block by block."""
        worth = values - price * self.draft_seconds  # [n]: of having n drafts made
        held: Array = np.zeros(1)  # [total]: best worth of the blocks so far with so many masks together
        choices = []
        for chance in ends(self.profile, drafts):
            # Row n: n masks in this block and total - n in those before.
            options = np.full((self.k + 1, len(held) + self.k), -np.inf)
            for n in range(self.k + 1):
                options[n, n : n + len(held)] = held + chance * worth[n]
            choices.append(options.argmax(0))
            held = options.max(0)
        scores = held - price * self.seconds[drafts]
        total = int(scores.argmax())
        value = float(self.tokens[drafts] + scores[total])
        blocks = []
        for after in reversed(range(drafts + 1)):
            n = int(choices[after][total])
            total -= n
            if n:
                blocks.append(Block(after, n))
        return value, Layout(drafts + 1, tuple(reversed(blocks)))
