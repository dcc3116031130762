"""The steps that decoding takes over a text whose accepted drafts are known at every place (method.md section 4).

Where a step begins depends on how far the one before it came, so tokens per step is no mean over places: it is counted
by walking as decoding does. `accepted[t]`, for t = 0 .. T-1, is the number of leading drafts that hold in the block
made when t of the T new tokens stood before it; the base itself decides token t+1, the drafts are for t+2, t+3, ...
"""

from __future__ import annotations

from collections.abc import Sequence


def quadratic_steps(accepted: Sequence[int], masks: int) -> int:
    """Steps for the text when every step has drafts; the first step has none yet."""
    steps, place = 1, 0
    while place + 1 < len(accepted):  # place + 1 tokens are decided
        place += min(accepted[place], masks) + 1
        steps += 1
    return steps


def linear_steps(accepted: Sequence[int], masks: int) -> int:
    """Steps when a rejection costs the next drafts: the step after it decides one token and makes new ones."""
    steps, place = 1, 0
    while place + 1 < len(accepted):
        held = min(accepted[place], masks)
        place += held + 1
        steps += 1
        if held < masks and place + 1 < len(accepted):
            place += 1
            steps += 1
    return steps


STEPS = {"linear": linear_steps, "quadratic": quadratic_steps}


def acceptance_rate(texts: Sequence[Sequence[int]], strategy: str, masks: int) -> float:
    """Tokens per step over all texts together, prefill not counted, as `foretell bench` counts them."""
    return sum(map(len, texts)) / sum(STEPS[strategy](accepted, masks) for accepted in texts)
