"""Rest: plain steps and nothing else where the planner expects no gain, and what ends it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from foretell import native
from foretell.decoding.adaptive import Adaptive
from foretell.decoding.calibration import Experience
from foretell.decoding.pausing import FIRST, WOKEN_BY, Pause
from foretell.decoding.planner import TEXTS, Planner
from foretell.decoding.strategies import Running
from foretell.decoding.trials import SETTLED, TOO_LATE
from foretell.evaluation.optimum import by_width
from foretell.evaluation.simulation import noisy_costs
from foretell.layout import plain


def planless(chance: float) -> tuple[Adaptive, Planner]:
    """On a machine where masks are dear, with a drafter whose drafts hold with this chance, which it knows."""
    native.library()  # not to be compiled in the first solution's time
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
    assert kinds[1] == kinds[SETTLED + 1] == "plan" and kinds[SETTLED + 2] == "rest"  # until what was tried is known


def test_what_a_trial_has_shown_counts_as_soon_as_it_is_known() -> None:
    """Drafts that seem worth nothing hold after all, in a text that began with a trial: masks pay from then on."""
    strategy, planner = planless(0.02)
    planner.begin_text()
    planner.solve()
    rows = [Running(number, 10**6, list(range(50))) for number in range(2)]
    assert strategy.layouts(rows)[0].masks  # the trial
    for _ in range(SETTLED):
        assert not strategy.layouts(rows)[0].masks and not strategy.paused
    for _ in range(40):
        planner.experience.calibration.decided([-3.0] * 3, 3)
        planner.experience.made([0.95] * 3)
    assert strategy.layouts(rows)[0].masks and not strategy.paused


@pytest.mark.parametrize("lookup", [False, True])
def test_one_sequence_at_rest_goes_the_same_way_unasked(lookup: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most steps at rest ask nothing, and yet masks are tried when they would be."""
    courses, asked = [], []
    for quiet in (True, False):
        strategy, planner = planless(0.02)
        strategy.lookup = lookup
        strategy.experience.looks.looked(math.inf)  # which no text's own drafts will be worth
        calls: list[int] = []
        rests = planner.rests

        def counted(remaining: int, rests=rests, calls=calls) -> bool:  # type: ignore[no-untyped-def]
            calls.append(remaining)
            return rests(remaining)

        monkeypatch.setattr(planner, "rests", counted)
        if not quiet:
            monkeypatch.setattr(strategy, "_be_quiet", lambda alone: None)
        courses.append(course_of(strategy, planner, 400, 0.02, sequences=1))
        asked.append(len(calls))
    assert courses[0] == courses[1] and courses[0].count("masks") > 1
    assert asked[0] < asked[1] / 2


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


@pytest.mark.parametrize("dear, verified", [(False, 1), (True, 0)])
def test_drafts_that_would_not_be_verified_are_not_planned_for_and_teach(dear: bool, verified: int) -> None:
    """Their first is likely enough to pay for a row if all behind it held, but by what may be expected none pays."""
    strategy, planner = planless(0.02)
    course_of(strategy, planner, 40, 0.02, sequences=1)
    row = Running(99, 10**6, list(range(20)) * 2)
    assert strategy.layouts([Running(98, 10**6, list(range(50)))]) == [plain()] and strategy.paused
    planner.least_chance = 0.0
    if dear:
        planner.prices.table[1:] += 4 * planner.prices.resting
    drafts = strategy.drafted([row], torch.empty((1, 0), dtype=torch.long), None)
    assert bool(drafts.numel()) == bool(row.drafts) == bool(verified)
    (block,) = strategy.open[99]
    assert block.drafts == [0, 1, 2]
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
