"""Drafts from the text itself: what followed its last tokens where they stood in it before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

SIZES = (2, 1)  # last tokens by which earlier places are found, the first size that finds any
TRIED = 8  # of these places, the latest ones, that are compared
LONGEST = 32  # tokens: a longer match says no more


class Found(NamedTuple):
    """Drafts, and how many of the text's last tokens stood before them."""

    drafts: list[int]
    matched: int


class TextLookup:
    """Finds the last tokens of one growing text earlier in it.

    Prompt lookup (n-gram) decoding, as a second source of drafts beside the masks: it costs no row of any step.
    """

    def __init__(self) -> None:
        self._behind: dict[tuple[int, ...], list[int]] = {}  # places behind tokens and pairs of tokens
        self._read = 1  # places known, but for the first

    def find(self, text: Sequence[int], most: int) -> Found:
        """Up to `most` drafts after `text`, which begins with the text of the last call; none if nothing matches.

        Of the latest places behind the same last two tokens, or one, the one with the longest match. Where that
        overlaps the end of the text, its period goes on.
        """
        for place in range(self._read, len(text)):
            for size in SIZES:
                if size <= place:
                    self._behind.setdefault(tuple(text[place - size : place]), []).append(place)
        self._read = max(self._read, len(text))
        places = (self._behind.get(tuple(text[-size:])) for size in SIZES)
        best, longest = 0, 0
        for place in reversed((next(filter(None, places), None) or [])[-TRIED:]):
            matched = 1
            while matched < min(LONGEST, place) and text[place - 1 - matched] == text[-1 - matched]:
                matched += 1
            if matched > longest:
                best, longest = place, matched
        if not longest or most < 1:
            return Found([], 0)
        period = len(text) - best
        return Found([text[best + number % period] for number in range(most)], longest)


def match_log_odds(drafts: Sequence[int], matched: int) -> list[float]:
    """What a match of so many tokens promises for each of its drafts, before experience corrects it.

    Odds of n : 2 for n tokens; each draft that holds makes the match longer.
    """
    return [math.log((matched + number) / 2) for number in range(len(drafts))]
