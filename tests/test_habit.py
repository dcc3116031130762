"""Steps that nobody plans: when they are taken, what they promise, and that the output stays the base's."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from foretell import native
from foretell.decoding import loop
from foretell.decoding.adaptive import Adaptive
from foretell.decoding.calibration import Experience
from foretell.decoding.correction import AGED
from foretell.decoding.costs import Costs
from foretell.decoding.draft import SamplerDrafter
from foretell.decoding.habit import MISSING, NEARLY, SELDOM, STEPS, Habit
from foretell.decoding.pick import Picker
from foretell.decoding.planner import Planner
from foretell.decoding.problem import Problem
from foretell.decoding.shapes import shapes
from foretell.evaluation.replay import ReplayDrafter
from foretell.layout import Block, Layout, linear

from .models import random_prompt, reference, tiny_model

COSTS = Costs(regular={1: 1.0, 9: 1.2}, masked={2: 1.05, 25: 1.6, 81: 4.0}, drafts={8: 0.1})
REACH = np.cumprod([1.0, 0.9, 0.8, 0.7, 0.6])


def planner_of(chances: list[list[float]], planning: float) -> Planner:
    """Who has seen blocks with these confidences in several texts, and whose planning takes so long."""
    planner = Planner(COSTS, experience := Experience(4))
    for _ in range(4):
        for own in chances:
            experience.made(own)
        experience.begin_text()
    planner.solve()
    planner.habit.planned(planning)
    return planner


def test_it_is_the_best_rule_that_knows_how_many_drafts_there_are() -> None:
    """Where all blocks are alike there is nothing else to know."""
    planner = planner_of([[0.9, 0.8, 0.7, 0.6]] * 8, 0.0)
    for _ in range(4):
        planner.solve()
    problem, habit = planner._problem, Habit()
    reach = planner.experience.recent_reach()[0].mean(0)
    for _ in range(8):
        per_token = habit.solve(problem, reach)
    assert per_token == pytest.approx(planner.per_token, rel=1e-3)
    (layout,) = planner.layouts([reach.tolist()], [1000])
    assert habit.layouts[4] == layout and habit.layouts[4].masks and len(habit.layouts) == 5
    tokens = 1 + reach[1 : layout.regular].sum()
    assert habit._tokens[4] == pytest.approx(tokens) and habit._tokens[0] == 1.0


def test_it_is_followed_where_planning_takes_more_than_it_saves() -> None:
    unlike = [[0.99, 0.99, 0.98, 0.98]] * 4 + [[0.3, 0.2, 0.1, 0.1]] * 4
    for planning, followed in ((0.0, False), (0.4, True)):
        planner = planner_of(unlike, planning)
        planner.solve()
        assert planner.experience.alike and bool(planner.habit.left) == followed
    # Not in a text of which nothing is known yet, among texts that differ.
    planner = planner_of(unlike, 0.4)
    planner.experience.alike = False
    planner.solve()
    assert not planner.habit.left
    for own in unlike:
        planner.experience.made(own)
    planner.solve()
    assert planner.habit.left == STEPS[0]
    planner.begin_text()
    assert not planner.habit.left  # which is of another kind, as like as not
    # Nor where drafts never hold, or the text foretells itself.
    planner = planner_of([[0.01] * 4] * 8, 0.4)
    planner.solve()
    assert not planner.habit.left
    planner = planner_of(unlike, 0.4)
    for _ in range(32):
        planner.experience.found([1.0, 0.9, 0.8, 0.7, 0.6])
    planner.solve()
    assert not planner.habit.left


def test_it_grows_while_it_is_confirmed_and_ends_where_the_text_becomes_another() -> None:
    table = shapes(4)
    problem = Problem(table, 1 + 0.02 * table.widths, np.full(5, 0.05))
    habit = Habit()
    habit.solve(problem, REACH)
    for steps in (16, 32, 64, 128, 256, 512, 512):
        habit.begin()
        assert habit.left == steps
    expected = habit._tokens[4]
    for tokens in (round(expected), 1, 5):
        habit.end()
        habit.begin()
        steps = 0
        while habit.left and steps < 100:
            habit.gave(4, tokens, 1)
            steps += 1
        assert (steps == 100) == (tokens == round(expected)) and steps > MISSING / 5
    assert habit.patience == 1.0
    for _ in range(SELDOM):
        habit.end()
    assert habit.patience == NEARLY
    habit.begin()
    assert habit.patience == 1.0


def test_a_rule_is_found_whatever_was_found_before() -> None:
    """Where costs have changed, it takes more than a round or two to come from one rule to another."""
    table, reach = shapes(8), np.cumprod([1.0] + [0.9] * 8)
    dear, cheap = (Problem(table, 1 + price * table.widths, np.full(9, 0.05)) for price in (1.0, 0.01))
    habit, fresh = Habit(), Habit()
    habit.solve(dear, reach)
    assert not habit.layouts[0].masks
    assert habit.solve(cheap, reach) == pytest.approx(fresh.solve(cheap, reach)) and habit.layouts == fresh.layouts
    assert habit.layouts[0].masks


def test_promises_are_compared_with_what_was_kept_of_them() -> None:
    def solved(took: float, planned: float) -> Planner:
        planner = planner_of([[0.95] * 4, [0.5] * 4] * 4, 0.4)
        planner.solve()
        planner.habit.end()
        for _ in range(200):
            planner.kept(True, took * planner.habit.per_token, 1.0)
            planner.kept(False, planned * planner.per_token, 1.0)
        planner.solve()
        return planner

    assert solved(1.0, 1.0).habit.left and not solved(10.0, 1.0).habit.left and solved(10.0, 10.0).habit.left
    unlucky = solved(10.0, 1.0)
    for _ in range(40):
        if unlucky.habit.left:
            break
        unlucky.solve()
    assert unlucky.habit.left  # bad luck is forgotten


def test_a_rule_without_masks_is_no_habit() -> None:
    planner = planner_of([[0.01] * 4] * 8, 0.4)
    for _ in range(200):
        planner.habit.kept(True, 0.5, 1.0)
        planner.habit.kept(False, 2.0, 1.0)
    planner.solve()
    assert not planner.habit.left


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("lookup", [False, True])
def test_the_output_is_that_of_the_base(together: int, lookup: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    prompts = [random_prompt(5 + 3 * seed, seed) for seed in range(6)]
    expected = [reference(model.base.lm, prompt, 30) for prompt in prompts]
    config = model.decode_config({"strategy": "adaptive", "max_new_tokens": 30})
    picker, experience = Picker(config), Experience(model.max_masks)
    own = SamplerDrafter(model, config, picker)
    drafter = ReplayDrafter(own, expected, (0.8, 0.6, 0.45, 0.3), model.base.vocab_size, informative=True)
    planner = Planner(COSTS, experience)
    rule = [linear(drafts, 4) if drafts != 1 else Layout(2, (Block(0, 2), Block(1, 4))) for drafts in range(5)]

    def find(self: Planner) -> None:
        self.habit.layouts, self.habit._tokens = rule, [1.0] * 5
        self.habit.begin()

    monkeypatch.setattr(Planner, "_find_habit", find)
    strategy, steps = Adaptive(lambda sequences: planner, experience, lookup), Counter[bool]()
    texts: list[list[int]] = [[] for _ in prompts]
    numbered = ((number, ids[0]) for number, ids in enumerate(prompts))
    for batch in loop.refilled_steps(model, numbered, together, config, picker, strategy=strategy, drafter=drafter):
        steps[strategy.habitual] += 1
        for step in batch:
            texts[step.sequence] += step.tokens
    assert texts == expected and steps[True] > 10 and steps[False] > 2


def test_steps_of_a_habit_are_priced_by_what_they_take() -> None:
    planner = planner_of([[0.9, 0.8, 0.7, 0.6]] * 8, 0.1)
    prices, layout = planner.prices, linear(4, 4)
    guessed = prices.of_habit(0.1)
    assert guessed[4, 4] == pytest.approx(prices.table[4, 4] - 0.2) and guessed[0, 0] == prices.resting
    for _ in range(16):
        planner.took(layout, 2 * float(prices.measured[4, 4]), habit=[layout])
    planner.solve()
    assert prices.of_habit(0.1)[4, 4] == pytest.approx(2 * prices.measured[4, 4], rel=0.05)
    # Of several sequences with layouts of their own, by the mean of these; and no busy minute is believed for ever.
    mixed = [linear(4, 4), linear(0, 4), Layout(5)]
    for _ in range(64):
        planner.took(
            layout, 3 * float(np.mean([prices.measured[d, m] for d, m in ((4, 4), (0, 4), (4, 0))])), habit=mixed
        )
    planner.prices._pace._level = 0.0
    planner.solve()
    assert prices.of_habit(0.1)[4, 4] > 2.1 * prices.measured[4, 4]
    for _ in range(AGED + 1):
        planner.took(layout, float(prices.measured[4, 4]))
    planner.solve()
    assert prices.of_habit(0.1)[4, 4] == pytest.approx(prices.table[4, 4] - 0.2)
    planner.reprice(COSTS.scaled(3.0), np.array([1.0, 3.0]))
    planner.took(layout, 100.0, habit=[layout] * 2)  # of two, about whose costs nobody has asked yet
    planner.prices.correct()
    assert prices.of_habit(0.1)[4, 4] < 2 * prices.measured[4, 4]


@pytest.mark.skipif(native.library() is None, reason=f"no native code: {native.why_not()}")
@pytest.mark.parametrize(("masks", "several"), [(1, False), (4, False), (8, False), (8, True)])
def test_rounds_in_one_call_are_those_of_arrays(masks: int, several: bool) -> None:
    random, table = np.random.default_rng(0), shapes(masks, several)
    problem = Problem(
        table, 1 + 0.03 * table.widths + 0.01 * random.random(len(table.widths)), np.linspace(0, 0.2, masks + 1)
    )
    for found_rows in (0, 5):
        reach = np.cumprod(np.hstack([np.ones((32, 1)), random.random((32, masks)) ** 0.3]), 1)
        found = np.zeros_like(reach)
        found[:, 0] = 1.0
        found[:found_rows] = np.cumprod(
            np.hstack([np.ones((found_rows, 1)), random.random((found_rows, masks)) ** 0.1]), 1
        )
        value = -random.random(masks + 1)
        value[0] = 0.0
        chosen, solved = problem.round(reach, found, value, 0.6)
        expected, chances = problem.improved(reach, found, value, 0.6)
        assert np.array_equal(chosen, expected)
        np.testing.assert_allclose(solved, problem.solved(expected, chances), rtol=1e-9)


def test_rounds_do_without_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    table = shapes(4)
    problem = Problem(table, 1 + 0.02 * table.widths, np.full(5, 0.05))
    nothing = np.eye(1, 5)
    expected = problem.round(REACH[None], nothing, np.zeros(5), 0.7)
    monkeypatch.setattr("foretell.native.library", lambda: None)
    chosen, solved = problem.round(REACH[None], nothing, np.zeros(5), 0.7)
    assert np.array_equal(chosen, expected[0])
    np.testing.assert_allclose(solved, expected[1], rtol=1e-9)


def test_a_text_begins_as_the_most_promising_of_the_last_ones() -> None:
    """Problems and prose by turns: a problem does not begin as prose ended."""
    planner = Planner(COSTS, experience := Experience(4))
    ended = []
    for sure in (0.95, 0.05, 0.95, 0.05):
        for _ in range(32):
            experience.made([sure] * 4)
        planner.solve()
        ended.append((planner.per_token, planner._pays))
        experience.begin_text()
        planner.begin_text()
    assert ended[0][1] and planner.per_token < 1.1 * min(own for own, _ in ended) and planner._pays


def test_what_the_last_texts_of_a_batch_do_is_not_done_by_the_next_batch() -> None:
    several = {
        number: Costs({1: 1.0, 9: 1.2}, {2: price, 25: 9 * price}, {8: 0.1}) for number, price in ((2, 1.1), (16, 8.0))
    }
    planner = Planner(COSTS, experience := Experience(8))
    for confidence in [0.95, 0.7] * 40:
        experience.made([confidence] * 8)

    def share(sequences: int) -> None:
        planner.reprice(several[sequences], np.full(sequences, 1.0))
        planner.urgency([100] * sequences, False)

    share(16)
    planner.begin_text()
    for _ in range(4):
        planner.solve()
    planner.habit.planned(0.4)
    rested, value = planner._pays, planner.value.copy()
    assert not rested
    share(2)
    planner.solve()
    assert planner._pays and planner.habit.left
    share(16)
    assert not planner.keeps_habit() and not planner.habit.left
    planner.begin_text()
    assert planner._pays == rested and planner._solved_for == 16 and planner.value == pytest.approx(value)
