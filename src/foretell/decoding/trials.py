"""When masks are hung although plain decoding seems best: what is never tried is never seen to get better."""

from __future__ import annotations

EVERY = (8, 256)  # steps without masks before some are tried again, `RARER` times as many while in vain
RARER = 8
TOO_LATE = 8  # tokens that a text may still get in which nothing is tried any more
SETTLED = 2  # steps after which the fate of what was tried is known


class Trials:
    """Of masks, the first ones soon and later ones rarer and rarer, until some are worth it."""

    def __init__(self) -> None:
        self._without, self._every = 0, EVERY[0]  # steps without masks, and how many before some are tried

    def begin_text(self, soon: bool) -> None:
        """At its first step, or only later."""
        self._every = EVERY[0]
        self.soon()
        if not soon:
            self._without, self._every = SETTLED + 1, RARER * EVERY[0]

    def soon(self) -> None:
        """At the next step, whether masks seem worth it or not."""
        self._without = self._every

    def rests(self, remaining: int) -> bool:
        """Whether the next step, of a text that may still get so many tokens, needs no masks and none are waited for;
        such a step is then counted."""
        if self._without <= SETTLED or (self._without + 1 >= self._every and remaining > TOO_LATE):
            return False
        self._without += 1
        return True

    def rests_for(self, steps: int) -> int:
        """Of so many steps behind one at which it rests, how many it will rest at, too; they are counted."""
        steps = max(0, min(steps, self._every - 1 - self._without))
        self._without += steps
        return steps

    def due(self, masks: bool, remaining: int) -> bool:
        """Whether to try masks at a step, of a text that may still get so many tokens; `masks`: it hangs some."""
        if masks:
            self._without, self._every = 0, EVERY[0]
            return False
        self._without += 1
        if self._without < self._every or remaining <= TOO_LATE:
            return False
        self._without, self._every = 0, min(RARER * self._every, EVERY[1])
        return True
