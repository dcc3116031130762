"""The planner where sequences that share a step need not have as many rows each."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from foretell.decoding.calibration import Experience, Floats
from foretell.decoding.costs import Costs
from foretell.decoding.ragged import PROBED, RaggedPlanner
from foretell.decoding.shapes import cheapest, shapes
from foretell.evaluation.optimum import optimum
from foretell.layout import linear, plain

SEQUENCES = 8
PROFILE = [0.84, 0.74, 0.63, 0.54, 0.45, 0.40, 0.35, 0.27]  # method.md: GSM8k
WIDTHS = (1.5, 2.0, 3.0, 5.0, 9.0, 81.0)


def costs(free: float, row: float) -> Costs:
    """Steps take 64 ms up to a mean width `free`, and so many milliseconds for each row of all beyond."""
    seconds = {width: 0.064 + row / 1000 * SEQUENCES * max(0.0, width - free) for width in (1.0, *WIDTHS)}
    return Costs(seconds, {width: seconds[width] for width in WIDTHS}, {1: 0.0, 8: 0.0})


def planner_of(found: Costs, profile: list[float] = PROFILE) -> RaggedPlanner:
    """One that knows what to expect."""
    experience = Experience(8)
    reach, none = np.tile([1.0, *profile], (32, 1)), np.eye(1, 9).repeat(32, 0)
    experience.recent_reach = lambda: (reach, none)  # type: ignore[method-assign]
    planner = RaggedPlanner(found, experience)
    planner.reprice(found, 0.064 * np.linspace(0.8, 1, SEQUENCES))
    return planner


@pytest.mark.parametrize("seed", range(8))
def test_the_cheapest_widths_there_are(seed: int) -> None:
    random = np.random.default_rng(seed)
    widths = np.array([1, 2, 3, 5, 9])
    slopes = -np.sort(-random.uniform(0, 1, (4, 3)), axis=0)  # each row is worth less than the one before it
    least = np.vstack([np.zeros(3), -np.cumsum(slopes * np.diff(widths)[:, None], 0)])
    seconds = 10 + np.cumsum(np.sort(random.uniform(0, 1.5, 25)))
    total, picks = cheapest(seconds, widths, least)

    def cost(chosen: tuple[int, ...]) -> float:
        return float(seconds[widths[list(chosen)].sum() - 3] + least[list(chosen), range(3)].sum())

    assert total == pytest.approx(cost(tuple(picks.tolist())))
    best, worst = min(map(cost, product(range(5), repeat=3))), cost((0, 0, 0))
    assert total - best <= 0.1 * (worst - best)


def test_like_sequences_share_what_is_free() -> None:
    """Four rows more cost nothing, a fifth much: four of eight get one."""
    seconds = 10 + np.maximum(0.0, np.arange(100.0) - 4)
    least = np.array([[0.0], [-0.5], [-0.6]]).repeat(8, 1)
    total, picks = cheapest(seconds, np.array([1, 2, 3]), least)
    assert total == pytest.approx(10 - 4 * 0.5)
    assert sorted(picks.tolist()) == [0] * 4 + [1] * 4


def test_ragged_shapes_begin_with_single_masks() -> None:
    found = shapes(8, several=True, ragged=True)
    layouts = set(found.layouts)
    assert {linear(d, m) for d in range(9) for m in (1, 2, 4, 8)} <= layouts
    assert set(shapes(8, several=True).layouts) <= layouts and len(layouts) < 400
    assert found.widths.tolist() == [layout.width for layout in found.layouts]


def test_sure_drafts_of_one_sequence_are_verified_without_the_others() -> None:
    planner = planner_of(costs(2.5, 4.0), [0.02] * 8)
    sure = [1.0, 0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.93, 0.92]
    for _ in range(4):
        layouts = planner.layouts([sure] + [[1.0, 0.05]] * 7, [100] * SEQUENCES)
        if not any(layout.masks for layout in layouts):  # it may try some
            assert layouts == [plain(9)] + [plain()] * 7
            break
    else:
        raise AssertionError("it never stops trying")


def test_small_models_are_planned_for_together() -> None:
    """Where a step takes as long as a few choices, all sequences have one width."""
    found = costs(1.5, 1.0)
    small = Costs(
        *({key: value / 100 for key, value in table.items()} for table in (found.regular, found.masked)), {1: 0}
    )
    assert planner_of(found).prices.ragged
    planner = planner_of(small)
    planner.reprice(small, 0.00064 * np.linspace(0.8, 1, SEQUENCES))
    planner.layouts([[1.0]] * SEQUENCES, [100] * SEQUENCES)
    assert not planner.prices.ragged and planner.shapes.layouts == shapes(8, several=True).layouts
    planner.probe_soon()
    assert all(layout.masks for layout in planner.layouts([[1.0]] * SEQUENCES, [100] * SEQUENCES))


def test_masks_are_tried_on_a_few() -> None:
    planner = planner_of(costs(1.0, 40.0), [0.02] * 8)
    planner.probe_soon()
    layouts = planner.layouts([[1.0]] * SEQUENCES, [100] * SEQUENCES)
    assert [layout.masks > 0 for layout in layouts] == [True] * PROBED + [False] * (SEQUENCES - PROBED)
    assert planner.layouts([[1.0]] * SEQUENCES, [100] * SEQUENCES) == [plain()] * SEQUENCES


def simulated(planner: RaggedPlanner, steps: int) -> float:
    """Tokens per second where drafts hold by the profile"""
    random = np.random.default_rng(0)
    drafts, tokens, seconds = [0] * SEQUENCES, 0, 0.0
    for _ in range(steps):
        layouts = planner.layouts([[1.0, *PROFILE[:count]] for count in drafts], [10_000] * SEQUENCES)
        beyond = sum(layout.width for layout in layouts) - SEQUENCES
        seconds += float(
            (planner.prices.with_masks if any(one.masks for one in layouts) else planner.prices.without)[beyond]
        )
        for b, layout in enumerate(layouts):
            held = int((np.array(PROFILE[: layout.regular - 1]) > random.random()).sum())
            tokens += held + 1
            drafts[b] = dict(layout.blocks).get(held, 0)
    return tokens / seconds


def bound(seconds: Floats) -> float:
    """Tokens per second that no policy exceeds: convex costs lie above each of their tangents, and steps that cost what
    one of these says leave every sequence to itself."""
    rates = []
    for beyond in range(1, 4 * SEQUENCES, 2):
        slope = (seconds[beyond + 1] - seconds[beyond - 1]) / 2
        fixed = seconds[beyond] - slope * beyond

        def cost(regular: int, masks: int, fixed: float = fixed, slope: float = slope) -> float:
            return fixed / SEQUENCES + slope * (regular + masks - 1)

        rates.append(optimum(PROFILE, cost).rate)
    return min(rates)


@pytest.mark.parametrize("free, row", [(1.5, 1.0), (1.5, 2.0), (2.0, 2.5), (1.0, 0.7)])
def test_it_comes_close_to_what_is_possible(free: float, row: float) -> None:
    planner = planner_of(costs(free, row))
    rate = simulated(planner, 1500)
    assert rate >= 0.95 * bound(planner.prices.with_masks)
    assert rate > 1.1 * SEQUENCES / 0.064
