"""The planner where several sequences share a step, and what steps of any number of them cost."""

from __future__ import annotations

import numpy as np
import pytest

from foretell.decoding.calibration import Experience, Floats, means
from foretell.decoding.costs import Costs, of_batch, plain_steps
from foretell.decoding.planner import SHORT, Planner
from foretell.decoding.trials import SETTLED
from foretell.evaluation.simulation import noisy_costs
from foretell.layout import plain

from .test_planner import COSTS


def test_a_batch_shares_one_shape() -> None:
    experience = Experience(4)
    planner = Planner(noisy_costs(4, COSTS["1B"], 0.0, np.random.default_rng(0)), experience)
    reach = [[1.0, 0.99, 0.87, 0.76, 0.67], [1.0], [1.0, 0.9]]
    layouts = planner.layouts(reach, [100, 100, 1])
    assert [layout.regular for layout in layouts][1:] == [1, 1]  # no drafts at hand; one token left
    assert layouts[0].regular > 1


def test_equal_sequences_are_planned_as_one() -> None:
    """The same costs for the whole batch and the same drafts in every row: the number of rows changes nothing."""
    experience = Experience(8)
    for _ in range(32):
        experience.made([0.6] * 8)
    planner = Planner(noisy_costs(8, COSTS["135M"], 0.0, np.random.default_rng(0)), experience)
    planner.solve()
    reach = np.cumprod([1.0, 0.9, 0.7, 0.5, 0.5, 0.4]).tolist()
    (alone,) = planner.layouts([reach], [1000])
    assert alone.regular > 1 and alone.masks
    assert planner.layouts([reach] * 16, [1000] * 16) == [alone] * 16


@pytest.mark.parametrize("seed", range(6))
def test_a_batch_gets_the_best_shapes_there_are(seed: int) -> None:
    """By trying every number of drafts and masks that the widest sequence may have."""
    random = np.random.default_rng(seed)
    planner = Planner(noisy_costs(4, COSTS["135M"], 0.1, random), Experience(4))
    planner.solve()
    planner.layouts([[1.0]], [100])  # the first step solves once more
    reach = [np.cumprod([1.0, *random.uniform(0.2, 1, random.integers(0, 5))]).tolist() for _ in range(3)]
    verified = np.array([shape.regular - 1 for shape in planner.shapes.layouts])
    masks = np.array([shape.masks for shape in planner.shapes.layouts])
    worth = np.array([planner._weights[:, : len(own)] @ own for own in reach]).T
    best = (np.inf, [0, 0, 0])
    for d, m in {(int(d), int(m)) for d in verified for m in masks}:
        fits = [(verified <= d) & (masks <= m) & (verified < len(own)) for own in reach]
        chosen = [int(np.where(fit, own, np.inf).argmin()) for fit, own in zip(fits, worth.T, strict=True)]
        mean = np.mean([own[index] for own, index in zip(worth.T, chosen, strict=True)])
        best = min(best, (planner.prices.table[d, m] + mean, chosen))
    found = planner.layouts(reach, [100] * 3)
    wide = max(shape.regular for shape in found) - 1, max(shape.masks for shape in found)
    mean = np.mean([own[planner.shapes.layouts.index(shape)] for own, shape in zip(worth.T, found, strict=True)])
    assert planner.prices.table[wide] + mean == pytest.approx(best[0])


def test_drafts_alone_are_weighed_as_all_shapes_are() -> None:
    """Where masks are worth nothing the short way gives what the long one gives."""
    random = np.random.default_rng(0)
    experience = Experience(4)
    for _ in range(300):  # a drafter that is sure and always wrong
        experience.calibration.decided(experience.made([0.9] * 4), 0)
    planner = Planner(noisy_costs(4, COSTS["135M"], 0.0, random), experience)
    planner.solve()
    assert not planner._hangs_masks
    verified = []
    for _ in range(50):
        reach = [np.cumprod([1.0, *random.uniform(0.1, 1, random.integers(0, 5))]).tolist() for _ in range(5)]
        urgency = random.uniform(0, 2, 5).tolist()
        short = planner._best_together(reach, urgency)
        planner._hangs_masks, planner._dearer = True, [-1.0] * 5  # which rules the short ways out
        long = planner._best_together(reach, urgency)
        planner._hangs_masks = False
        planner._correct_costs()
        assert [planner.shapes.layouts[index] for index in short] == [planner.shapes.layouts[index] for index in long]
        verified += [planner.shapes.layouts[index].regular - 1 for index in short]
    assert sum(verified) > 0 and min(verified) == 0


def test_drafts_too_unlikely_at_rest_are_those_that_no_number_of_would_pay() -> None:
    """For one sequence whose drafts behind the first all hold; of no less likely ones would any be verified."""
    costs = Costs({1: 1.0, 2: 1.4, 3: 1.5, 5: 2.5}, {2: 2.0, 21: 21.0}, {4: 0.1})
    planner = Planner(costs, Experience(4))
    assert planner.least_chance == pytest.approx(0.25)  # two for half a step
    for chance, verified in ((0.99, False), (1.01, True)):
        reach = [[1.0] + [chance * planner.least_chance] * 4]
        (index,) = planner._drafts_alone(reach, planner._gained(reach, [1.0]))
        assert (planner.shapes.layouts[index].regular > 1) == verified


def test_the_sequence_that_ends_last_is_the_most_urgent() -> None:
    """Steps of 1, 2 and 3 sequences take 4, 5 and 6: without the last there would be four sixths less to do."""
    experience = Experience(4)
    planner = Planner(noisy_costs(4, COSTS["1B"], 0.0, np.random.default_rng(0)), experience)
    costs = noisy_costs(4, COSTS["1B"], 0.0, np.random.default_rng(0))
    planner.reprice(costs, np.array([4.0, 5.0, 6.0]))
    experience.stopped = 0.0
    assert planner.urgency([10, 90, 20], False) == pytest.approx([0.5, 2.0, 0.5])
    assert planner.urgency([10, 90, 90], False) == pytest.approx([0.5, 1.25, 1.25])
    assert planner.urgency([10, 90, 20], True) == [1.0] * 3  # another takes its place
    for _ in range(200):
        experience.ended(True)
    assert planner.urgency([10, 90, 20], False) == pytest.approx([1.0] * 3, abs=1e-3)  # nobody knows the last


def test_drafts_of_an_urgent_sequence_are_verified_before_others() -> None:
    planner = Planner(noisy_costs(4, COSTS["135M"], 0.0, np.random.default_rng(0)), Experience(4))
    planner.solve()
    reach = [[1.0], [1.0, 0.25], [1.0], [1.0]]
    for urgency, drafts in (([1.0] * 4, 0), ([0.1, 3.7, 0.1, 0.1], 1)):
        assert [layout.regular - 1 for layout in planner.layouts(reach, [100] * 4, urgency)] == [0, drafts, 0, 0]


def test_other_numbers_of_sequences_cost_what_lies_between() -> None:
    tables = {
        1: Costs({1: 1.0, 3: 2.0}, {2: 2.0, 9: 4.0}, {8: 1.0}),
        4: Costs({1: 4.0, 3: 5.0}, {2: 8.0, 9: 10.0}, {8: 4.0}),
        8: Costs({1: 4.0, 3: 6.0}, {2: 8.0}, {8: 4.0}),
    }
    assert of_batch(tables, 4) is tables[4]
    assert of_batch(tables, 3) == Costs({1: 3.0, 3: 4.0}, {2: 6.0, 9: 8.0}, {8: 3.0})
    assert of_batch(tables, 6) == Costs({1: 4.0, 3: 5.5}, {2: 8.0}, {8: 4.0})
    assert plain_steps(tables, 5).tolist() == [1.0, 2.0, 3.0, 4.0, 4.0]


def test_sequences_that_share_a_step_are_expected_to_gain_what_they_do_on_average() -> None:
    """Half the blocks surely hold, half surely fail: alone the former are worth a wide step, together they are not."""
    experience = Experience(4)
    for number in range(32):
        experience.made([0.99 if number % 2 else 0.01] * 4)
    costs = Costs({1: 1.0, 5: 2.6}, {2: 2.0, 25: 3.6}, {4: 0.0})
    planner = Planner(costs, experience)
    planner.solve()
    alone = planner.per_token
    assert planner.gain == pytest.approx(1 / alone - 1) and planner.gain > 0.05
    planner.reprice(costs, np.ones(16))
    planner.solve()
    assert planner.per_token > 1.05 * alone


def test_means_are_of_as_many_in_a_row() -> None:
    chances = np.arange(10.0).reshape(5, 2)
    assert means(chances, 1) == pytest.approx(chances)
    assert means(chances, 2) == pytest.approx((chances[1:] + chances[:-1]) / 2)
    assert means(chances, 9) == pytest.approx(chances.mean(0, keepdims=True))


class Unpriced(Costs):
    def steps(self, masks: int) -> Floats:
        raise AssertionError("priced")


def test_a_batch_that_thins_out_is_priced_when_that_is_asked_for() -> None:
    planner = Planner(Costs({1: 4.0}, {2: 5.0, 25: 9.0}, {4: 0.0}), Experience(4))
    planner.reprice(Unpriced({}, {}, {}), np.array([1.0, 3.0]))
    planner.took(plain(), 3.0)
    assert planner.prices.plain_seconds == 3.0 and planner.sequences == 2
    with pytest.raises(AssertionError, match="priced"):
        planner.layouts([[1.0]] * 2, [10, 10])


def test_a_solution_is_scaled_to_fewer_sequences_and_soon_renewed() -> None:
    experience = Experience(4)
    costs_of = {size: Costs({1: size}, {2: 1.1 * size, 25: 3.0 * size}, {4: 0.0}) for size in (1.0, 4.0)}
    planner = Planner(costs_of[4.0], experience)
    planner.solve()
    before, value = planner.per_token, planner.value.copy()
    planner.reprice(costs_of[1.0], np.ones(1))
    planner._price()
    assert planner.per_token == pytest.approx(before / 4) and planner.value == pytest.approx(value / 4)
    planner.solve()
    assert planner.per_token == pytest.approx(before / 4)


def test_blocks_of_a_batch_are_of_all_its_phases() -> None:
    """The last of its texts, decoded alone, says as much about the next batch as all that came before, not more."""
    experience = Experience(4)
    experience.begin_text(16)
    for confidence, steps in ((0.1, 16 * 20), (0.9, 100)):
        for _ in range(steps):
            experience.made([confidence] * 4)
    first = experience.recent_reach()[0][:, 1]
    assert len(first) <= 32 + 1 and np.isclose(first, 0.9).mean() == pytest.approx(0.5 + 0.5 * 84 / 404, abs=0.05)
    experience.begin_text(1)
    assert np.isclose(experience.recent_reach()[0][:, 1], 0.9).mean() == pytest.approx(100 / 420, abs=0.05)


@pytest.mark.parametrize(("left", "tried"), [(50, True), (SHORT, False)])
def test_a_batch_at_rest_that_thins_out_is_solved_for_again(left: int, tried: bool) -> None:
    """Masks are worth nothing to four sequences and much to two, if there is time left."""
    tables = {
        1: Costs(regular={1: 1.0, 9: 1.1}, masked={2: 1.1, 25: 1.5, 81: 3.0}, drafts={8: 0.05}),
        2: Costs(regular={1: 1.2, 9: 1.3}, masked={2: 1.3, 25: 2.0, 81: 4.0}, drafts={8: 0.05}),
        4: Costs(regular={1: 1.5, 9: 12.0}, masked={2: 12.0, 81: 60.0}, drafts={8: 0.1}),
    }
    experience = Experience(8)
    for _ in range(32):
        experience.made([0.9] * 8)
    planner = Planner(tables[1], experience)
    planner.reprice(tables[4], plain_steps(tables, 4))
    planner.solve()
    assert not planner.layouts([[1.0]] * 4, [100] * 4)[0].masks
    for _ in range(SETTLED):
        planner.layouts([[1.0]] * 4, [100] * 4)
    assert planner.rests(100)
    planner.reprice(tables[2], plain_steps(tables, 2))
    assert planner.rests(left) != tried
    if tried:
        assert planner.layouts([[1.0]] * 2, [left] * 2)[0].masks
        planner.reprice(tables[4], plain_steps(tables, 4))
        assert not planner.rests(100)


@pytest.mark.parametrize("sequences, beginnings", [(1, 4), (4, 1), (16, 1)])
def test_texts_in_vain_are_counted_not_batches(sequences: int, beginnings: int) -> None:
    """After four texts in which nothing paid the next does not begin with masks."""
    experience = Experience(8)
    tables = {size: noisy_costs(8, COSTS["135M"], 0.0, np.random.default_rng(0)) for size in (1, 16)}
    planner = Planner(tables[1], experience)
    for number in range(beginnings + 2):
        experience.begin_text(sequences)
        planner.reprice(of_batch(tables, sequences), plain_steps(tables, sequences))
        planner.begin_text()
        for step in range(12):
            if sequences > 1 and planner.rests(100):
                continue
            layouts = planner.layouts([[1.0]] * sequences, [100] * sequences)
            if step == 0:
                assert bool(layouts[0].masks) == (number <= beginnings - 1 or number % 4 == 0), number
            for layout in layouts:
                if layout.masks:
                    experience.made([0.01] * layout.masks)


def test_a_batch_soon_learns_that_confidence_was_misplaced() -> None:
    """A step of 16 sequences tells as much as 16 of one: drafts that never hold are not made eight times over."""
    tables = {size: Costs({1: size, 9: 1.5 * size}, {2: 1.2 * size, 81: 5.0 * size}, {8: 0.1}) for size in (1, 16)}
    experience = Experience(8)
    planner = Planner(tables[1], experience)
    experience.begin_text(16)
    planner.reprice(tables[16], plain_steps(tables, 16))
    planner.begin_text()
    logits, made = experience.made([0.9] * 8), 0
    while planner.layouts([[1.0]] * 16, [100] * 16)[0].masks and made < 8:
        made += 1
        for _ in range(16):
            experience.made([0.9] * 8)
            experience.calibration.decided(logits, 0)
    assert 1 <= made <= 4


def test_what_so_many_sequences_cost_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of a batch end one after another, in every batch anew."""
    tables = {size: Costs({1: float(size)}, {2: 1.1 * size, 25: 3.0 * size}, {4: 0.0}) for size in (1, 2, 4)}
    priced: list[Costs] = []
    plainly = Costs.steps

    def spied(self: Costs, masks: int) -> Floats:
        priced.append(self)
        return plainly(self, masks)

    planner = Planner(tables[1], Experience(4))
    monkeypatch.setattr(Costs, "steps", spied)
    for _ in range(3):
        for size in (4, 2):
            planner.reprice(tables[size], plain_steps(tables, size))
            urgency = planner.urgency([10] * size, False)
            assert planner.prices.plain_seconds == size and urgency == pytest.approx([1.0] * size)
    assert priced == [tables[4], tables[2]]
    planner.reprice(changed := tables[2].scaled(2.0), plain_steps(tables, 2))
    planner.urgency([10] * 2, False)
    assert priced[2:] == [changed]
