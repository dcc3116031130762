"""Whether looking for a text's own drafts is worth its time: counted by what they gained, verified or not."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from foretell.decoding.calibration import Calibration
from foretell.decoding.lookup import FIRST_GUESS, SELDOM, Looks
from foretell.decoding.open_block import OpenBlock
from foretell.decoding.strategies import Running
from foretell.layout import plain

from .test_lookup import adaptive
from .test_resting import course_of, planless

TOKEN, LOOK = 1e-3, 2e-5  # seconds


@dataclass
class Counted(Looks):
    """Looks that pay or not, whatever they gain."""

    paying: bool
    gains: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def pays(self, token: float) -> bool:
        return self.paying

    def due(self, token: float) -> bool:
        return True

    def idle(self, token: float) -> int:
        return 0

    def looked(self, seconds: float) -> None:
        assert seconds > 0

    def gained(self, tokens: int, seconds: float = 0.0) -> None:
        self.gains.append((tokens, seconds))


def share_of_looks(looks: Looks, steps: int, every: int | None) -> float:
    """Of so many steps, if every so many-th look gains two tokens."""
    count = 0
    for _ in range(steps):
        if looks.due(TOKEN):
            looks.looked(LOOK)
            count += 1
            if every and count % every == 0:
                looks.gained(2)
    return count / steps


def test_one_looks_seldom_while_nothing_comes_of_it() -> None:
    looks = Looks()
    assert share_of_looks(looks, 50, None) == 1  # to begin with it is believed in
    share_of_looks(looks, 400, None)
    assert share_of_looks(looks, 400, None) == pytest.approx(1 / SELDOM)
    assert share_of_looks(looks, 400, 20) > 0.8  # 100 µs a look, once the first was found
    share_of_looks(looks, 400, None)
    assert share_of_looks(looks, 4000, 400) < 0.5  # 5 µs a look


def test_steps_until_the_next_look_are_known() -> None:
    looks = Looks()
    assert looks.idle(TOKEN) == 0 and looks.due(TOKEN)
    looks.looked(1.0)  # never to be paid for
    for _ in range(2 * SELDOM):
        idle = looks.idle(TOKEN)
        assert idle >= SELDOM
        looks.pass_over(idle)
        assert looks.due(TOKEN)
        assert not looks.due(TOKEN)


def test_steps_that_take_longer_for_what_was_found_count_against_it() -> None:
    looks = Looks()
    looks.gained(0, FIRST_GUESS * TOKEN / 2)
    assert looks.pays(TOKEN)
    looks.gained(0, FIRST_GUESS * TOKEN)
    assert not looks.pays(TOKEN) and looks.pays(2 * TOKEN)


@pytest.mark.parametrize("held", range(4))
@pytest.mark.parametrize("of_masks", range(4))
def test_the_texts_own_drafts_are_counted_against_those_they_replaced(held: int, of_masks: int) -> None:
    """Of both, those count that the step would have accepted."""
    strategy = adaptive()
    strategy.experience.looks = looks = Counted(True)
    text = [1, 2, 3] * 8
    row = Running(0, 100, list(text), drafts=3)
    own = [*text[:of_masks], 8, 8, 8][:3]
    assert strategy.drafted([row], torch.tensor([own]), torch.full((1, 3), 0.5)).tolist() == [text[:3]]
    (layout,) = strategy.layouts([row])
    verified = layout.regular - 1
    assert verified and not looks.gains
    accepted = min(held, verified)
    strategy.decided(row, [*text[:accepted], 9 if accepted < 3 else text[3]])
    assert looks.gains == [(accepted - min(of_masks, accepted), 0.0)]
    row.text += text[: accepted + 1]
    strategy.decided(row, [1])
    assert len(looks.gains) == 1


@pytest.mark.parametrize("pays", [False, True])
def test_at_rest_it_is_counted_what_verifying_would_gain(pays: bool) -> None:
    strategy, planner = planless(0.02)
    course_of(strategy, planner, 40, 0.02, sequences=1)
    planner.experience.looks = looks = Counted(pays)
    row = Running(99, 10**6, list(range(20)) * 2)
    assert strategy.layouts([Running(98, 10**6, list(range(50)))]) == [plain()] and strategy.paused
    assert strategy.drafted([row], torch.empty((1, 0), dtype=torch.long), None).numel() == (3 if pays else 0)
    (layout,) = strategy.layouts([row])
    assert (layout.regular > 1) == pays
    counted, seconds = planner.verifies(strategy.open[99][0].reach)
    assert counted > 1 and seconds > 0
    strategy.decided(row, [0])
    assert not looks.gains
    strategy.decided(row, [7])  # the second fails
    assert looks.gains == [(1, pytest.approx(seconds))]


def test_a_block_is_open_until_a_draft_fails_or_all_hold() -> None:
    calibration = Calibration(3)
    taught: list[int] = []
    calibration.decided = lambda logits, held, evidence=0.0: taught.append(held)  # type: ignore[method-assign]
    block = OpenBlock([5, 6, 7], [0.0] * 3, calibration)
    assert block.follow([5]) and block.follow([6]) and not taught
    assert not block.follow([7, 1]) and taught == [3]
    assert not OpenBlock([5, 6, 7], [0.0] * 3, calibration).follow([5, 1, 7]) and taught == [3, 1]
    assert not OpenBlock([5, 6, 7], [0.0] * 3, calibration).follow([1]) and taught == [3, 1, 0]
