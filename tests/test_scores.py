"""`return_scores`: what every token was chosen from, equal to what the base's own `generate()` gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from foretell.decoding.generate import MTPForCausalLM

from .fitted import fitted
from .models import random_prompt, tiny_model
from .test_lossless import STRATEGIES


class Push(LogitsProcessor):
    """Writes into what it gets, as many processors do: the token of the text's length gets likelier."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, input_ids.shape[1]] += 1.5
        return scores


@pytest.fixture(scope="module", params=["fitted", "random"])
def known(request: pytest.FixtureRequest) -> tuple[MTPForCausalLM, Tensor]:
    return fitted("llama") if request.param == "fitted" else (tiny_model(), random_prompt(8))


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}, {"logits_processor": Push}])
def test_scores_and_logits_are_those_of_the_base(
    known: tuple[MTPForCausalLM, Tensor], settings: dict[str, Any]
) -> None:
    model, prompt = known
    settings = {name: LogitsProcessorList([Push()]) if value is Push else value for name, value in settings.items()}
    expected = model.base.lm.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=30,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **settings,
    )
    scores, logits = torch.cat(expected.scores), torch.cat(expected.logits)
    for strategy in STRATEGIES:
        out = model.generate(input_ids=prompt, max_new_tokens=30, strategy=strategy, return_scores=True, **settings)
        assert out.token_ids == expected.sequences[0, prompt.shape[1] :].tolist()
        assert out.scores is not None and out.logits is not None
        torch.testing.assert_close(out.scores, scores, atol=1e-4, rtol=0)
        if "logits_processor" not in settings:  # theirs are overwritten by such a processor
            torch.testing.assert_close(out.logits, logits, atol=1e-4, rtol=0)
        assert out.scores.argmax(-1).tolist() == out.token_ids
        assert torch.equal(out.scores, out.logits) == (not settings)


def test_scores_of_sampling_are_warped_and_of_every_sequence() -> None:
    model = tiny_model()
    prompts = [random_prompt(length)[0].tolist() for length in (4, 9)]
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.7, "top_k": 5}
    for ids, out in zip(prompts, model.generate_batch(prompts, return_scores=True, **settings), strict=True):
        text = torch.tensor([ids + out.token_ids])
        with torch.no_grad():
            logits = model.base.lm(text).logits[0, len(ids) - 1 : -1]
        assert out.scores is not None and out.logits is not None
        torch.testing.assert_close(out.logits, logits, atol=1e-4, rtol=0)
        kept = out.scores.isfinite()
        assert (kept.sum(-1) == 5).all() and kept.gather(1, torch.tensor(out.token_ids)[:, None]).all()
        torch.testing.assert_close(out.scores[kept], logits[kept] / 0.7, atol=1e-4, rtol=0)


def test_nothing_is_kept_unless_asked_for() -> None:
    model, prompt = tiny_model(), random_prompt(4)
    out = model.generate(input_ids=prompt, max_new_tokens=5)
    assert out.scores is None and out.logits is None
    assert all(step.logits is None for step in model.steps(input_ids=prompt, max_new_tokens=5))
    asked = model.generate(input_ids=prompt, max_new_tokens=5, return_scores=True)
    assert asked.scores is not None and not asked.scores.is_inference()
    assert asked.to_dict().keys() == out.to_dict().keys() and "scores" not in out.to_dict()
