"""Steps from graphs: whatever changes from step to step must be in the tensors that a graph reads.

Without a GPU a graph is stood in for by a function that runs again on the same tensors: what it has from anywhere else
would be that of the step that was recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest

import pytest
import torch
from torch import Tensor

from foretell.captured import COLUMNS, CapturedSteps, Kind
from foretell.config import STRATEGIES, DecodeConfig
from foretell.decoding.compiling import compare_captured, compile_steps
from foretell.decoding.generate import MTPForCausalLM
from foretell.decoding.loop import refilled_steps
from foretell.decoding.pick import Picker
from foretell.errors import ForetellError

from .decoded import decode
from .fitted import fitted
from .models import random_prompt, reference, tiny_lm, tiny_model


def again(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """In the place of a graph."""
    out = run()
    return lambda: out.copy_(run()), out


def captured(name: str, eager_first: int = 0) -> tuple[MTPForCausalLM, CapturedSteps]:
    model = tiny_model(name)
    steps = CapturedSteps(model.base, model.adapter, again)
    steps.eager_first = eager_first
    model.compiled = steps
    return model, steps


# Windows by type of layer and one for all, chunks, learned positions, positions offset by the length (opt), experts.
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "llama4", "gpt2", "opt", "falcon", "mixtral"])
def test_every_strategy_writes_the_bases_text(name: str) -> None:
    model, steps = captured(name, eager_first=2)
    prompts = [random_prompt(length, seed=length) for length in (3, 33, 20)]
    expected = [reference(tiny_lm(name), prompt, 40) for prompt in prompts]
    for strategy in STRATEGIES:
        for which in (slice(0, 1), slice(1, 2), slice(0, 3)):
            out = decode(model, prompts[which], strategy, 40, replayed=expected[which])
            assert out.texts == expected[which], strategy
    kinds = set(steps.graphs)
    assert {kind.batch for kind in kinds} >= {1, 3}
    assert any(kind.width == 1 for kind in kinds) and any(kind.regular < kind.width for kind in kinds)
    assert all(steps.seen[kind] > 2 for kind in kinds)


def test_more_columns_than_a_graph_sees_and_larger_caches() -> None:
    model, steps = captured("llama")
    short, long = random_prompt(9), random_prompt(COLUMNS - 20, seed=1)
    for prompt, new in ((short, 30), (long, 60), (short, 30)):
        expected = reference(tiny_lm("llama"), prompt, new)
        assert decode(model, [prompt], "quadratic", new, replayed=[expected]).texts == [expected]
    assert {kind.columns for kind in steps.graphs} == {COLUMNS, 2 * COLUMNS}
    made = {keys.data_ptr() for keys, _ in steps.buffers}
    decode(model, [short], "linear", 30)
    assert made == {keys.data_ptr() for keys, _ in steps.buffers}  # what is there serves smaller texts


def test_of_two_texts_at_once_the_second_runs_eager() -> None:
    model, steps = captured("llama")
    prompts = [random_prompt(9), random_prompt(14, seed=3)]
    texts: list[list[int]] = [[], []]
    both = [model.steps(input_ids=prompt, max_new_tokens=30, strategy="quadratic") for prompt in prompts]
    for pair in zip_longest(*both):
        for text, step in zip(texts, pair, strict=True):
            text += step.tokens if step else []
    assert texts == [reference(tiny_lm("llama"), prompt, 30) for prompt in prompts]
    assert steps.graphs and all(kind.batch == 1 for kind in steps.graphs)


def test_prompts_that_join_a_batch() -> None:
    model, _ = captured("llama")
    prompts = [random_prompt(4 + 5 * number, seed=number) for number in range(5)]
    expected = [reference(tiny_lm("llama"), prompt, 12 + 4 * number) for number, prompt in enumerate(prompts)]
    config = DecodeConfig(strategy="quadratic", masks=3, max_new_tokens=28)
    texts: list[list[int]] = [[] for _ in prompts]
    for batch in refilled_steps(model, enumerate(p[0] for p in prompts), 2, config, Picker(config)):
        for step in batch:
            texts[step.sequence] += step.tokens
    assert [text[: len(own)] for text, own in zip(texts, expected, strict=True)] == expected


def test_graphs_are_compared_with_eager_steps() -> None:
    model, steps = captured("gemma3")
    model.compiled = None
    compare_captured(model, steps)
    assert model.compiled is steps and {kind.batch for kind in steps.seen} == {1, 2}
    wrong = CapturedSteps(model.base, model.adapter, lambda run: (lambda: None, run()))  # never runs again
    with pytest.raises(ForetellError, match="differ from eager ones"):
        compare_captured(model, wrong)


def test_a_step_is_recorded_when_its_kind_recurs() -> None:
    model, steps = captured("llama", eager_first=3)
    prompt = random_prompt(9)
    decode(model, [prompt], "autoregressive", 6)
    (kind,) = steps.graphs
    assert kind == Kind(1, 1, 1, COLUMNS) and steps.seen[kind] == 5  # the first of six read the prompt


def test_where_there_is_no_gpu_the_reason_is_given() -> None:
    model = tiny_model("llama")
    with pytest.raises(ForetellError, match="models on a GPU"):
        CapturedSteps(model.base, model.adapter)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_graphs_write_the_bases_text(name: str, dtype: torch.dtype) -> None:
    for model, prompt in ((tiny_model(name), random_prompt(9)), fitted(name)):
        model.to("cuda").to(dtype)
        prompt = prompt[:, :12].to("cuda")
        expected = reference(model.base.lm, prompt, 60)
        assert compile_steps(model) is None and isinstance(model.compiled, CapturedSteps)
        for strategy in STRATEGIES:
            out = model.generate(input_ids=prompt, max_new_tokens=60, strategy=strategy)
            assert out.token_ids == expected or dtype == torch.bfloat16, strategy
        assert model.compiled.graphs
