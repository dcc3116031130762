"""Drafts from the text itself: what followed its last tokens where they stood in it before."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

TRIED = 8  # earlier places that are compared, the latest ones behind the same last two tokens or, without any, one
SOUGHT = 128  # places behind the same last token that are looked through for them
LONGEST = 32  # tokens: a longer match says no more
REMEMBERED = 0.95  # weight of what became of earlier first drafts, from one to the next
FADES = 1 - 1 / 64  # weight of what looks gained and took, from one to the next
FIRST_GUESS = 4.0  # tokens that looks have gained, before any did
SELDOM = 4  # steps of which one looks while that is not worth its time; at rest of twice as many
DOUBT = 3.0  # first drafts that fail, before any was seen


class Found(NamedTuple):
    """Drafts, how many of the text's last tokens stood before them, and how many first drafts of this text held and
    did not hold before, the latest counting most."""

    drafts: list[int]
    matched: int
    held: float = 0.0
    failed: float = 0.0

    def log_odds(self, number: int) -> float:
        """What the match promises for draft `number`, from 0, before experience corrects it: odds of n : 3 for a match
        of n tokens; each draft that holds makes it longer."""
        return math.log((self.matched + number) / DOUBT)

    def evidence(self) -> float:
        """What first drafts of this text that held or failed say, as log-odds: a text that has begun to repeat itself
        goes on with it."""
        return math.log((1 + self.held) / (DOUBT + self.failed))


class Looks:
    """Whether looking for a text's own drafts has lately been worth the time that it takes.

    Counted is what steps with such drafts accepted beyond what they would have without. What drafts promise is no
    measure: they are taken where they promise more than others, that is, where their promise flatters most.
    """

    def __init__(self) -> None:
        # What the latest looks gained, to begin with by a guess, and took.
        self._tokens, self._seconds = FIRST_GUESS, 0.0
        self._passed_over = 0

    def pays(self, token: float) -> bool:
        """Whether it did, where a token is worth so many seconds."""
        return self._tokens * token >= self._seconds

    def due(self, token: float) -> bool:
        """Whether to look at this step: now and then also in vain."""
        if self.pays(token):
            return True
        self._passed_over += 1
        return self._passed_over % SELDOM == 0

    def idle(self, token: float) -> int:
        """At rest: at how many of the next steps no look will be due."""
        return 0 if self.pays(token) else 2 * SELDOM - 1 - self._passed_over % (2 * SELDOM)

    def pass_over(self, steps: int) -> None:
        """At so many of them nobody asks."""
        self._passed_over += steps

    def looked(self, seconds: float) -> None:
        """A look took so long."""
        self._tokens *= FADES
        self._seconds = FADES * self._seconds + seconds

    def gained(self, tokens: int, seconds: float = 0.0) -> None:
        """By what was found, in steps that take so much longer for it."""
        self._tokens += tokens
        self._seconds += seconds


class TextLookup:
    """Finds the last tokens of one growing text earlier in it.

    Prompt lookup (n-gram) decoding, as a second source of drafts beside the masks: it costs no row of any step.
    """

    def __init__(self) -> None:
        self._behind: defaultdict[int, list[int]] = defaultdict(list)  # places behind a token
        self._read = 1  # places known, but for the first
        self._foretold: tuple[int, list[int]] | None = None  # place of the last first draft, and all of them
        self._held = self._failed = 0.0
        self.run = 0  # drafts that held, since one failed or there was none; those between calls behind the first, too

    def find(self, text: Sequence[int], most: int) -> Found:
        """Up to `most` drafts after `text`, which begins with the text of the last call; none if nothing matches.

        Of the latest places behind the same last two tokens, or one, the one with the longest match. Where that
        overlaps the end of the text, its period goes on.
        """
        behind = self._behind
        for place in range(self._read, len(text)):
            behind[text[place - 1]].append(place)
        self._read = max(self._read, len(text))
        best, longest = 0, 0
        for place in self._places(text):
            matched = 1
            while matched < min(LONGEST, place) and text[place - 1 - matched] == text[-1 - matched]:
                matched += 1
            if matched > longest:
                best, longest = place, matched
        self._remember(text)
        if not longest or most < 1:
            self.run = 0
            return Found([], 0, self._held, self._failed)
        period = len(text) - best
        drafts = [text[best + number % period] for number in range(most)]
        self._foretold = len(text), drafts
        return Found(drafts, longest, self._held, self._failed)

    def _places(self, text: Sequence[int]) -> list[int]:
        """Earlier places that may be like the end of the text, the latest first."""
        known = self._behind.get(text[-1]) if text else None
        if known is None:
            return []
        latest = known[: -SOUGHT - 1 : -1]
        before = text[-2] if len(text) > 1 else None
        pairs = [place for place in latest if place > 1 and text[place - 2] == before]
        return (pairs or latest)[:TRIED]

    def _remember(self, text: Sequence[int]) -> None:
        """What became of the last drafts, if that is known by now."""
        if self._foretold is None or self._foretold[0] >= len(text):
            return
        place, drafts = self._foretold
        self._foretold = None
        said = list(text[place : place + len(drafts)])
        holds = said[0] == drafts[0]
        self._held = REMEMBERED * self._held + holds
        self._failed = REMEMBERED * self._failed + (not holds)
        self.run = self.run + len(said) if said == drafts[: len(said)] else 0
