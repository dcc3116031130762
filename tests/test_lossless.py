"""Greedy output equals the base's own generate(), token for token, whatever the drafts are worth (fp32)."""

import pytest
import torch

from foretell.config import STRATEGIES
from foretell.decoding.verify import accepted_drafts, decide
from foretell.errors import ForetellError

from .decoded import decode
from .fitted import fitted
from .models import CONFIGS, random_prompt, reference, tiny_model

# Architectures whose own drafts are made to hold; with the others replayed drafts do.
FITTED = ("llama", "mistral", "gemma3", "phi3", "gpt2", "opt", "qwen3_moe", "deepseek_v3")


@pytest.mark.parametrize("name", list(CONFIGS))
def test_drafts_that_are_nearly_all_rejected(name: str) -> None:
    model = tiny_model(name)
    seen = set()
    for length in (1, 40):  # the latter is longer than every window
        prompt = random_prompt(length, seed=length)
        expected = reference(model.base.lm, prompt, 40)
        seen |= set(expected)
        for strategy in STRATEGIES:
            assert decode(model, [prompt], strategy, 40).texts == [expected], strategy
    assert len(seen) > 12  # a text of one token over and over would prove little


@pytest.mark.parametrize("name", list(CONFIGS))
def test_drafts_of_which_some_hold(name: str) -> None:
    """A ragged batch through runs of accepted drafts of every length, and rejections."""
    model = tiny_model(name)
    prompts = [random_prompt(length, seed=length) for length in (3, 33)]
    expected = [reference(model.base.lm, prompt, 40) for prompt in prompts]
    for strategy in STRATEGIES:
        out = decode(model, prompts, strategy, 40, replayed=expected)
        assert out.texts == expected, strategy
        if strategy != "autoregressive":
            assert out.accepted > 10 and out.rejected > 10, strategy


@pytest.mark.parametrize("name", FITTED)
def test_drafts_that_are_nearly_all_accepted(name: str) -> None:
    model, prompt = fitted(name)
    expected = reference(model.base.lm, prompt, 60)
    for strategy, least in {**dict.fromkeys(STRATEGIES, 1.0), "linear": 2.0, "quadratic": 3.0}.items():
        out = decode(model, [prompt], strategy, 60)
        assert out.texts == [expected], strategy
        assert 60 / out.steps >= least, strategy


def test_what_is_decided_on_a_cpu_is_what_is_on_a_device() -> None:
    torch.manual_seed(0)
    drafts, choices = torch.randint(-1, 2, (64, 3)), torch.randint(0, 2, (64, 4))
    accepted = accepted_drafts(drafts, choices)
    assert set(accepted.tolist()) == {0, 1, 2, 3}
    assert decide(drafts, choices) == torch.cat([accepted[:, None], choices], dim=1).tolist()
    assert decide(drafts[:, :0], choices[:, :1]) == [[0, own] for own in choices[:, 0].tolist()]


def test_spoiled_verification_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepting every draft must change the output: the comparisons above can fail."""
    from foretell.decoding import loop

    model = tiny_model()
    prompt = random_prompt(7)
    monkeypatch.setattr(loop, "decide", lambda drafts, choices: [[drafts.shape[1], *choices[0].tolist()]])
    out = model.generate(input_ids=prompt, max_new_tokens=40, strategy="quadratic")
    assert out.token_ids != reference(model.base.lm, prompt, 40)


def test_account_of_the_steps_adds_up() -> None:
    model, prompt = fitted("llama")
    settings = {"max_new_tokens": 50, "strategy": "quadratic"}  # which, unlike the planner, takes the same steps again
    done = list(model.steps(input_ids=prompt, **settings))
    out = model.generate(input_ids=prompt, **settings)
    assert [token for step in done for token in step.tokens] == out.token_ids
    assert len(out.token_ids) == out.new_tokens == 50
    assert sum(out.acceptance_histogram) == out.steps == len(done)
    assert sum((size + 1) * count for size, count in enumerate(out.acceptance_histogram)) == 50
    assert all(len(step.origins) == len(step.tokens) for step in done)
    assert {origin for step in done for origin in step.origins} == {"base", "draft"}


def test_stops_at_the_end_of_text_inside_an_accepted_run() -> None:
    model, prompt = fitted("llama")
    settings = {"max_new_tokens": 40, "strategy": "quadratic"}
    free = model.generate(input_ids=prompt, **settings)
    for stop in free.token_ids[:9]:
        model.base.lm.generation_config.eos_token_id = stop
        expected = reference(model.base.lm, prompt, 40)
        assert model.generate(input_ids=prompt, **settings).token_ids == expected
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
