"""`base.generate(custom_generate=...)`: transformers' own call, our steps, the same ids."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput

from foretell.decoding.generate import MTPForCausalLM
from foretell.errors import ForetellError

from .fitted import fitted
from .models import random_prompt, tiny_lm, tiny_model
from .test_stopping import syllable_tokenizer
from .test_streaming import Recorder

Known = tuple[MTPForCausalLM, Tensor]


@pytest.fixture(scope="module")
def trained() -> Known:
    return fitted("llama")


@pytest.fixture
def known(trained: Known) -> Iterator[Known]:
    """A model whose drafts hold and its prompt; the base's generation config is put back afterwards."""
    lm = trained[0].base.lm
    kept = lm.generation_config.to_dict()
    yield trained
    lm.generation_config.update(**kept)


def padded_batch(model: MTPForCausalLM, prompt: Tensor) -> dict[str, Any]:
    """Two prompts of different lengths, which do not end together."""
    lm = model.base.lm
    short = prompt[:, 5:14]  # it goes on elsewhere in the phrase that the model knows
    ids = torch.cat([prompt, torch.nn.functional.pad(short, (prompt.shape[1] - 9, 0))])
    real = torch.ones_like(ids)
    real[1, : prompt.shape[1] - 9] = 0
    inputs = {"input_ids": ids, "attention_mask": real, "max_new_tokens": 40, "do_sample": False}
    first, second = lm.generate(**inputs, repetition_penalty=1.05)[:, prompt.shape[1] :].tolist()

    def lead(token: int) -> int:
        """By how many tokens one of the two ends sooner."""
        return abs((*first, token).index(token) - (*second, token).index(token))

    eos = max(first + second, key=lead)
    lm.generation_config.update(eos_token_id=eos, pad_token_id=0)
    return inputs


def test_greedy_batches_padded_on_the_left(known: Known) -> None:
    model, prompt = known
    lm, inputs = model.base.lm, padded_batch(model, prompt)
    expected = lm.generate(**inputs, repetition_penalty=1.05)
    got = lm.generate(**inputs, repetition_penalty=1.05, custom_generate=model.custom_generate, strategy="linear")
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("wanted", [("scores", "logits"), ("scores",), ()])
def test_scores_and_logits_in_transformers_own_output(known: Known, wanted: tuple[str, ...]) -> None:
    model, prompt = known
    lm, inputs = model.base.lm, padded_batch(model, prompt) | {"return_dict_in_generate": True}
    inputs |= {f"output_{name}": True for name in wanted}
    expected = lm.generate(**inputs, repetition_penalty=1.05)
    got = lm.generate(**inputs, repetition_penalty=1.05, custom_generate=model.custom_generate)
    assert isinstance(got, GenerateDecoderOnlyOutput)
    assert got.sequences.tolist() == expected.sequences.tolist()
    eos, new = lm.generation_config.eos_token_id, got.sequences[:, prompt.shape[1] :].tolist()
    ends = [row.index(eos) + 1 if eos in row else len(row) for row in new]
    assert min(ends) < max(ends)
    for name in ("scores", "logits"):
        own, theirs = getattr(got, name), getattr(expected, name)
        assert (own is None) == (theirs is None) == (name not in wanted)
        if own is None:
            continue
        assert len(own) == len(theirs) == max(ends)
        for place, (mine, other) in enumerate(zip(own, theirs, strict=True)):
            assert mine.shape == other.shape and mine.dtype == other.dtype
            for row in (0, 1):
                wanted_row = other[row] if place < ends[row] else torch.zeros_like(other[row])
                # Of a padded prompt some versions of transformers penalise the padding's token too.
                counted = slice(1, None) if row == 1 else slice(None)
                torch.testing.assert_close(mine[row][counted], wanted_row[counted], atol=1e-4, rtol=0)
    if "scores" in wanted:
        assert lm.compute_transition_scores(got.sequences, got.scores, normalize_logits=True).isfinite().all()


def test_stop_strings_as_a_criterion(known: Known) -> None:
    model, prompt = known
    tokenizer = syllable_tokenizer()
    call = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 40, "do_sample": False}
    text = tokenizer.decode(model.base.lm.generate(prompt, **call)[0, prompt.shape[1] :])
    expected = model.base.lm.generate(prompt, **call, stop_strings=[text[15:20]], tokenizer=tokenizer)
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [text[15:20]])])
    got = model.base.lm.generate(prompt, **call, stopping_criteria=criteria, custom_generate=model.custom_generate)
    assert got.tolist() == expected.tolist() and prompt.shape[1] + 1 < got.shape[1] < prompt.shape[1] + 40


def test_stop_strings_as_an_argument(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = known
    tokenizer = syllable_tokenizer()
    call = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 40, "do_sample": False}
    text = tokenizer.decode(model.base.lm.generate(prompt, **call)[0, prompt.shape[1] :])
    asked = call | {"stop_strings": [text[15:20], "never"], "tokenizer": tokenizer}
    expected = model.base.lm.generate(prompt, **asked)
    assert prompt.shape[1] + 1 < expected.shape[1] < prompt.shape[1] + 40
    with pytest.raises(ForetellError, match="no tokenizer to find stop_strings with"):
        model.base.lm.generate(prompt, **asked, custom_generate=model.custom_generate)
    monkeypatch.setattr(model, "tokenizer", tokenizer)
    got = model.base.lm.generate(prompt, **asked, custom_generate=model.custom_generate)
    assert got.tolist() == expected.tolist()
    one = call | {"stop_strings": text[15:20]}  # a single string, and the tokenizer left out
    assert model.base.lm.generate(prompt, **one, custom_generate=model.custom_generate).tolist() == expected.tolist()


def test_a_streamer_is_bound_and_gets_what_transformers_would_put(known: Known) -> None:
    model, prompt = known
    theirs, ours, unused = Recorder(), Recorder(), Recorder()
    call = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 20, "do_sample": False}
    model.base.lm.generate(prompt, **call, streamer=theirs)
    model.base.lm.generate(prompt, **call, custom_generate=partial(model.custom_generate, streamer=ours))
    assert ours.calls == theirs.calls and ours.calls[-1] == "end" and len(ours.calls) == 22
    with pytest.raises(ForetellError, match="one prompt, not a batch of 2"):
        model.base.lm.generate(
            **padded_batch(model, prompt), custom_generate=partial(model.custom_generate, streamer=unused)
        )
    assert unused.calls == ["end"]


def test_sampling_follows_the_global_seed_and_the_warpers(known: Known) -> None:
    model, prompt = known
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        out = model.base.lm.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=30,
            do_sample=True,
            temperature=3.0,
            top_k=50,
            custom_generate=model.custom_generate,
        )
        texts.append(out[0].tolist())
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][: prompt.shape[1]] == prompt[0].tolist() and len(texts[0]) == prompt.shape[1] + 30


def test_what_it_cannot_do_is_refused(known: Known) -> None:
    model, prompt = known
    call = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 4, "custom_generate": model.custom_generate}
    with pytest.raises(ForetellError, match="belongs to the base"):
        tiny_lm().generate(prompt, **call)
    with pytest.raises(ForetellError, match="not by MaxTimeCriteria"):
        model.base.lm.generate(prompt, max_time=1.0, **call)
    with pytest.raises(ForetellError, match="leave out beams"):
        model.base.lm.generate(prompt, num_beams=2, **call)
    with pytest.raises(ForetellError, match="leave out output_attentions"):
        model.base.lm.generate(prompt, return_dict_in_generate=True, output_hidden_states=True, **call)


def test_processors_that_would_see_something_else_are_refused() -> None:
    model = tiny_model()
    ids = torch.cat([random_prompt(6), random_prompt(6, seed=1)])
    decode = {"custom_generate": model.custom_generate, "max_new_tokens": 6, "do_sample": False}
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    with pytest.raises(ForetellError, match=r"Min\w+LogitsProcessor counts the padding"):
        model.base.lm.generate(ids, attention_mask=padded, eos_token_id=1, pad_token_id=0, min_new_tokens=3, **decode)
    with pytest.raises(ForetellError, match="PrefixConstrained"):
        model.base.lm.generate(
            ids, attention_mask=torch.ones_like(ids), prefix_allowed_tokens_fn=lambda row, text: [row], **decode
        )
    assert not any(module._forward_hooks for module in model.base.lm.modules())


def test_the_base_is_left_without_hooks() -> None:
    model = tiny_model()
    steps = model.steps(input_ids=random_prompt(5), max_new_tokens=20, strategy="linear")
    next(steps)
    next(steps)
    assert any(module._forward_hooks for module in model.base.lm.modules())
    steps.close()
    assert not any(module._forward_hooks for module in model.base.lm.modules())


def test_standard_adapters_decode_alike_with_every_strategy() -> None:
    """Ungated, the adapter acts on regular rows too: the text is another one, but one."""
    model = tiny_model(adapter="standard")
    prompt = random_prompt(7)
    texts = [
        model.generate(input_ids=prompt, max_new_tokens=24, strategy=strategy).token_ids
        for strategy in ("autoregressive", "linear", "quadratic")
    ]
    assert texts[0] == texts[1] == texts[2]
