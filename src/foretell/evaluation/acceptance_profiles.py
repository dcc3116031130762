"""Acceptance profiles: how likely the first drafts of a block are to hold, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from foretell.errors import ForetellError

Profile = tuple[float, ...]  # [j - 1]: S_j, chance that the first j drafts of a block all hold

# Tokens per step with 1 to 8 masks, quadratic and greedy, of an 8B model (method.md section 7).
ACCEPTANCE = {
    "gsm8k": (1.84, 2.58, 3.21, 3.75, 4.20, 4.60, 4.95, 5.22),
    "alpacaeval": (1.61, 1.97, 2.18, 2.31, 2.40, 2.45, 2.49, 2.52),
}


def from_acceptance(tokens_per_step: Sequence[float]) -> Profile:
    """The profile behind quadratic decoding's tokens per step with 1, 2, ... masks: each mask adds its S_j.

    Raises ForetellError if the differences are no profile (see `check_profile`).
    """
    columns = (1.0, *tokens_per_step)
    return check_profile([more - less for less, more in pairwise(columns)])


def check_profile(profile: Sequence[float]) -> Profile:
    """The profile as a tuple. Raises ForetellError unless its chances are within 0 and 1 and never rise."""
    bounds = (1.0, *profile, 0.0)
    if not profile or any(more > less + 1e-9 for less, more in pairwise(bounds)):
        raise ForetellError(f"a profile holds chances from 1 to 0 that never rise, not {list(profile)}")
    return tuple(profile)


def named_profile(name: str) -> Profile:
    """Raises ForetellError for a name that is not in ACCEPTANCE."""
    if name not in ACCEPTANCE:
        raise ForetellError(f"there is no profile {name!r}; known: {', '.join(ACCEPTANCE)}")
    return from_acceptance(ACCEPTANCE[name])
