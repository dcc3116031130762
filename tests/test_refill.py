"""A batch that is filled up again: whoever joins late gets the text that it would get alone."""

from __future__ import annotations

import pytest
from torch import Tensor

from foretell.config import DecodeConfig
from foretell.decoding.adaptive import Adaptive
from foretell.decoding.generate import MTPForCausalLM
from foretell.decoding.loop import refilled_steps
from foretell.decoding.pick import Picker
from foretell.decoding.planning import strategy_of
from foretell.decoding.stopping import Stop

from .fitted import fitted
from .models import random_prompt, tiny_model

Known = tuple[MTPForCausalLM, list[Tensor], int]


@pytest.fixture(scope="module")
def known() -> Known:
    """A model whose drafts hold, ten prompts of 1 to 30 tokens, and an end of text that some of them soon come to."""
    model, text = fitted("llama")
    lengths = ((0, 5), (3, 1), (2, 9), (7, 2), (4, 17), (1, 1), (9, 12))
    known = [text[0, start : start + length] for start, length in lengths]
    return model, [*known, *(random_prompt(length, seed=length)[0] for length in (30, 1, 6))], int(text[0, 6])


def decode(
    model: MTPForCausalLM, prompts: list[Tensor], batch_size: int, eos: int | None = None, **settings: object
) -> dict[int, list[int]]:
    config = model.decode_config({"max_new_tokens": 20, **settings})
    texts: dict[int, list[int]] = {}
    ended = []
    picker = Picker(config, seed_of=lambda number: 100 + number)
    numbered = ((10 + number, prompt) for number, prompt in enumerate(prompts))
    for steps in refilled_steps(model, numbered, batch_size, config, picker, Stop(() if eos is None else (eos,))):
        assert len(steps) <= batch_size
        for step in steps:
            texts.setdefault(step.sequence - 10, []).extend(step.tokens)
            if step.last:
                ended.append(step.sequence - 10)
    assert sorted(ended) == list(range(len(prompts)))
    return texts


@pytest.mark.parametrize("strategy", ["autoregressive", "linear", "quadratic", "adaptive"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "drafts": "drawn", "repetition_penalty": 1.2}])
def test_refilled_batches_give_each_prompt_its_own_text(
    known: Known, strategy: str, settings: dict[str, object]
) -> None:
    model, prompts, eos = known
    alone = {}
    for number, prompt in enumerate(prompts):
        own = settings | {"seed": 110 + number}
        alone[number] = model.generate(
            input_ids=prompt, max_new_tokens=20, eos_token_id=eos, strategy="autoregressive", **own
        ).token_ids
    assert len({len(text) for text in alone.values()}) > 1, "all texts end together: nothing is refilled"
    for batch_size in (1, 3, 20):
        assert decode(model, prompts, batch_size, eos, strategy=strategy, **settings) == alone


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_a_joining_prompt_may_be_longer_than_the_cache(name: str) -> None:
    model = tiny_model(name)
    prompts = [random_prompt(length, seed=length)[0] for length in (2, 3, 90, 1, 140)]
    alone = decode(model, prompts, 1, strategy="quadratic")
    assert decode(model, prompts, 2, strategy="quadratic") == alone
    for number, prompt in enumerate(prompts):
        single = model.generate(input_ids=prompt, max_new_tokens=20)
        assert single.token_ids == alone[number]


def test_nothing_to_decode() -> None:
    model = tiny_model()
    config = DecodeConfig(strategy="linear", masks=2)
    assert list(refilled_steps(model, iter(()), 4, config, Picker(config))) == []
    assert not any(module._forward_hooks for module in model.base.lm.modules())


def test_the_planner_forgets_those_that_have_ended(known: Known) -> None:
    model, prompts, _ = known
    config = model.decode_config({"max_new_tokens": 9})
    strategy = strategy_of(model, config, 2)
    assert isinstance(strategy, Adaptive)
    list(refilled_steps(model, enumerate(prompts), 2, config, Picker(config), strategy=strategy))
    assert not strategy.open and not strategy.reach and not strategy.texts
