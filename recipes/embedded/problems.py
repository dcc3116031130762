"""School word problems with worked steps, generated without end and without repetition of the held-out ones.

Every step shows its equation in full - one operation each - so that a model of a few million parameters can learn to
do the arithmetic instead of only the tone. Run this file to check the answers of many generated problems.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import templates_counting
import templates_measuring
import templates_money
from stories import Story, UnsuitableError, compute

TEMPLATES = templates_counting.TEMPLATES + templates_money.TEMPLATES + templates_measuring.TEMPLATES
BUCKETS = 50
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
TRIES = 40  # at one template, before another is chosen, so that hard templates stay as frequent as easy ones


@dataclass(frozen=True)
class Problem:
    """One word problem."""

    question: str
    solution: str
    answer: int

    @property
    def prompt(self) -> str:
        """What a model is given: everything through `Solution:`, without the space that follows."""
        return f"Problem: {self.question}\nSolution:"

    @property
    def text(self) -> str:
        """The whole document, without the end-of-text token."""
        return f"{self.prompt} {self.solution}\nAnswer: {self.answer}"


def generate(rng: random.Random) -> Problem:
    """One problem; the same state of `rng` gives the same problem."""
    while True:
        template = rng.choice(TEMPLATES)
        for _ in range(TRIES):
            story = Story(rng)
            try:
                template(story)
            except UnsuitableError:
                continue
            problem = Problem(" ".join(story.told), "\n".join(story.steps), story.result)
            if len(story.steps) >= 2 and in_the_head(problem):
                return problem


def in_the_head(problem: Problem) -> bool:
    """Whether a child, or a model of seven million parameters, can do every step without paper."""
    for left, sign, right, value in EQUATION.findall(problem.solution):
        low, high = sorted((int(left), int(right)))
        if sign in "+-" and max(high, int(value)) > 100:
            return False
        if sign == "*" and (low > 10 or high > 20 or int(value) > 100):
            return False
        if sign == "/" and (int(left) > 100 or int(right) > 10):
            return False
    return True


def held_out(problem: Problem) -> bool:
    """Whether this question is kept away from training; depends on its text alone."""
    digest = hashlib.sha256(problem.question.encode()).digest()
    return int.from_bytes(digest[:8]) % BUCKETS == 0


def training_problems(seed: int) -> Iterator[Problem]:
    """Problems to train on, without end."""
    rng = random.Random(seed)
    while True:
        problem = generate(rng)
        if not held_out(problem):
            yield problem


def held_out_problems(n: int, seed: int) -> list[Problem]:
    """Different problems that no training set contains."""
    rng = random.Random(seed)
    found: dict[str, Problem] = {}
    while len(found) < n:
        problem = generate(rng)
        if held_out(problem):
            found[problem.question] = problem
    return list(found.values())


def equation_holds(left: str, sign: str, right: str, value: str) -> bool:
    """Whether one match of EQUATION is right."""
    try:
        return compute(int(left), sign, int(right)) == int(value)
    except UnsuitableError:
        return False


def check(n: int, seed: int = 0) -> None:
    """Recompute every equation of `n` problems; the last one must give the answer."""
    rng = random.Random(seed)
    for _ in range(n):
        problem = generate(rng)
        equations = EQUATION.findall(problem.solution)
        lines = problem.solution.split("\n")
        if len(equations) != len(lines) or "@" in problem.text:
            raise AssertionError(problem.text)
        if not all(equation_holds(*match) for match in equations) or int(equations[-1][3]) != problem.answer:
            raise AssertionError(problem.text)


if __name__ == "__main__":
    check(20_000)
    for example in held_out_problems(5, 1):
        print(example.text, end="\n\n")
    print("20000 problems checked")
