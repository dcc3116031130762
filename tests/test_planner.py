"""The planner in simulation, against the exact optimum; its parts against their definitions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from foretell import native
from foretell.config import DecodeConfig
from foretell.decoding import costs as costs_module
from foretell.decoding.adaptive import Adaptive
from foretell.decoding.calibration import Calibration, Experience, log_odds
from foretell.decoding.costs import Costs, costs, interpolated, masked_layout
from foretell.decoding.planner import SOLVE_EVERY, TEXTS, Planner
from foretell.decoding.shapes import ahead, shapes
from foretell.decoding.strategies import Running
from foretell.decoding.trials import SETTLED
from foretell.evaluation.acceptance_profiles import named_profile
from foretell.evaluation.optimum import by_width, optimum
from foretell.evaluation.simulation import noisy_costs, simulate
from foretell.layout import Block, Layout, linear, plain, quadratic

from .models import random_prompt, reference, tiny_model

COSTS = {
    "1B": by_width({1: 1.0, 9: 1.05, 17: 1.21, 25: 1.52, 45: 2.19, 81: 3.64}),
    "135M": by_width({1: 1.0, 9: 1.31, 17: 1.52, 25: 1.92, 81: 3.71}),
    "idle": by_width({1: 1.0, 81: 1.3}),
}
CASES = [(shape, name) for shape in COSTS for name in ("gsm8k", "alpacaeval")]


@pytest.mark.parametrize(("shape", "name"), CASES)
def test_near_the_optimum_without_being_told(shape: str, name: str) -> None:
    profile, cost = named_profile(name), COSTS[shape]
    best = optimum(profile, cost).rate
    assert simulate(profile, cost, 3000, cost_noise=0.02) > 0.97 * best
    # The optimum knows no confidences. They are worth much where drafts often hold, and little where they seldom do.
    informed = simulate(profile, cost, 3000, informed=0.5, cost_noise=0.02)
    assert informed > (1.02 if name == "gsm8k" else 0.98) * best


@pytest.mark.parametrize("shape", COSTS)
def test_costs_little_where_nothing_holds(shape: str) -> None:
    assert simulate([0.01] * 8, COSTS[shape], 2000) > 0.97


@pytest.mark.parametrize(("shape", "name"), CASES)
def test_policy_iteration_finds_the_optimum(shape: str, name: str) -> None:
    profile, cost = named_profile(name), COSTS[shape]
    experience = Experience(8)
    chances = np.array(profile) / np.array([1.0, *profile[:-1]])
    experience.made(chances.tolist())  # confidences are believed at first
    exact = Costs({w: cost(w, 0) for w in range(1, 10)}, {w: cost(1, w - 1) for w in range(2, 82)}, {8: 0.0})
    planner = Planner(exact, experience)
    planner.solve()
    assert 0.99 < 1 / planner.per_token / optimum(profile, cost).rate < 1.0001  # of all layouts, not only of `shapes`


def planned(shape: str, chances: list[float], at_hand: int) -> Layout:
    """The layout chosen once the planner has seen blocks of drafts with these chances."""
    experience = Experience(8)
    for _ in range(32):
        experience.made(chances)
    planner = Planner(noisy_costs(8, COSTS[shape], 0.0, np.random.default_rng(0)), experience)
    planner.solve()
    (layout,) = planner.layouts([np.cumprod([1.0, *chances[:at_hand]]).tolist()], [1000])
    return layout


def test_plain_where_nothing_holds_wide_where_width_is_free_narrow_where_it_is_dear() -> None:
    assert planned("135M", [0.01] * 8, 0) == Layout(1)
    assert planned("idle", [0.8] * 8, 8).width > 60
    dear = planned("135M", [0.85] * 8, 7)
    assert dear.masks <= 8 and dear.regular > 5  # as linear: it hangs masks only where they will very likely be used


def test_unsure_drafts_are_not_verified() -> None:
    sure = [0.95, 0.95, 0.95, 0.02, 0.9, 0.9, 0.9, 0.9]
    assert planned("135M", sure, 8).regular == 4


def test_costs_follow_what_steps_really_take() -> None:
    """Measured where masks seemed cheap: once they prove dear, fewer are hung, and none if they are not worth it."""
    cheap = noisy_costs(8, COSTS["idle"], 0.0, np.random.default_rng(0))
    planner = Planner(cheap, experience := Experience(8))
    for _ in range(32):
        experience.made([0.6] * 8)
    planner.solve()
    (before,) = planner.layouts([[1.0]], [1000])
    plain_seconds, masked_seconds = planner.prices.table[0, 0], planner.prices.table[0, 8]
    for _ in range(5):
        planner.took(before, 9.0)
    planner.solve()
    assert planner.prices.table[0, 8] == masked_seconds  # one odd step, or five, is no rule
    for _ in range(64):
        planner.took(plain(), 2.0)  # a machine half as fast
        planner.took(plain(2), 2.4)
        planner.took(Layout(1, (Block(0, 8),)), 2.0 * 5.0)
    planner.solve()
    assert planner.prices.table[0, 0] == pytest.approx(2.0 * plain_seconds)
    assert planner.prices.table[1, 0] == pytest.approx(2.4)
    assert planner.prices.table[0, 8] == pytest.approx(10.0) and planner.prices.table[3, 8] > 10.0
    (after,) = planner.layouts([[1.0]], [1000])
    assert before.masks > 0 and after.masks == 0


def test_what_is_not_timed_is_as_fast_as_what_is() -> None:
    planner = Planner(noisy_costs(4, COSTS["1B"], 0.0, np.random.default_rng(0)), Experience(4))
    ratio = planner.prices.table[0, 4] / planner.prices.table[0, 0]
    for _ in range(20):
        planner.took(plain(), 3.0)
    planner.solve()
    assert planner.prices.table[0, 0] == pytest.approx(3.0)
    assert planner.prices.table[0, 4] / planner.prices.table[0, 0] == pytest.approx(ratio)


def test_what_is_not_timed_is_not_taken_for_faster() -> None:
    """Plain steps may be faster than measured for reasons of their own, such as a shorter text."""
    planner = Planner(noisy_costs(4, COSTS["1B"], 0.0, np.random.default_rng(0)), Experience(4))
    before = planner.prices.table.copy()
    for _ in range(20):
        planner.took(plain(), 0.5)
    planner.solve()
    assert planner.prices.table[0, 0] == pytest.approx(0.5)
    assert planner.prices.table[:, 1:] == pytest.approx(before[:, 1:]) and planner.prices.table[1:, 0] == pytest.approx(
        before[1:, 0]
    )


def test_probes_become_rare_but_never_end() -> None:
    experience = Experience(8)
    planner = Planner(noisy_costs(8, COSTS["135M"], 0.0, np.random.default_rng(0)), experience)
    for _ in range(300):  # a drafter that is sure and always wrong
        experience.calibration.decided(experience.made([0.9] * 8), 0)
    planner.solve()
    probes = [n for n in range(2000) if planner.layouts([[1.0]], [10**6])[0].masks]
    gaps = np.diff(probes)
    assert len(probes) > 7 and gaps[0] < 80 and gaps[-1] > 200


def teach(calibration: Calibration, blocks: list[tuple[list[float], int]]) -> None:
    for logits, held in blocks:
        calibration.decided(logits, held)
    calibration.learn()


@pytest.mark.parametrize("at_a_time", [1, 16])
def test_calibration_learns_what_confidences_are_worth(at_a_time: int) -> None:
    random = np.random.default_rng(0)
    calibration = Calibration(4)
    told = [log_odds(chance) for chance in (0.9, 0.7, 0.9, 0.7)]
    true = np.array([0.6, 0.5, 0.3, 0.2])  # overconfident, the more the further ahead
    for _ in range(1600 // at_a_time):
        held = np.cumprod(random.random((at_a_time, 4)) < true, axis=1).sum(1)
        teach(calibration, [(told, int(count)) for count in held])
    learnt = [calibration.chance(logit, place) for place, logit in enumerate(told)]
    assert learnt == pytest.approx(true, abs=0.12)
    assert learnt[:2] == pytest.approx(true[:2], abs=0.06)
    assert calibration.reach(told) == pytest.approx([1.0, *np.cumprod(learnt)])


def test_calibration_never_overshoots() -> None:
    """A drafter that is sure and always wrong, many blocks at once; then one that is never sure and always right."""
    calibration = Calibration(2)
    for told, held in ((6.0, 0), (-6.0, 2)):
        for blocks in (64, 1, 1):
            teach(calibration, [([told, told], held)] * blocks)
            assert 0 < calibration.chance(told, 0) < 1
        assert round(calibration.chance(told, 0)) == bool(held)


def test_calibration_starts_with_the_confidences() -> None:
    told = [0.2, 0.5, 0.97]
    calibration = Calibration(3)
    assert [calibration.chance(log_odds(p), place) for place, p in enumerate(told)] == pytest.approx(told)


def test_log_odds_of_anything() -> None:
    assert [log_odds(p) for p in (0.0, 0.5, 1.0, 1 - 1e-12, float("nan"))] == [-6.0, 0.0, 6.0, 6.0, -6.0]


@pytest.mark.parametrize("several", [False, True])
def test_shapes_hold_the_fixed_strategies(several: bool) -> None:
    found = shapes(8, several)
    assert {Layout(1), linear(8, 8), quadratic(8, 8), quadratic(8, 4), plain(9)} <= set(found.layouts)
    assert len(set(found.layouts)) == len(found.layouts) < (300 if several else 2000)
    assert {linear(1, 1), quadratic(1, 1), plain(1), plain(2)} <= set(shapes(1, several).layouts)
    for d, (start, end) in enumerate(zip(found.starts, found.ends, strict=True)):
        assert {layout.regular - 1 for layout in found.layouts[start:end]} == {d}
        assert found.layouts[start] == plain(d + 1)


def test_the_least_of_shapes_that_fit() -> None:
    found, random = shapes(4, several=True), np.random.default_rng(0)
    weights, urgency, reach = random.random((len(found.layouts), 5)), [0.3, 2.0, 0.7], [[1.0], [1.0, 0.4], [1.0] * 5]
    worth = found.shared.weights(weights) @ ahead(reach, urgency, 5)
    least = found.shared.least(worth)
    assert least.shape == (5, len(found.totals), 3)
    for d in range(5):
        for column, total in enumerate(found.totals):
            best = found.shared.best(worth, d * len(found.totals) + column)
            for b, own in enumerate(reach):
                fits = [
                    index
                    for index, layout in enumerate(found.layouts)
                    if layout.regular <= min(d + 1, len(own)) and layout.masks <= total
                ]
                expected = weights[fits, : len(own)] @ own * urgency[b]
                assert least[d, column, b] == pytest.approx(expected.min())
                assert best[b] == fits[expected.argmin()]


def test_what_a_shape_is_worth() -> None:
    """Against the sum of docs/planner.md, for a shape with three blocks."""
    experience = Experience(4)
    planner = Planner(noisy_costs(4, COSTS["1B"], 0.0, np.random.default_rng(0)), experience)
    planner.solve()
    reach, left = [1.0, 0.9, 0.5, 0.1], planner.value + planner.prices.drafting
    for index, shape in enumerate(planner.shapes.layouts):
        drafts, masks = shape.regular - 1, dict(shape.blocks)
        if drafts > 3:
            continue
        ends = [reach[r] - (reach[r + 1] if r < drafts else 0.0) for r in range(drafts + 1)]
        expected = sum(p * left[masks.get(r, 0)] for r, p in enumerate(ends)) - planner.per_token * sum(
            reach[: drafts + 1]
        )
        assert planner._weights[index, :4] @ reach == pytest.approx(expected)


def test_interpolation_never_falls_and_goes_on() -> None:
    """A narrow step that was disturbed makes no wider one dearer."""
    assert interpolated({1: 1.0, 3: 3.0, 5: 2.0, 9: 5.0}, np.array([1, 2, 4, 7, 11])) == pytest.approx(
        [1.0, 1.5, 2.0, 3.5, 6.5]
    )


@pytest.mark.parametrize("width", range(2, 26))
def test_masked_layouts_have_their_width(width: int) -> None:
    layout = masked_layout(width, 4)
    assert layout.width == width and layout.masks >= 1
    assert masked_layout(25, 4) == Layout(5, tuple(reversed(quadratic(4, 4).blocks)))


def test_costs_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny_model()
    config = DecodeConfig()
    found = costs(model, config)
    assert min(min(table.values()) for table in vars(found).values()) > 0
    (path,) = tmp_path.rglob("*.json")

    def checks_only(model: object, config: object, batch: int, widths: Sequence[int] | None = None) -> Costs:
        if widths is None:
            raise AssertionError("measured again")
        return Costs({1: found.regular[1] * 3}, {9: found.masked[9] * 3 * drift}, {})  # a slower machine, as a whole

    monkeypatch.setattr(costs_module, "measure", checks_only)
    drift = 1.1
    assert costs(model, config) == found.scaled(3)  # the machine as a whole
    drift = 1.3
    with pytest.raises(AssertionError, match="measured again"):
        costs(model, config)
    drift = 1.0
    path.write_text(json.dumps({"seconds": {"masked": {"2": 7.0}, "regular": {}, "drafts": {}}}))
    with pytest.raises(AssertionError, match="measured again"):
        costs(model, config)
    path.write_text("{")
    with pytest.raises(AssertionError, match="measured again"):
        costs(model, config)
    with pytest.raises(AssertionError, match="measured again"):
        costs(model, config, batch=2)


def test_the_drafting_of_a_batch_is_timed_on_texts_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences alike would read the same few rows of the unembedding, and be done with as soon as one is."""
    texts = []

    def noting(model: object, latents: torch.Tensor, before: torch.Tensor, *rest: object, **options: object) -> None:
        texts.append(before[:, 0].tolist())

    monkeypatch.setattr(costs_module, "draft", noting)
    costs_module.measure(tiny_model(), DecodeConfig(masks=4), batch=3)
    assert texts and all(len(set(tokens)) == 3 for tokens in texts)


def test_every_draft_teaches_once_its_fate_is_known() -> None:
    """Drafts 5 6 7; the text goes on 5 6, then 8: two held, one did not, though no step verified them."""
    experience = Experience(3)
    taught: list[int] = []
    experience.calibration.decided = lambda logits, held, evidence: taught.append(held)  # type: ignore[method-assign]
    planner = Planner(noisy_costs(3, by_width({1: 1.0, 16: 3.0}), 0.0, np.random.default_rng(0)), experience)
    strategy, row = Adaptive(lambda sequences: planner, experience), Running(0, 100, [1], drafts=3)
    strategy.drafted([row], torch.tensor([[5, 6, 7]]), torch.full((1, 3), 0.5))
    strategy.decided(row, [5])
    strategy.drafted([row], torch.tensor([[6, 8, 9]]), torch.full((1, 3), 0.5))
    strategy.decided(row, [6])
    assert taught == []
    strategy.decided(row, [8, 9, 4])
    assert taught == [2, 3]


def test_adaptive_decoding_changes_nothing() -> None:
    model = tiny_model()
    for length in (1, 12):
        prompt = random_prompt(length)
        expected = reference(model.base.lm, prompt, 60)
        assert model.generate(input_ids=prompt, max_new_tokens=60, strategy="adaptive").token_ids == expected


def test_plans_must_beat_plain_steps_that_nobody_plans() -> None:
    """Masks seem to pay beside plain steps with planning, drafts looked for and all, but not beside those at rest."""
    experience = Experience(8)
    for _ in range(32):
        experience.made([0.7] * 8)
    planner = Planner(Costs({1: 2.0, 9: 2.6}, {2: 3.0, 81: 30.0}, {8: 0.2}), experience)
    for _ in range(64):
        planner.took(plain(), 2.0)
    planner.solve()
    assert planner.per_token < 2.0 and planner.gain > 0
    (before,) = planner.layouts([[1.0]], [1000])
    for _ in range(64):
        planner.took(plain(), 1.0, resting=True)
    planner.solve()
    (after,) = planner.layouts([[1.0]], [1000])
    assert before.masks and after == plain() and planner.gain < 0


def counting(patch: pytest.MonkeyPatch) -> tuple[Planner, list[int]]:
    """A planner that has solved once and from then on only counts."""
    native.library()  # to compile it is no part of a solution
    planner, solutions = Planner(noisy_costs(4, COSTS["1B"], 0.0, np.random.default_rng(0)), Experience(4)), list[int]()
    planner.solve()
    patch.setattr(planner, "solve", lambda: solutions.append(0))
    return planner, solutions


def test_where_texts_are_of_a_kind_the_next_one_is_not_solved_for_as_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    planner, solutions = counting(monkeypatch)

    def first_solution(pays: bool) -> int:
        """The step before which a new text, behind one in which masks paid or not, is first solved for."""
        planner._paid = pays
        planner.begin_text()
        before = len(solutions)
        return next(step for step in range(99) if planner.layouts([[1.0]], [1000]) and len(solutions) > before)

    course = [True] * (TEXTS + 2) + [False, True]
    assert [first_solution(pays) for pays in course] == [SETTLED] * len(course)  # masks pay in all, but not alike
    planner._alike, planner._paid_before, planner.experience.alike = 0, True, True
    found = [first_solution(pays) for pays in course]
    assert found == [SETTLED] * (TEXTS - 1) + [SOLVE_EVERY[0]] * 3 + [SETTLED] * 2


def test_texts_of_a_kind_too_short_for_a_solution_meet_one_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    planner, solutions = counting(monkeypatch)
    planner._alike = TEXTS
    for _ in range(40):
        planner.experience.alike = True
        planner.begin_text()
        for _ in range(SOLVE_EVERY[0] - 3):
            planner.layouts([[1.0]], [1000])
    assert 40 * (SOLVE_EVERY[0] - 3) / SOLVE_EVERY[1] - 1 <= len(solutions) <= 40
