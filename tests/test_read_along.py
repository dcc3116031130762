"""The first step reads short prompts itself: the same as reading them before it, in one forward less."""

from __future__ import annotations

import pytest
import torch

from foretell.cache import StaticCache
from foretell.config import STRATEGIES, DecodeConfig
from foretell.decoding import loop
from foretell.decoding.pick import Picker
from foretell.layout import Layout, linear, plain
from foretell.model import _additive, _on_device

from .decoded import decode
from .models import CONFIGS, random_prompt, reference, tiny_model


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("lengths", [(33,), (20, 20), (3, 33, 1)])
@torch.inference_mode()
def test_latents_and_cache_are_those_of_prefill_and_step(name: str, lengths: tuple[int, ...]) -> None:
    model = tiny_model(name)
    prompts = [random_prompt(length, seed=length)[0] for length in lengths]
    x = torch.stack([prompt[-1:] for prompt in prompts])
    for layout in (linear(0, 3), plain()):
        layouts: list[Layout] = [layout] * len(prompts)
        caches = [StaticCache(len(model.base.blocks), 64, len(prompts)) for _ in range(2)]
        loop.prefill(model, prompts, caches[0])
        expected = model.step(x, layouts, caches[0], caches[0].lengths)
        latents = loop.read_along(model, prompts, layouts, caches[1])
        torch.testing.assert_close(latents, expected, atol=2e-5, rtol=1e-4)
        assert caches[0].lengths == caches[1].lengths == [length - 1 for length in lengths]
        for before, along in zip(caches[0].layers, caches[1].layers, strict=True):
            for row, length in enumerate(lengths):  # with x, which the loop keeps
                for states in ("keys", "values"):
                    one, other = (getattr(layer, states)[row, :, :length] for layer in (before, along))
                    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_prompts_read_before_the_first_step_give_the_same_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long prompts are; the other comparisons with `generate()` have short ones."""
    model = tiny_model(name)
    prompts = [random_prompt(length, seed=length) for length in (3, 33)]
    expected = [reference(model.base.lm, prompt, 24) for prompt in prompts]
    monkeypatch.setattr(loop, "READ_ALONG", 2)
    monkeypatch.setattr(loop, "read_along", None)
    for strategy in STRATEGIES:
        assert decode(model, prompts, strategy, 24, replayed=expected).texts == expected, strategy


def test_steps_tell_whether_they_read_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    prompt = random_prompt(9)
    along = model.generate(input_ids=prompt, max_new_tokens=12, strategy="linear")
    monkeypatch.setattr(loop, "READ_ALONG", 8)
    before = model.generate(input_ids=prompt, max_new_tokens=12, strategy="linear")
    assert along.token_ids == before.token_ids and along.steps == before.steps
    assert along.acceptance_rate_with_prefill == along.acceptance_rate == 12 / along.steps
    assert before.acceptance_rate_with_prefill == 12 / (before.steps + 1)


@torch.inference_mode()
def test_what_a_wide_prompt_took_is_not_kept() -> None:
    """A long-running server meets prompts of all lengths: their masks would fill the memory."""
    model = tiny_model()
    config = DecodeConfig(strategy="linear", masks=3, max_new_tokens=2)
    kept = _on_device.cache_info().currsize, _additive.cache_info().currsize
    for length in range(90, 100):
        for _ in loop.steps(model, [random_prompt(length)[0]], config, Picker(config)):
            pass
    after = _on_device.cache_info().currsize, _additive.cache_info().currsize
    assert all(now - then <= 3 for now, then in zip(after, kept, strict=True))  # the layouts of the steps behind them
