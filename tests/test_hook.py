"""`base.generate(custom_generate=...)`: transformers' own call, our steps, the same ids."""

import pytest
import torch

from foretell.errors import ForetellError

from .models import random_prompt, tiny_lm
from .test_lossless import fitted


def test_greedy_batches_padded_on_the_left() -> None:
    model, known = fitted("llama")
    lm = model.base.lm
    lm.generation_config.update(eos_token_id=lm.generate(known, max_new_tokens=15)[0, -1].item(), pad_token_id=0)
    short = random_prompt(9, seed=3)
    ids = torch.cat([known, torch.nn.functional.pad(short, (known.shape[1] - 9, 0))])
    real = torch.ones_like(ids)
    real[1, : known.shape[1] - 9] = 0
    inputs = {"input_ids": ids, "attention_mask": real, "max_new_tokens": 40, "do_sample": False}
    expected = lm.generate(**inputs, repetition_penalty=1.05)
    got = lm.generate(**inputs, repetition_penalty=1.05, custom_generate=model.custom_generate, strategy="linear")
    assert got.tolist() == expected.tolist()


def test_sampling_follows_the_global_seed_and_the_warpers() -> None:
    model, known = fitted("llama")
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        out = model.base.lm.generate(
            known,
            attention_mask=torch.ones_like(known),
            max_new_tokens=30,
            do_sample=True,
            temperature=3.0,
            top_k=50,
            custom_generate=model.custom_generate,
        )
        texts.append(out[0].tolist())
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][: known.shape[1]] == known[0].tolist() and len(texts[0]) == known.shape[1] + 30


def test_what_it_cannot_do_is_refused() -> None:
    model, known = fitted("llama")
    call = {"attention_mask": torch.ones_like(known), "max_new_tokens": 4, "custom_generate": model.custom_generate}
    with pytest.raises(ForetellError, match="belongs to the base"):
        tiny_lm().generate(known, **call)
    with pytest.raises(ForetellError, match="not by MaxTimeCriteria"):
        model.base.lm.generate(known, max_time=1.0, **call)
