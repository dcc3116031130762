"""Pausing where adaptive decoding loses: what it costs, what it must not interrupt, and when it is tried anew."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from foretell.decoding.calibration import Experience
from foretell.decoding.pausing import FIRST, IN_NEW_TEXT, PAUSES, RENEWED, WOKEN_BY, Batch, Pause
from foretell.decoding.planner import SETTLED, TEXTS, TOO_LATE, Planner
from foretell.decoding.strategies import Adaptive, Running
from foretell.evaluation.optimum import by_width
from foretell.evaluation.simulation import noisy_costs
from foretell.layout import plain

PLAIN = 0.8  # a plain step's seconds, as a share of those measured


@dataclass
class Course:
    """What became of some steps."""

    paused: list[bool] = field(default_factory=list)
    seconds: float = 0.0
    tokens: float = 0.0

    @property
    def speed(self) -> float:
        """In tokens per plain step's time."""
        return self.tokens / (self.seconds / PLAIN)


def follow(
    pause: Pause, step: Callable[[], tuple[float, float]], steps: int, sequences: int = 1, text: int = 10**9
) -> Course:
    """`step` gives the seconds of a working step, as a share of those measured for a plain one, and its tokens."""
    course = Course()
    for number in range(steps):
        if number % text == 0:
            pause.begin_text(sequences)
        course.paused.append(pause.paused())
        seconds, tokens = (PLAIN, 1.0) if course.paused[-1] else step()
        if course.paused[-1]:
            pause.rested(sequences, seconds)
        else:
            pause.worked(sequences, seconds, tokens)
        course.seconds, course.tokens = course.seconds + seconds, course.tokens + tokens
    return course


@pytest.mark.parametrize("sequences", [1, 16])
@pytest.mark.parametrize("text", [64, 10**9])
@pytest.mark.parametrize("share", [1.15, 1.5, 3.0])
def test_losing_costs_little(share: float, text: int, sequences: int) -> None:
    course = follow(Pause(), lambda: (share * PLAIN, 1.0), 4000, sequences, text)
    assert course.speed > 0.95
    assert 1 - np.mean(course.paused) > 0.005  # it is tried again and again


def test_what_neither_gains_nor_loses_is_left_alone() -> None:
    course = follow(Pause(), lambda: (1.5 * PLAIN, 1.5), 2000)
    assert np.mean(course.paused) < 0.1


@pytest.mark.parametrize("seed", range(5))
def test_gains_that_vary_much_are_hardly_interrupted(seed: int) -> None:
    """Three plain steps' time for one token or for eight: a quarter faster on average, after bad runs of any length."""
    random = np.random.default_rng(seed)
    course = follow(Pause(), lambda: (3 * PLAIN, 8.0 if random.random() < 0.4 else 1.0), 4000, text=100)
    assert course.speed > 1.17


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_the_clock_hardly_interrupts(seed: int) -> None:
    random = np.random.default_rng(seed)
    course = follow(Pause(), lambda: (1.2 * PLAIN * float(np.exp(0.3 * random.standard_normal())), 1.5), 4000)
    assert np.mean(course.paused) < 0.1


def test_what_turns_out_well_is_found_out() -> None:
    """A stream of hopeless texts, then one where every step gives three tokens in the time of two."""
    pause = Pause()
    assert np.mean(follow(pause, lambda: (1.5 * PLAIN, 1.0), 2000, text=100).paused) > 0.9
    course = follow(pause, lambda: (2 * PLAIN, 3.0), 1000, text=1000)
    assert course.paused.index(False) <= IN_NEW_TEXT * PAUSES[1]
    assert sum(course.paused[300:]) <= 2 * FIRST


def test_plain_steps_are_timed_before_anything_else_and_now_and_then() -> None:
    pause = Pause()
    course = follow(pause, lambda: (2 * PLAIN, 3.0), RENEWED + 100)
    assert course.paused[: FIRST + 1] == [True] * FIRST + [False]
    assert course.paused.count(True) == 2 * FIRST
    again = follow(pause, lambda: (2 * PLAIN, 3.0), 50)
    assert not any(again.paused)
    more = follow(pause, lambda: (2 * PLAIN, 3.0), 50, sequences=8)  # of such batches nothing is known
    assert more.paused.count(True) == FIRST


def test_a_slower_machine_is_not_taken_for_losses() -> None:
    """All steps take twice as long from some time on: plain ones are timed again before long."""
    pause = Pause()
    follow(pause, lambda: (2 * PLAIN, 3.0), 100)
    slow = 0
    for _ in range(2000):
        paused = pause.paused()
        slow += paused
        if paused:
            pause.rested(1, 2 * PLAIN)
        else:
            pause.worked(1, 4 * PLAIN, 3.0)
    assert slow < 300


def adaptive(pause: Pause | None) -> Adaptive:
    experience = Experience(3)
    costs = noisy_costs(3, by_width({1: 1.0, 16: 1.1}), 0.0, np.random.default_rng(0))
    planner = Planner(costs, experience)
    return Adaptive(lambda sequences: planner, experience, pause=pause)


def test_a_pause_does_nothing_but_plain_steps() -> None:
    pause = Pause()
    strategy, row = adaptive(pause), Running(0, 100, [1, 2, 3] * 3)
    pause.begin_text(1)
    for _ in range(FIRST):
        assert strategy.layouts([row]) == [plain()]
        drafts = torch.empty((1, 0), dtype=torch.long)
        assert strategy.drafted([row], drafts, None) is drafts and not strategy.open
        strategy.took(plain(), 0.8)
    (layout,) = strategy.layouts([row])
    assert layout.masks  # a trial begins with masks
    strategy.drafted([row], torch.tensor([[7, 8, 9]]), torch.full((1, 3), 0.5))
    assert strategy.open


def test_trials_begin_with_masks_and_losing_ones_end() -> None:
    """By what strategy and pause tell each other: steps that give one token, three times as long as plain ones."""
    pause = Pause()
    strategy, row = adaptive(pause), Running(0, 10**6, list(range(50)))
    pause.begin_text(1)
    kinds = []
    for _ in range(200):
        (layout,) = strategy.layouts([row])
        kinds.append("pause" if strategy.paused else "work")
        strategy.decided(row, [99])
        row.text.append(99 + len(row.text))
        row.drafts = 0
        strategy.drafted([row], torch.empty((1, 0), dtype=torch.long), None)
        strategy.took(layout, 1.0 if strategy.paused else 3.0)
    assert kinds[:FIRST] == ["pause"] * FIRST
    assert 2 <= kinds[FIRST:].count("work") < 30


def test_what_the_planner_promises_is_believed_for_a_while() -> None:
    """Losses end a trial later if the planner promises gains, and hardly later once it has broken its promises."""

    def lasts(pause: Pause, gain: float) -> int:
        steps = 0
        while not pause.paused():
            pause.worked(1, 2.0, 1.5, gain)
            steps += 1
        return steps

    doubted, believed = Pause(), Pause()
    assert lasts(believed, 0.5) > lasts(doubted, 0.0) + 5
    for _ in range(4):
        for pause, gain in ((doubted, 0.0), (believed, 0.5)):
            while pause.paused():
                pause.rested(1, 1.0)
            last = lasts(pause, gain)
    assert last <= lasts(Pause(), 0.0) + 2


def planless(chance: float) -> tuple[Adaptive, Planner]:
    """On a machine where masks are dear, with a drafter whose drafts hold with this chance, which it knows."""
    experience = Experience(3)
    for _ in range(20):
        experience.made([chance] * 3)
    planner = Planner(noisy_costs(3, by_width({1: 1.0, 16: 4.0}), 0.0, np.random.default_rng(0)), experience)
    pause = Pause()
    for sequences in (1, 2):
        for _ in range(FIRST):
            pause.rested(sequences, 1.0)
    return Adaptive(lambda sequences: planner, experience, pause=pause), planner


def course_of(strategy: Adaptive, planner: Planner, steps: int, chance: float, sequences: int = 2) -> list[str]:
    """New texts, step by step: whether masks were hung, nothing was done, or something else."""
    assert strategy.pause is not None
    planner.begin_text()
    strategy.pause.begin_text(sequences)
    rows = [Running(number, 10**6, list(range(50))) for number in range(sequences)]
    kinds = []
    for step in range(steps):
        layout = strategy.layouts(rows)[0]
        kinds.append("masks" if layout.masks else "rest" if strategy.paused else "plan")
        for row in rows:
            strategy.decided(row, [1000 + step])
            row.text.append(1000 + step)
            row.drafts = min(layout.masks, 3)
        made = torch.full((sequences, rows[0].drafts), 7)
        strategy.drafted(rows, made, torch.full(made.shape, chance))
        strategy.took(layout, 1.0 + 0.2 * (layout.width - 1))
    strategy.open.clear()
    strategy.texts.clear()
    return kinds


def test_where_nothing_promises_to_pay_most_steps_are_plain_and_nothing_else() -> None:
    strategy, planner = planless(0.02)
    kinds = course_of(strategy, planner, 300, 0.02)
    assert kinds[0] == "masks"  # a new text may be of another kind
    assert kinds.count("rest") > 250 and kinds.count("masks") <= 4
    assert kinds[1] == kinds[SETTLED] == "plan" and kinds[SETTLED + 1] == "rest"  # until what was tried is known


def test_one_sequence_rests_but_for_the_drafts_of_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy, planner = planless(0.02)
    course_of(strategy, planner, 40, 0.02, sequences=1)
    solutions: list[int] = []
    monkeypatch.setattr(planner, "solve", lambda: solutions.append(0))
    row = Running(99, 10**6, list(range(20)) * 2)
    for _ in range(20):
        row.drafts = 0
        strategy.drafted([row], torch.empty((1, 0), dtype=torch.long), None)
        (layout,) = strategy.layouts([row])
        assert layout.regular > 1 and not layout.masks and not strategy.paused
        held = [(row.text[-1] + number) % 20 for number in range(1, layout.regular + 1)]
        strategy.decided(row, held)
        row.text += held
    assert not solutions


@pytest.mark.parametrize("text, verified", [([*range(20), 7], 0), (list(range(20)) * 2, 1)])
def test_one_sequence_at_rest_takes_up_only_promising_drafts_of_its_text(text: list[int], verified: int) -> None:
    """One behind a single token, which experience speaks against, is left alone and nothing is planned; one behind
    twenty is verified."""
    strategy, planner = planless(0.02)
    course_of(strategy, planner, 40, 0.02, sequences=1)
    for _ in range(10):
        planner.experience.lookup.decided([math.log(1 / 3)], 0)
    planner.experience.lookup.learn()
    below, above = (planner.experience.lookup.chance(logit, 0) for logit in (math.log(1 / 3), math.log(20 / 3)))
    assert below < planner.least_chance < above
    row = Running(99, 10**6, list(range(50)))
    assert strategy.layouts([row]) == [plain()] and strategy.paused
    row.text = text
    drafts = strategy.drafted([row], torch.empty((1, 0), dtype=torch.long), None)
    assert bool(drafts.numel()) == bool(row.drafts) == bool(verified)
    (layout,) = strategy.layouts([row])
    assert strategy.paused != verified and (layout.regular > 1) == verified


def test_one_sequence_without_lookup_rests_from_everything() -> None:
    strategy, planner = planless(0.02)
    strategy.lookup = False
    kinds = course_of(strategy, planner, 300, 0.02, sequences=1)
    assert kinds[0] == "masks" and kinds.count("rest") > 250


def test_nothing_is_tried_at_the_end_of_a_text() -> None:
    _, planner = planless(0.02)
    planner.solve()
    for remaining, tries in ((TOO_LATE, False), (TOO_LATE + 1, True)):
        planner.probe_soon()
        (layout,) = planner.layouts([[1.0]], [remaining])
        assert bool(layout.masks) is tries


def test_what_promises_to_pay_is_planned() -> None:
    strategy, planner = planless(0.9)
    assert "rest" not in course_of(strategy, planner, 3, 0.9)


def test_after_many_hopeless_texts_only_some_begin_with_masks() -> None:
    strategy, planner = planless(0.02)
    first = [course_of(strategy, planner, 40, 0.02)[0] for _ in range(13)]
    assert first[: TEXTS + 1] == ["masks"] * (TEXTS + 1)
    assert first[TEXTS + 1 :].count("masks") == 2


def test_rest_ends_when_a_text_begins_to_foretell_itself() -> None:
    strategy, planner = planless(0.02)
    course_of(strategy, planner, 40, 0.02)
    rows = [Running(number, 10**6, list(range(50))) for number in (98, 99)]
    assert strategy.layouts(rows) == [plain()] * 2 and strategy.paused
    kinds = []
    for step in range(2 * (3 + 1 + WOKEN_BY + 1)):
        for row in rows:
            row.text.append(step % 3)
        strategy.layouts(rows)
        kinds.append(strategy.paused)
    assert all(kinds[: 3 + WOKEN_BY]) and not all(kinds)


def test_tokens_of_a_batch_are_worth_what_plain_decoding_would_have_taken() -> None:
    """Two texts of 4 and 10 tokens, two tokens a step each: 2 steps of both, 3 of the longer one."""
    batch = Batch([1.0, 1.2])
    for _ in range(2):
        batch.step(2, 2.0, paused=False)
    batch.lengths.append(4)
    assert not batch.whole
    for _ in range(3):
        batch.step(1, 2.0, paused=False)
    batch.lengths.append(10)
    assert batch.whole and batch.worth == pytest.approx(1.0)
    # The shorter text alone was foretold: its tokens saved next to nothing, but were counted in full.
    batch = Batch([1.0, 1.2])
    batch.step(2, 2.5, paused=False)  # 4 tokens of one, 1 of the other
    batch.lengths.append(4)
    for _ in range(9):
        batch.step(1, 1.0, paused=False)
    batch.lengths.append(10)
    assert batch.worth == pytest.approx((4 * 1.2 + 6) / (2.5 * 1.2 + 9))


def test_a_batch_that_was_mostly_paused_tells_nothing() -> None:
    batch = Batch([1.0])
    for number in range(10):
        batch.step(1, 1.0, paused=number > 3)
    batch.lengths.append(10)
    assert batch.worth is None


def test_what_tokens_are_worth_follows_the_latest_batches_of_a_size() -> None:
    pause = Pause()
    assert pause.worth(4) == 1.0
    pause.learn_worth(4, 0.8)
    assert pause.worth(3) == pytest.approx(0.8) and pause.worth(8) == 1.0
    pause.learn_worth(4, 0.4)
    assert 0.4 < pause.worth(4) < 0.8


def test_a_text_that_foretells_itself_ends_a_pause_and_a_failed_trial_makes_that_harder() -> None:
    pause = Pause()
    pause.begin_text(1)
    for _ in range(FIRST):
        assert pause.paused()
        pause.rested(1, 1.0)

    def fail() -> None:
        while not pause.paused():
            pause.worked(1, 2.0, 1.0)

    fail()
    assert not pause.foretold(WOKEN_BY - 1) and pause.paused()
    assert pause.foretold(WOKEN_BY) and not pause.paused()
    assert not pause.ended  # masks need not be tried for it
    fail()
    assert not pause.foretold(2 * WOKEN_BY - 1) and pause.foretold(2 * WOKEN_BY)
    fail()
    pause.begin_text(1)
    assert pause.paused() and pause.foretold(WOKEN_BY)


def test_in_a_pause_the_loop_of_a_text_is_seen() -> None:
    pause = Pause()
    strategy, row = adaptive(pause), Running(0, 10**6, list(range(50)))
    pause.begin_text(1)
    kinds = []
    for step in range(120):
        (layout,) = strategy.layouts([row])
        kinds.append(strategy.paused)
        token = 1000 + step if step < 60 else step % 3  # from then on it says the same three
        strategy.decided(row, [token])
        row.text.append(token)
        row.drafts = 0
        strategy.drafted([row], torch.empty((1, 0), dtype=torch.long), None)
        strategy.took(layout, 1.0 if strategy.paused else 3.0 if step < 60 else 0.5)
    assert all(kinds[:FIRST]) and any(kinds[40:60])
    # Three tokens to begin the loop, a first draft to be foretold, and so many that hold.
    assert not any(kinds[60 + 3 + 1 + WOKEN_BY + 1 :])
    strategy.lookup = False
    assert not strategy._foretold([row])


def test_of_a_paused_batch_one_text_a_step_is_watched() -> None:
    pause = Pause()
    strategy = adaptive(pause)
    pause.begin_text(2)
    looping, other = Running(0, 100, [1, 2, 3] * 8), Running(1, 100, list(range(24)))
    for step in range(40):
        strategy._foretold([looping, other])
        looping.text.append(step % 3 + 1)
        other.text.append(100 + step)
    assert strategy.texts[0].run > 10 and strategy.texts[1].run == 0
    assert pause.paused()  # half of them looping is not enough
