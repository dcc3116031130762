"""Costs corrected by what steps really take: level and slope over the width, whatever single steps do."""

from __future__ import annotations

import numpy as np
import pytest

from foretell.decoding.calibration import Experience
from foretell.decoding.correction import AGED, LATEST, Correction, Fit, Pace
from foretell.decoding.costs import Costs
from foretell.decoding.planner import Planner
from foretell.layout import Block, Layout


def test_nothing_is_said_from_few_steps() -> None:
    correction = Correction(4)
    for _ in range(3):
        correction.took(9, 2.0)
        assert correction.fit() is None
    correction.took(9, 2.0)
    fit = correction.fit()
    assert fit is not None and fit.factor == pytest.approx(2.0)
    assert fit.at_all(np.array([1.0, 81.0])) == pytest.approx([2.0, 2.0])  # one width tells nothing of others


def test_level_and_slope_are_found_through_disturbances() -> None:
    random = np.random.default_rng(0)
    correction = Correction(16)
    for _ in range(LATEST):
        width = int(random.choice([5, 9, 9, 13, 20]))
        share = 0.46 * (width / 9) ** 0.4 * np.exp(0.05 * random.standard_normal())
        correction.took(width, share * (4 if random.random() < 0.2 else 1))  # the machine was busy
    fit = correction.fit()
    assert fit is not None
    assert fit.at_all(np.array([5.0, 9.0, 20.0])) == pytest.approx(0.46 * np.array([5 / 9, 1, 20 / 9]) ** 0.4, rel=0.07)


def test_the_latest_steps_count() -> None:
    correction = Correction(4)
    for share in (3.0, 1.0):
        for width in [3, 9] * (LATEST // 2):
            correction.took(width, share)
    fit = correction.fit()
    assert fit is not None and fit.factor == pytest.approx(1.0)


def test_a_planner_with_too_flat_a_table_learns_what_wide_steps_take() -> None:
    """Measured while something else ran, all steps seemed as dear; then wide ones take what they take."""
    planner = Planner(Costs({1: 9.0, 9: 15.0}, {2: 16.0, 81: 24.0}, {8: 0.0}), Experience(8))

    def real(width: int) -> float:
        return 3.0 * (width / 9) ** 0.7

    for masks, regular in [(4, 1), (8, 1), (6, 7), (8, 8)] * 16:
        layout = Layout(regular, (Block(regular - 1, masks),))
        planner.took(layout, real(layout.width))
        planner.took(Layout(1), 2.0)
    planner.solve()
    assert planner.prices.table[0, 0] == pytest.approx(2.0)
    for drafts, masks in ((0, 4), (0, 8), (7, 8), (8, 16)):
        assert planner.prices.table[drafts, masks] == pytest.approx(real(drafts + 1 + masks), rel=0.15)
    assert (np.diff(planner.prices.table[:, 1:], axis=0) >= 0).all() and (
        np.diff(planner.prices.table[:, 1:], axis=1) >= 0
    ).all()


def test_means_count_but_disturbances_do_not() -> None:
    """Every fifth step has a solution of the planner's in it; every eighth met another process."""
    correction = Correction(4)
    for step in range(LATEST):
        correction.took(9, 5.0 if step % 8 == 7 else 1.3 if step % 5 == 0 else 1.0)
    fit = correction.fit()
    undisturbed = [1.3 if step % 5 == 0 else 1.0 for step in range(LATEST) if step % 8 != 7]
    assert fit is not None and fit.factor == pytest.approx(np.mean(undisturbed))


def test_drafting_is_corrected_apart_from_steps() -> None:
    planner = Planner(Costs({1: 2.0, 9: 3.0}, {2: 3.0, 81: 9.0}, {1: 1.0, 8: 1.0}), Experience(8))
    step = planner.prices.table[0, 8]
    for _ in range(LATEST):
        planner.took(Layout(1, (Block(0, 8),)), step + 2.0, drafts=8, drafting=2.0)
    planner.solve()
    assert planner.prices.table[0, 8] == pytest.approx(step) and planner.prices.drafting[8] == pytest.approx(2.0)


def test_what_is_long_ago_is_soon_outweighed_but_not_forgotten() -> None:
    correction = Correction(6)
    for now in range(LATEST):
        correction.took(9, 2.0, now)
    for now in (LATEST, AGED + LATEST - 6, 9 * AGED):
        fit = correction.fit(now)
        assert fit is not None and fit.factor == pytest.approx(2.0)
    for now in range(6):
        correction.took(9, 1.0, 9 * AGED + now)
    fit = correction.fit(9 * AGED + 6)
    assert fit is not None and fit.factor == pytest.approx(1.0)


def test_the_pace_is_what_known_kinds_of_steps_have_in_common() -> None:
    pace, known = Pace(), Fit(np.log(1.5), 0.5, np.log(9))
    assert pace.usual(7.0, 9, None) == 7.0  # may be the kind
    for _ in range(80):
        found = pace.usual(2 * 1.5 * 2**0.5, 18, known)
    assert found == pytest.approx(1.5 * 2**0.5, rel=0.1)  # it returns to the usual a little at every step
    assert pace.usual(2 * 7.0, 9, None) == pytest.approx(7.0, rel=0.1)
    found = pace.usual(2000.0, 9, known)  # a disturbance
    assert pace.usual(2 * 1.5, 9, known) == pytest.approx(1.5, rel=0.15)


def test_steps_of_a_busy_minute_are_no_dearer_than_those_of_a_quiet_one() -> None:
    """Steps with masks were seen while all took twice as long, plain ones then only in a quiet moment."""
    planner = Planner(Costs({1: 1.0, 9: 1.2}, {2: 1.2, 81: 3.0}, {8: 0.2}), Experience(8))
    masked = Layout(1, (Block(0, 8),))
    real = float(planner.prices.measured[0, 8])
    for steps, pace in ((16, 1.0), (200, 2.0)):
        for _ in range(steps):
            planner.took(masked, pace * real)
            if pace == 1.0:
                planner.took(Layout(1), 1.0, resting=True)
        planner.solve()
    for _ in range(32):
        planner.took(Layout(1), 1.0, resting=True)
    planner.solve()
    assert planner.prices.table[0, 8] / planner.prices.resting == pytest.approx(real, rel=0.2)


def test_disturbances_do_not_become_the_pace() -> None:
    """One step in twenty takes up to 2.5 times as long; what steps cost must not fall for it, however long it goes on,
    beside plain ones that nobody has seen since."""
    planner, rng = (
        Planner(Costs({1: 1.0, 9: 1.2}, {2: 1.2, 81: 3.0}, {8: 0.2}), Experience(8)),
        np.random.default_rng(0),
    )
    masked, real = Layout(1, (Block(0, 8),)), float(planner.prices.measured[0, 8])
    for _ in range(16):
        planner.took(Layout(1), 1.0, resting=True)
    for _ in range(100):
        for _ in range(32):
            disturbed = rng.uniform(1.5, 2.5) if rng.random() < 0.05 else 1.0
            planner.took(masked, real * np.exp(rng.normal(0, 0.08)) * disturbed)
        planner.solve()
    assert planner.prices.table[0, 8] == pytest.approx(real, rel=0.06)
    assert planner.prices.resting == pytest.approx(1.0, rel=0.05)
