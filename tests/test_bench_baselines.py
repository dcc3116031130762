"""Transformers' own ways to generate, as baselines of the comparison."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from foretell.errors import ForetellError
from foretell.evaluation.baselines import huggingface_generate, load_draft_model

from .compared import small
from .models import CONFIGS, random_prompt, reference, tiny_lm, tiny_model


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_transformers_batches_are_what_it_writes_alone(name: str) -> None:
    model = tiny_model(name)
    ids = [random_prompt(n, seed=n) for n in (3, 20, 11)]
    expected = [reference(model.base.lm, own, 24) for own in ids]
    ends = {expected[1][9]}
    model.base.lm.generation_config.eos_token_id = next(iter(ends))
    wanted = [own[: next((i + 1 for i, t in enumerate(own) if t in ends), 24)] for own in expected]
    assert len({len(own) for own in wanted}) > 1  # some end early
    done = huggingface_generate(model, ids, 24)
    assert done.tokens == wanted and done.steps == max(map(len, wanted))
    assert done.sizes == [[1] * len(own) for own in wanted]
    assert 0 < done.first_token_seconds < done.seconds


def test_what_takes_one_prompt_is_left_out_of_batches() -> None:
    report = small(prompt_lookup=(2, 3), draft_model=tiny_lm(seed=3), batch=(1, 2))
    single, pair, *_ = report.cells
    assert not single.left_out and [str(row.method) for row in single.rows][1:4] == [
        "prompt lookup of 2 tokens", "prompt lookup of 3 tokens", "assisted"
    ]  # fmt: skip
    assert set(pair.left_out) == {"prompt lookup of 2 tokens", "prompt lookup of 3 tokens", "assisted"}
    assert set(pair.left_out.values()) == {"batch 1 only"} and len(pair.rows) == 3
    assert all(row.identical for cell in report.cells for row in cell.rows)


def test_the_baseline_ignores_other_wishes_of_the_generation_config() -> None:
    model, ids = tiny_model(), random_prompt(6)
    expected = reference(model.base.lm, ids, 40)
    config = hf.GenerationConfig(repetition_penalty=5.0, eos_token_id=expected[20], do_sample=True, temperature=3.0)
    model.base.lm.generation_config = config
    end = expected.index(expected[20]) + 1
    assert huggingface_generate(model, [ids], 40).tokens == [expected[:end]]
    assert model.generate(input_ids=ids, max_new_tokens=40).token_ids == expected[:end]
    assert model.base.lm.generation_config is config


def test_transformers_draws_by_the_seed_and_leaves_the_callers_draws_alone() -> None:
    model, ids = tiny_model(), [random_prompt(6)]
    before = torch.random.get_rng_state()
    texts = [huggingface_generate(model, ids, 24, temperature=1.0, seed=seed).tokens for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_draft_model_of_another_vocabulary() -> None:
    other = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**{**CONFIGS["llama"].to_dict(), "vocab_size": 50}))
    with pytest.raises(ForetellError, match="vocabulary of 50 tokens and the base one of 97"):
        load_draft_model(other, tiny_model())
