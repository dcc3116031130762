"""Drafts whose fate is not known to the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foretell.decoding.calibration import Calibration


@dataclass
class OpenBlock:
    """Drafts in a row, until one fails or all hold; verified or not, the text tells."""

    drafts: list[int]
    logits: list[float]
    calibration: Calibration  # that learns from it
    evidence: float = 0.0  # for all of them, as log-odds
    held: int = 0
    closed: bool = False
    counted: int = 0  # drafts that it would pay to verify at rest, of which it counts how many hold
    seconds: float = 0.0  # that this takes

    def __post_init__(self) -> None:
        self.reach = self.calibration.reach(self.logits, self.evidence)  # chances that the first 0, 1, ... of them hold

    def follow(self, tokens: Sequence[int]) -> bool:
        """Whether more is to be learnt after these tokens of the text."""
        for token in tokens:
            if self.drafts[self.held] != token:
                self.closed = True
                break
            self.held += 1
            if self.held == len(self.drafts):
                self.closed = True
                break
        if self.closed:
            self.calibration.decided(self.logits, self.held, self.evidence)
        return not self.closed
