"""What is counted of a run: tokens, steps, drafts, seconds, and where two texts part."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from foretell.decoding.generate import MTPForCausalLM
from foretell.evaluation.measure import Run, count, first_difference, run
from foretell.evaluation.methods import ASSISTED, PROMPT_LOOKUP, Method

from .fitted import fitted
from .models import random_prompt, reference, tiny_model

Repeating = tuple[MTPForCausalLM, torch.Tensor]


@pytest.fixture(scope="module")
def repeating() -> Repeating:
    """A model whose drafts mostly hold, and its text (1, 23)."""
    return fitted("llama")


def test_times_after_the_first_token() -> None:
    done = Run(
        tokens=[[1, 2, 3, 4], [5, 6], [7]],
        sizes=[[1, 3], [2], [1]],
        seconds=3.0,
        first_token_seconds=[0.5, 0.5],
        steps=[2, 1],  # a batch of two and one of a single prompt
    )
    assert (done.decode_seconds, done.decode_tokens, done.decode_steps) == (2.0, 3, 1)
    assert done.seconds_per_token == 3 / 7


def test_first_difference_of_texts_that_end_early() -> None:
    model, ids = tiny_model(), random_prompt(6)
    tokens = reference(model.base.lm, ids, 8)
    assert first_difference(model, [ids], [tokens], [tokens]) is None
    short = first_difference(model, [ids], [tokens], [tokens[:5]])
    assert short is not None and (short.position, short.expected, short.found) == (5, tokens[5], None)
    assert short.logit_gap > 0  # over the best other token


@pytest.mark.parametrize("speculation", [PROMPT_LOOKUP, ASSISTED])
def test_what_transformers_drafts_is_counted(speculation: str, repeating: Repeating) -> None:
    """Prompt lookup on a text that repeats, and a draft model that is the base itself: drafts hold."""
    model, ids = repeating
    method = Method(speculation, lookup=3 if speculation == PROMPT_LOOKUP else 0)
    done = run(model, [ids], method, 24, draft_model=copy.deepcopy(model.base.lm))
    counts = count(done, 0)
    assert done.tokens == [reference(model.base.lm, ids, 24)]
    assert sum(done.sizes[0]) == 24 and len(done.drafts[0]) == len(done.sizes[0]) == done.steps[0]
    assert all(0 <= a <= d for a, d in zip(done.accepted[0], done.drafts[0], strict=True))
    if speculation == PROMPT_LOOKUP:
        assert max(done.drafts[0]) == 3 == len(counts.draft_acceptance)
    else:
        assert counts.acceptance_rate > 3 and counts.draft_acceptance[0] == 1.0


def test_drafts_of_a_batch_are_counted_without_filler(repeating: Repeating) -> None:
    """Rows of a batch share one layout: a row with fewer drafts than its neighbour didn't verify as many."""
    model, text = copy.deepcopy(repeating)
    torch.manual_seed(0)
    with torch.no_grad():  # so that some of its drafts fail
        model.sampler.bigram.b.weight += 0.7 * torch.randn_like(model.sampler.bigram.b.weight)
    ids = [text[:, :12], random_prompt(9, seed=4), text[:, 3:15]]
    method = Method("linear", 4)
    alone, together = run(model, ids, method, 24), run(model, ids, method, 24, batch=3)
    assert together.tokens == alone.tokens
    for done in (alone, together):
        for sizes, drafts, accepted in zip(done.sizes, done.drafts, done.accepted, strict=True):
            assert sizes == [a + 1 for a in accepted] and drafts[0] == 0 and max(drafts) == 4
            left = [24 - sum(sizes[:step]) for step in range(len(sizes))]
            assert all(a <= d < most for a, d, most in zip(accepted, drafts, left, strict=True))
    assert any(len(set(step)) > 1 for step in zip(*together.drafts, strict=False))  # or there was no filler
    assert together.steps == [max(map(len, together.sizes))] and len(together.first_token_seconds) == 1


def test_temperature_and_seed_reach_our_loop() -> None:
    model, ids = tiny_model(), [random_prompt(6)]
    settings: list[dict[str, Any]] = [{}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 1}]
    texts = [run(model, ids, Method("linear", 2), 24, **own).tokens[0] for own in settings]
    assert texts[0] == reference(model.base.lm, ids[0], 24) and len(set(map(tuple, texts))) == 3


def test_counts_of_known_steps() -> None:
    done = Run(
        tokens=[[1, 2, 3, 4, 5, 6], [7, 8]],
        sizes=[[1, 3, 2], [1, 1]],
        drafts=[[0, 2, 2], [0, 1]],
        accepted=[[0, 2, 1], [0, 0]],
    )
    counts = count(done, 2)
    assert (counts.tokens, counts.steps) == (8, 5)
    assert counts.acceptance_histogram == [3, 1, 1]
    assert counts.draft_acceptance == [2 / 3, 1 / 2]
    assert counts.acceptance_rate_per_prompt == (2 + 1) / 2
    looping = Run(tokens=[[1] * 8, [1, 2]], sizes=[[8], [2]], drafts=[[0], [0]], accepted=[[0], [0]])
    assert count(looping, 0).repeated_4gram_share == (4 / 5 + 0) / 2
    assert count(done, 0) == counts  # what drafts without masks is told by its drafts
