"""Exact answers: whether the base still solves its problems when several tokens are decoded per step."""

from __future__ import annotations

from collections.abc import Sequence

from foretell.errors import ForetellError

MARK = "Answer:"


def answer_in(text: str) -> str | None:
    """X of the last non-empty line if that is "Answer: X", else None: a text cut off before its end has no answer."""
    lines = text.strip().splitlines()
    last = lines[-1].strip() if lines else ""
    return last[len(MARK) :].strip() or None if last.startswith(MARK) else None


def exact_answers(generations: Sequence[str], answers: Sequence[str | int]) -> float:
    """Share of the texts whose answer equals the reference as text. Raises ForetellError if their numbers differ."""
    if len(generations) != len(answers) or not answers:
        raise ForetellError(f"{len(generations)} texts can't be compared with {len(answers)} answers")
    right = [answer_in(text) == str(answer).strip() for text, answer in zip(generations, answers, strict=True)]
    return sum(right) / len(right)
