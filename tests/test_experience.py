"""What a text is taken to promise: its own blocks, beside those of earlier ones as long as they are few."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from foretell.decoding.calibration import ALIKE, EARLIER, WINDOW, Experience, spread
from foretell.decoding.planner import Planner
from foretell.decoding.trials import SETTLED
from foretell.evaluation.optimum import by_width
from foretell.evaluation.simulation import noisy_costs

MASKS = 3


def after_texts(confidences: Sequence[Sequence[float]]) -> Experience:
    """One text after another, with blocks of drafts of these confidences; then a new one begins."""
    experience = Experience(MASKS)
    for text in confidences:
        experience.begin_text()
        for confidence in text:
            experience.made([confidence] * MASKS)
    experience.begin_text()
    return experience


def own_share(experience: Experience, confidence: float = 0.99) -> float:
    """Of the blocks that stand for those to come, those of this confidence."""
    chance = experience.calibration.reach([np.log(confidence / (1 - confidence))])[1]
    return float(np.isclose(experience.recent_reach()[0][:, 1], chance).mean())


@pytest.mark.parametrize("count", [0, 1, 5, WINDOW])
def test_a_first_text_stands_for_itself(count: int) -> None:
    experience = after_texts([])
    for _ in range(count):
        experience.made([0.99] * MASKS)
    reach, found = experience.recent_reach()
    assert len(reach) == len(found) == max(1, count) and own_share(experience) == (1.0 if count else 0.0)


def test_a_new_texts_blocks_count_more_where_texts_differ_more_than_blocks() -> None:
    """By the best guess at the mean of a group: n · between / (n · between + within) for n blocks."""
    random = np.random.default_rng(0)
    shares: dict[str, list[float]] = {}
    for name, middles, count in (("alike", [0.5], 8), ("alike, long", [0.5], 500), ("of two kinds", [0.2, 0.9], 8)):
        texts = middles * (EARLIER // len(middles))
        experience = after_texts([random.uniform(middle - 0.1, middle + 0.1, 20).tolist() for middle in texts])
        shares[name] = []
        for _ in range(count):
            experience.made([0.99] * MASKS)
            shares[name].append(own_share(experience))
    assert all(np.diff(own).min() >= 0 for own in shares.values())
    assert shares["alike"][0] < 0.15 and shares["alike"][-1] < 0.5 < 0.95 < shares["alike, long"][-1]
    assert shares["of two kinds"][0] > 0.7 and shares["of two kinds"][-1] > 0.95
    untold = after_texts([[0.3] * 20])  # texts of one kind or of many: nobody knows
    for _ in range(5):
        untold.made([0.99] * MASKS)
    assert own_share(untold) == pytest.approx(5 * ALIKE / (1 + 5 * ALIKE), abs=1 / WINDOW)


def test_the_variance_between_texts_is_found() -> None:
    """Of promised tokens, in units of that within a text; few blocks of each make it no greater."""
    random = np.random.default_rng(1)
    found = []
    for spreading in (0.0, 1.0, 3.0):
        ratios = []
        for _ in range(40):
            logits = [random.normal(random.normal(0, np.sqrt(spreading)), 1, 6) for _ in range(EARLIER)]
            ratios.append(after_texts([(1 / (1 + np.exp(-own))).tolist() for own in logits])._apart)
        found.append(float(np.median(ratios)))
    assert found[0] < 0.25 < 0.4 < found[1] < 1.0 < found[2]


def test_many_texts_at_once_take_the_places_of_earlier_ones() -> None:
    experience = after_texts([[0.2] * 20, [0.9] * 20])
    experience.begin_text(4)
    assert 0.5 < own_share(experience, 0.9) < 0.75  # most of all what came last
    for _ in range(4 * WINDOW):
        experience.made([0.99] * MASKS)
    assert own_share(experience) == 1.0


def test_spread_is_even() -> None:
    blocks = [[float(number)] for number in range(6)]
    assert spread(blocks, 3) == [[0.0], [2.0], [4.0]] and spread(blocks, 6) == blocks and spread(blocks, 0) == []
    assert spread(blocks[:2], 5) == [[0.0]] * 3 + [[1.0]] * 2 and spread([], 3) == []


@pytest.mark.parametrize("kind", [0.95, 0.05])
def test_a_text_of_another_kind_is_seen_as_one_within_few_steps(kind: float) -> None:
    """After texts of two kinds, whose drafts always and never hold, the last of them of the other kind."""
    kinds = [0.95, 0.05] if kind > 0.5 else [0.05, 0.95]
    experience = after_texts([[own] * 20 for own in [*kinds, *kinds]])
    costs = noisy_costs(MASKS, by_width({1: 1.0, 4: 1.5, 16: 4.0}), 0.0, np.random.default_rng(0))
    planner = Planner(costs, experience)
    planner.solve()
    planner.begin_text()
    hung, drafts = [], 0
    for _ in range(SETTLED + 8):
        reach = experience.calibration.reach([np.log(kind / (1 - kind))] * drafts)
        (layout,) = planner.layouts([reach], [10**6])
        hung.append(layout.masks)
        drafts = min(layout.masks, MASKS)
        if drafts:
            experience.made([kind] * drafts)
    assert (sum(map(bool, hung[SETTLED + 1 :])) >= 4) == (kind > 0.5), hung


def test_a_block_of_few_masks_is_taken_to_go_on_as_full_ones_did() -> None:
    def third(last: float, blocks: int = 40) -> float:
        experience = Experience(MASKS)
        assert not experience.complete
        for _ in range(blocks):
            experience.made([0.9, 0.8, last])
        assert experience.complete == (blocks > 0)
        experience.begin_text()
        for _ in range(WINDOW):
            experience.made([0.9, 0.8])
        return float(experience.recent_reach()[0][-1, 3] / experience.recent_reach()[0][-1, 2])

    assert third(0.8) == pytest.approx(0.8, abs=0.01) and third(0.3) == pytest.approx(0.3, abs=0.02)
    assert 0.7 < third(0.0, blocks=0) < 0.8  # a little less sure than the one before it
