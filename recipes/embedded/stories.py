"""The notebook a template writes its story in: random draws on one side, checked equations on the other."""

import random
from dataclasses import dataclass, field

import words

LIMIT = 1000


class UnsuitableError(Exception):
    """The numbers drawn do not make a school problem (negative, fractional or too large); draw again."""


@dataclass(frozen=True)
class Person:
    """Somebody in a story, with the pronouns that the sentences need."""

    name: str
    he: str
    his: str
    him: str
    He: str


def compute(left: int, sign: str, right: int) -> int:
    """The exact whole-number result, or UnsuitableError."""
    if sign == "/" and (right == 0 or left % right):
        raise UnsuitableError
    value = {"+": left + right, "-": left - right, "*": left * right, "/": left // max(right, 1)}[sign]
    if not 2 <= value <= LIMIT:  # "1 apples" would be wrong English
        raise UnsuitableError
    return value


@dataclass
class Story:
    """Draws names and numbers, and collects the question and the worked steps of one problem."""

    rng: random.Random
    told: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    result: int = 0
    _names: set[str] = field(default_factory=set)

    def person(self) -> Person:
        """A person not yet in this story."""
        while True:
            girl = self.rng.random() < 0.5
            name = self.rng.choice(words.GIRLS if girl else words.BOYS)
            if name not in self._names:
                self._names.add(name)
                return Person(name, "she", "her", "her", "She") if girl else Person(name, "he", "his", "him", "He")

    def n(self, low: int, high: int) -> int:
        """A whole number between both ends, inclusive."""
        return self.rng.randint(low, high)

    def pick(self, *options: str) -> str:
        """One of several phrasings."""
        return self.rng.choice(options)

    def some(self, options: tuple[str, ...], count: int = 2) -> list[str]:
        """Several different words of a list."""
        return self.rng.sample(sorted(set(options)), count)

    def things(self) -> str:
        """Countable things, in the plural."""
        return self.rng.choice(words.THINGS)

    def place(self) -> str:
        """Somewhere to go."""
        return self.rng.choice(words.PLACES)

    def tell(self, *phrasings: str) -> None:
        """Add one sentence to the question, in one of its phrasings."""
        self.told.append(self.rng.choice(phrasings))

    def step(self, left: int, sign: str, right: int, *phrasings: str) -> int:
        """Add one worked step, in one of its phrasings; `@` stands for the equation. Returns its result."""
        value = compute(left, sign, right)
        phrase = self.rng.choice(phrasings)
        if "@" not in phrase:
            raise ValueError(f"a step without its equation: {phrase}")
        self.steps.append(phrase.replace("@", f"{left} {sign} {right} = {value}"))
        self.result = value
        return value
