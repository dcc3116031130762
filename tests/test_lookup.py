"""Drafts from the text itself: what is found, what it is worth, and that the output stays the base's."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from foretell.config import DecodeConfig
from foretell.decoding.adaptive import Adaptive
from foretell.decoding.calibration import Experience
from foretell.decoding.lookup import LONGEST, REMEMBERED, TRIED, Found, TextLookup
from foretell.decoding.planner import Planner
from foretell.decoding.strategies import Running
from foretell.evaluation.optimum import by_width
from foretell.evaluation.simulation import noisy_costs

from .decoded import decode
from .models import random_prompt, reference, tiny_model


def found_plainly(text: list[int], most: int) -> Found:
    """The definition, place by place."""
    for size in (2, 1):
        if places := [place for place in range(size, len(text)) if text[place - size : place] == text[-size:]][-TRIED:]:
            break

    def matched(place: int) -> int:
        return next((n for n in range(min(LONGEST, place)) if text[place - 1 - n] != text[-1 - n]), min(LONGEST, place))

    if not places:
        return Found([], 0)
    best = max(reversed(places), key=matched)  # of equals the latest
    going_on = text[best:]
    while len(going_on) < most:
        going_on = going_on + going_on
    return Found(going_on[:most], matched(best))


def test_finds_the_longest_latest_match_of_a_growing_text() -> None:
    random = np.random.default_rng(0)
    for alphabet in (2, 5, 30):
        text, lookup = random.integers(alphabet, size=1).tolist(), TextLookup()
        for _ in range(100):
            assert lookup.find(text, 6)[:2] == found_plainly(text, 6)[:2]
            # Now and then it says again what it said before.
            start = int(random.integers(len(text)))
            text += text[start : start + 9] if random.random() < 0.3 else random.integers(alphabet, size=2).tolist()


def test_all_that_was_said_since_a_look_is_compared_with_what_it_foretold() -> None:
    lookup, text = TextLookup(), [1, 2, 3, 4] * 3
    lookup.find(text, 8)
    for said, run in (([1], 1), ([2, 3, 4, 1], 5), ([2, 3, 9], 0), ([9, 9, 9], 0)):
        text += said
        lookup.find(text, 8)
        assert lookup.run == run


def test_a_loop_goes_on_and_short_or_new_text_gives_nothing() -> None:
    assert TextLookup().find([9, 1, 2, 3, 1, 2, 3, 1, 2], 5).drafts == [3, 1, 2, 3, 1]
    assert TextLookup().find([7, 7, 7], 4) == Found([7, 7, 7, 7], 2)
    assert TextLookup().find([4, 1, 5, 1], 2) == Found([5, 1], 1)
    for text in ([], [1], [1, 2], [1, 2, 3, 4]):
        assert TextLookup().find(text, 4) == Found([], 0)
    assert TextLookup().find([1, 2, 1, 2], 0).drafts == []


def test_longer_matches_promise_more() -> None:
    first = [[Found([0] * 3, matched).log_odds(number) for number in range(3)] for matched in (1, 3, 9)]
    assert np.exp([logits[0] for logits in first]) == pytest.approx([1 / 3, 1.0, 3.0])
    assert all(one < other for logits in first for one, other in pairwise(logits))


def test_a_text_that_has_begun_to_repeat_itself_promises_more_than_one_that_stopped() -> None:
    """By the first drafts that held and failed before, once it is known."""
    text = [1, 2, 3, 1]
    going_on, other = TextLookup(), TextLookup()
    for lookup in (going_on, other):
        assert lookup.find(text, 4) == Found([2, 3, 1, 2], 1)
        assert lookup.find(text, 4)[2:] == (0.0, 0.0)  # asked twice, with nothing new
    held, failed = going_on.find([*text, 2, 3], 4), other.find([*text, 7], 4)
    assert held[2:] == (1.0, 0.0) and failed[2:] == (0.0, 1.0)
    assert going_on.find([*text, 2, 3, 9, 2], 4)[2:] == pytest.approx((REMEMBERED, 1.0))
    same = [Found([0], 2, *found[2:]).evidence() for found in (held, Found([], 0), failed)]
    assert same == sorted(same, reverse=True) and len(set(same)) == 3


def adaptive(masks: int = 3) -> Adaptive:
    experience = Experience(masks)
    costs = noisy_costs(masks, by_width({1: 1.0, 4: 1.1, 16: 3.0}), 0.0, np.random.default_rng(0))
    planner = Planner(costs, experience)
    return Adaptive(lambda sequences: planner, experience)


def test_the_better_drafts_are_taken_row_by_row() -> None:
    strategy = adaptive()
    looping, new = Running(0, 100, [1, 2, 3] * 8, drafts=3), Running(1, 3, [1, 2, 3, 4], drafts=2)
    made = torch.tensor([[7, 8, 9], [5, 6, 0]])
    drafts = strategy.drafted([looping, new], made, torch.full((2, 3), 0.5))
    assert drafts.tolist() == [[1, 2, 3], [5, 6, 0]] and (looping.drafts, new.drafts) == (3, 2)
    sure = torch.tensor([[0.99, 0.99, 0.99], [0.5, 0.5, 0.5]])
    looping, new = Running(2, 100, [4, 1, 2, 5, 1, 2], drafts=3), Running(3, 2, [1, 2, 1, 2])
    drafts = strategy.drafted([looping, new], made, sure)
    assert drafts.tolist() == [[7, 8, 9], [1, 0, 0]]
    assert (looping.drafts, new.drafts) == (3, 1)  # no draft beyond the last token but one
    strategy.lookup = False
    looping.drafts = 3
    assert strategy.drafted([looping], made[:1], sure[:1] * 0) is not drafts and looping.drafts == 3


def test_both_kinds_of_drafts_teach_their_own_calibration() -> None:
    strategy = adaptive()
    row = Running(0, 100, [1, 2, 3] * 3, drafts=3)
    for number in range(40):  # the loop goes on, and the masks are sure of something else
        if number % 8 == 0:
            strategy.experience.recent_reach()
        strategy.drafted([row], torch.tensor([[7, 8, 9]]), torch.full((1, 3), 0.9))
        strategy.decided(row, [1, 2, 3])
        row.text += [1, 2, 3]
        row.drafts = 3
    strategy.experience.recent_reach()
    (found,) = strategy.open[0] or [strategy._found(row)]
    assert strategy.experience.lookup.reach(found.logits, found.evidence)[3] > 0.9
    assert strategy.experience.calibration.chance(2.0, 0) < 0.1


def test_what_became_of_a_texts_own_drafts_counts_as_much_as_experience_says() -> None:
    """First drafts hold as often as earlier ones of their text did, whatever the length of the match."""
    random, lookup = np.random.default_rng(0), Experience(3).lookup
    texts = (Found([0], 2, 18.0, 2.0), Found([0], 2, 2.0, 18.0))
    for _ in range(20):
        for _ in range(40):
            good = int(random.integers(2))
            lookup.decided([random.uniform(-1, 1)], int(random.random() < (0.1, 0.9)[good]), texts[1 - good].evidence())
        lookup.learn()
    often, seldom = ([lookup.chance(logit, 0, text.evidence()) for logit in (-1.0, 1.0)] for text in texts)
    assert often == pytest.approx([0.9] * 2, abs=0.06) and seldom == pytest.approx([0.1] * 2, abs=0.06)


def test_masks_are_worth_less_where_the_text_repeats_itself() -> None:
    worth = []
    for found in ([1.0], [1.0, 0.95, 0.9, 0.85]):
        strategy = adaptive()
        for _ in range(32):
            strategy.experience.made([0.7] * 3)
            strategy.experience.found(found)
        planner = strategy.planner(1)
        planner.solve()
        worth.append((1 / planner.per_token, -planner.value[3]))
    strategy.experience.begin_text()  # which repeats nothing yet
    assert not strategy.experience.recent_reach()[1][:, 1:].any()
    assert worth[1][0] > 1.1 * worth[0][0]  # more tokens per second
    assert worth[1][1] < 0.5 * worth[0][1]


def test_output_is_the_same_and_steps_are_fewer() -> None:
    """A tiny random model soon loops when greedy, and its untrained adapter foretells nothing."""
    model = tiny_model()
    prompts = [random_prompt(9), torch.tensor([[5, 6, 7, 8] * 5]), random_prompt(3)]
    expected = [reference(model.base.lm, prompt, 80) for prompt in prompts]
    together = decode(model, prompts, "adaptive", 80)
    assert together.texts == expected
    alone = {on: [decode(model, [prompt], "adaptive", 80, lookup=on) for prompt in prompts] for on in (True, False)}
    assert [one.texts[0] for one in alone[True]] == [one.texts[0] for one in alone[False]] == expected
    steps = {on: sum(one.steps for one in done) for on, done in alone.items()}
    assert steps[True] < 0.8 * steps[False]
    assert together.steps < 0.8 * steps[False]


def test_the_same_seed_draws_the_same_text() -> None:
    model = tiny_model()
    prompts = [[5, 6, 7, 8] * 5, [1, 2, 3]]
    settings = {"max_new_tokens": 40, "temperature": 1.0, "seed": 3}
    expected, *others = (
        [one.token_ids for one in model.generate_batch(prompts, **own, **settings)]
        for own in ({"strategy": "autoregressive"}, {"lookup": True}, {"lookup": False})
    )
    assert others == [expected, expected]


def test_it_is_a_setting() -> None:
    assert DecodeConfig().lookup and not DecodeConfig(lookup=False).lookup
