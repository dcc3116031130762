"""Greedy output equals the base's own generate(), token for token, whatever the drafts are worth (fp32)."""

import pytest
import torch
from torch import nn

from foretell.base import Base
from foretell.config import MTPConfig
from foretell.decoding.generate import MTPForCausalLM
from foretell.errors import ForetellError
from foretell.training.two_pass import mask_pass, regular_pass

from .models import CONFIGS, VOCAB, random_prompt, reference, tiny_lm, tiny_model

STRATEGIES = ["autoregressive", "linear", "quadratic"]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_drafts_that_are_nearly_all_rejected(name: str) -> None:
    model = tiny_model(name)
    for length in (1, 7, 40):  # the last is longer than every window
        prompt = random_prompt(length, seed=length)
        expected = reference(model.base.lm, prompt, 60)
        for strategy in STRATEGIES:
            for masks in (1, 4):
                out = model.generate(input_ids=prompt, max_new_tokens=60, strategy=strategy, masks=masks)
                assert out.token_ids == expected, (strategy, masks)


def fitted(name: str) -> tuple[MTPForCausalLM, torch.Tensor]:
    """A base that has learned to repeat a phrase, and an adapter that has learned the same text."""
    phrase = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(2))[:11]
    text = phrase.repeat(8)[None]
    lm = tiny_lm(name, spread=None).requires_grad_(True)
    optimiser = torch.optim.AdamW(lm.parameters(), lr=5e-3)
    for _ in range(120):
        loss = nn.functional.cross_entropy(lm(text).logits[0, :-1], text[0, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model = MTPForCausalLM(Base(lm), MTPConfig(masks=4, rank=8, alpha=16.0))
    assert model.sampler is not None
    anchors = torch.arange(4, 70, 3)[None]
    labels = text[0][anchors[0][:, None] + torch.arange(2, 6)]  # m_j after x_i predicts x_{i+j+1}
    previous = text[0][anchors[0][:, None] + torch.arange(1, 5)]
    optimiser = torch.optim.AdamW(model.own_parameters().values(), lr=1e-2)
    for _ in range(60):
        latents = mask_pass(model, anchors, regular_pass(model, text))[0]
        sampled = model.sampler(model.base.embed(previous), latents)
        loss = sum(
            nn.functional.cross_entropy(model.base.unembed(z).flatten(0, 1), labels.flatten())
            for z in (latents, sampled)
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.for_inference()
    return model, text[:, :23]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_drafts_that_are_nearly_all_accepted(name: str) -> None:
    model, prompt = fitted(name)
    expected = reference(model.base.lm, prompt, 60)
    for strategy, least in (("linear", 2.0), ("quadratic", 3.0)):
        out = model.generate(input_ids=prompt, max_new_tokens=60, strategy=strategy)
        assert out.token_ids == expected
        assert out.acceptance_rate > least, strategy


def test_spoiled_verification_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepting every draft must change the output: the comparisons above can fail."""
    from foretell.decoding import loop

    model = tiny_model()
    prompt = random_prompt(7)
    monkeypatch.setattr(loop, "accepted_drafts", lambda drafts, choices: torch.full((1,), drafts.shape[1]))
    out = model.generate(input_ids=prompt, max_new_tokens=40, strategy="quadratic")
    assert out.token_ids != reference(model.base.lm, prompt, 40)


def test_account_of_the_steps_adds_up() -> None:
    model, prompt = fitted("llama")
    done = list(model.steps(input_ids=prompt, max_new_tokens=50))
    out = model.generate(input_ids=prompt, max_new_tokens=50)
    assert [token for step in done for token in step.tokens] == out.token_ids
    assert len(out.token_ids) == out.new_tokens == 50
    assert sum(out.acceptance_histogram) == out.steps == len(done)
    assert sum((size + 1) * count for size, count in enumerate(out.acceptance_histogram)) == 50
    assert all(len(step.origins) == len(step.tokens) for step in done)
    assert {origin for step in done for origin in step.origins} == {"base", "draft"}


def test_stops_at_the_end_of_text_inside_an_accepted_run() -> None:
    model, prompt = fitted("llama")
    free = model.generate(input_ids=prompt, max_new_tokens=40)
    for stop in free.token_ids[:9]:
        model.base.lm.generation_config.eos_token_id = stop
        expected = reference(model.base.lm, prompt, 40)
        assert model.generate(input_ids=prompt, max_new_tokens=40).token_ids == expected
        assert expected[-1] == stop and len(expected) < 12


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "opt"])
def test_learned_positions_up_to_the_last(name: str) -> None:
    """Masks never take a position past the table, even when the text fills it."""
    model = tiny_model(name, masks=8)
    prompt = random_prompt(226)
    out = model.generate(input_ids=prompt, max_new_tokens=30)
    assert out.token_ids == reference(model.base.lm, prompt, 30)


def test_prompt_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ForetellError, match="too long"):
        tiny_model().generate(input_ids=random_prompt(200), max_new_tokens=100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masks": 0}, "at least 1"),
        ({"masks": 5}, "at most 4"),
        ({"strategy": "cubic"}, "must be one of"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"tokens": 3}, "unknown setting"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ForetellError, match=message):
        tiny_model().generate(input_ids=random_prompt(4), **settings)
