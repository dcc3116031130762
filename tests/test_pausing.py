"""Pausing where adaptive decoding loses: what it costs, what it must not interrupt, and when it is tried anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from foretell.decoding.adaptive import TIMED, Adaptive
from foretell.decoding.calibration import Experience
from foretell.decoding.pausing import FIRST, IN_NEW_TEXT, PAUSES, RENEWED, WOKEN_BY, Batch, Pause
from foretell.decoding.planner import Planner
from foretell.decoding.strategies import Running
from foretell.decoding.trials import SETTLED
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


def test_short_texts_lose_together() -> None:
    """None of them has steps enough to tell a loss of a tenth from chance."""
    random = np.random.default_rng(0)
    course = follow(Pause(), lambda: (1.1 * PLAIN, float(random.choice([0.5, 1.0, 1.5]))), 3000, text=10)
    assert np.mean(course.paused) > 0.5


def test_noise_of_plain_steps_too_hardly_interrupts_a_small_gain() -> None:
    """A tenth, on a machine whose steps of every kind deviate by a third."""
    paused = []
    for seed in range(8):
        random = np.random.default_rng(seed)
        pause = Pause()
        for number in range(1500):
            if number % 30 == 0:
                pause.begin_text(4)
            noise = float(np.exp(0.3 * random.standard_normal()))
            paused.append(pause.paused())
            if paused[-1]:
                pause.rested(4, PLAIN * noise)
            else:
                pause.worked(4, PLAIN * noise * 3.0 / 1.1, float(random.choice([1.5, 3.0, 4.5])), 0.1)
    assert np.mean(paused) < 0.15


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("gain", [1.0, 0.65])
def test_a_machine_that_slows_down_is_no_loss_of_the_drafts(gain: float, sequences: int) -> None:
    """Plain steps are known from quieter times; some timed anew tell that what gains still does, and what loses does
    not."""
    random = np.random.default_rng(0)
    pause, paused = Pause(), []
    pause.begin_text(sequences)
    for number in range(400):
        speed = PLAIN * (1.0 if number < 100 else 1.6) * float(np.exp(0.05 * random.standard_normal()))
        paused.append(pause.paused())
        if paused[-1]:
            pause.rested(sequences, speed)
        else:
            pause.worked(sequences, 2 * speed, gain * (3.0 if random.random() < 0.8 else 1.0), 0.0)
    assert not any(paused[FIRST:100]) or gain < 1
    assert (sum(paused[100:]) <= 2 * FIRST) == (gain == 1.0)


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


def test_of_steps_at_rest_one_in_four_is_timed() -> None:
    strategy, row = adaptive(Pause()), Running(0, 10**6, list(range(50)))
    planner = strategy.planner(1)
    planner._pays, planner._trials._without, planner._trials._every = False, SETTLED + 1, 10**6
    for _ in range(10 * TIMED):
        assert strategy.layouts([row]) == [plain()] and strategy.paused
        strategy.took(plain(), 1.0)
    assert planner.prices._taken == 10


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
