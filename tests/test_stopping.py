"""Where output ends: stop strings, lengths and end-of-text ids, against transformers' own `generate()`."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from foretell import cli
from foretell.config import DecodeConfig
from foretell.decoding.generate import MTPForCausalLM
from foretell.decoding.stopping import StopStrings
from foretell.errors import ForetellError

from .fitted import fitted
from .models import VOCAB, random_prompt, reference, tiny_model
from .saved import save_model
from .test_lossless import STRATEGIES


def syllable_tokenizer() -> PreTrainedTokenizerFast:
    """97 tokens of one to four letters, so that a text ends inside tokens and goes across them."""
    longer = ("".join(letters) for n in (2, 3, 4) for letters in itertools.product("abc", repeat=n))
    tokens = [*"abcdef", *itertools.islice(longer, VOCAB - 7), "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="module")
def known() -> tuple[MTPForCausalLM, Tensor]:
    """A model whose drafts hold, with its prompt; it tells syllables."""
    model, prompt = fitted("llama")
    model.tokenizer = syllable_tokenizer()
    return model, prompt


def stopped_by_the_base(model: MTPForCausalLM, prompt: Tensor, stop: list[str], new: int = 40) -> list[int]:
    out = model.base.lm.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new,
        do_sample=False,
        stop_strings=stop,
        tokenizer=model.tokenizer,
    )
    return out[0, prompt.shape[1] :].tolist()


def test_stop_strings_end_where_those_of_transformers_do(known: tuple[MTPForCausalLM, Tensor]) -> None:
    model, prompt = known
    text = model.decode(reference(model.base.lm, prompt, 40))
    ends_in_draft = lengths = 0
    for start, size in itertools.product((0, 5, 9, 14), (1, 3, 6)):
        stop = [text[start : start + size], "no such text"]
        expected = stopped_by_the_base(model, prompt, stop)
        for strategy in STRATEGIES:
            done = list(model.steps(input_ids=prompt, max_new_tokens=40, strategy=strategy, stop=stop))
            tokens = [token for step in done for token in step.tokens]
            assert tokens == expected, (stop, strategy)
            ends_in_draft += done[-1].origins[-1] == "draft"
        assert stop[0] in model.decode(expected) or len(expected) < 3  # or it began in the prompt
        lengths += len(expected)
    assert ends_in_draft > 3 and lengths > 12


def test_stop_strings_in_a_batch(known: tuple[MTPForCausalLM, Tensor]) -> None:
    model, prompt = known
    prompts = [prompt, random_prompt(5), random_prompt(11, seed=4)]
    stop = [model.decode(reference(model.base.lm, ids, 20)[-2:]) for ids in prompts]
    out = model.generate_batch([ids[0].tolist() for ids in prompts], max_new_tokens=40, stop=stop)
    for row, ids in zip(out, prompts, strict=True):
        assert row.token_ids == stopped_by_the_base(model, ids, stop)
        assert any(text in row.text for text in stop) and row.new_tokens <= 20


def test_stop_strings_see_characters_whose_bytes_are_several_tokens() -> None:
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate(characters)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = tokenizer("x ¬é€ y€")["input_ids"]
    ends = [[n for n in range(1, len(ids) + 1) if StopStrings(tokenizer, [s])(ids[:n])] for s in ("¬é", "€", "é€ y")]
    assert ends == [[6], [9, 14], [11]]


def test_text_may_stop_at_one_string_or_several(known: tuple[MTPForCausalLM, Tensor]) -> None:
    model, prompt = known
    text = model.generate(input_ids=prompt, max_new_tokens=20).text
    one = model.generate(input_ids=prompt, max_new_tokens=20, stop=text[4:8])
    assert one.token_ids == model.generate(input_ids=prompt, max_new_tokens=20, stop=[text[4:8]]).token_ids
    assert 0 < one.new_tokens < 20


def test_a_base_without_a_tokenizer_cannot_stop_at_text() -> None:
    with pytest.raises(ForetellError, match="no tokenizer to find stop texts"):
        tiny_model().generate(input_ids=random_prompt(4), stop=["a"])


def test_lengths() -> None:
    model = tiny_model()
    prompts = [random_prompt(length) for length in (3, 7)]

    def sizes(**settings: Any) -> list[int]:
        return [row.new_tokens for row in model.generate_batch([p[0].tolist() for p in prompts], **settings)]

    assert sizes() == [128, 128]
    assert sizes(max_length=10) == [7, 3]
    assert sizes(max_length=150) == [147, 143]  # not 128, which is only the default of the other
    assert sizes(max_length=10, max_new_tokens=4) == [4, 3]
    out = model.generate(input_ids=prompts[1], max_length=12)
    assert out.token_ids == reference(model.base.lm, prompts[1], 5)
    for length in (7, 6):
        with pytest.raises(ForetellError, match=f"no room: it has 7 tokens and max_length is {length}"):
            sizes(max_length=length)
    with pytest.raises(ForetellError, match=r"too long: 3 tokens and 297 new ones .* lower max_length"):
        model.generate(input_ids=prompts[0], max_length=300)


def test_end_of_text_ids(known: tuple[MTPForCausalLM, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = known
    free = reference(model.base.lm, prompt, 40)
    monkeypatch.setattr(model.base.lm.generation_config, "eos_token_id", free[5])

    def tokens(**settings: Any) -> list[int]:
        return model.generate(input_ids=prompt, max_new_tokens=40, **settings).token_ids

    assert tokens() == free[:6]
    assert tokens(eos_token_id=free[8]) == free[:9]
    assert tokens(eos_token_id=[free[8], free[2]]) == free[:3]
    assert tokens(eos_token_id=[]) == tokens(ignore_eos=True) == tokens(ignore_eos=True, eos_token_id=3) == free


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": [""]}, "stop must hold no empty text"),
        ({"stop": ["a", 3]}, r"stop must be a list of str, not \('a', 3\)"),
        ({"stop": 3}, "stop must be a list of str"),
        ({"eos_token_id": "2"}, "eos_token_id must be a list of int or nothing"),
        ({"eos_token_id": [True]}, "eos_token_id must be a list of int or nothing"),
        ({"eos_token_id": [VOCAB]}, f"0 to {VOCAB - 1}, not {VOCAB}"),
        ({"eos_token_id": -1}, "not -1"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"ignore_eos": "yes"}, "ignore_eos must be bool"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ForetellError, match=message) as caught:
        tiny_model().generate(input_ids=random_prompt(4), **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strange", [-1, VOCAB])
def test_ids_that_the_base_does_not_have_are_refused(strange: int) -> None:
    with pytest.raises(ForetellError, match=f"token ids 0 to {VOCAB - 1} and the prompt {strange}; give ids of"):
        tiny_model().generate(input_ids=[3, strange, 5])


def test_settings_built_directly_are_checked_too() -> None:
    with pytest.raises(ForetellError, match="no empty text"):
        DecodeConfig(stop=("a", ""))
    assert DecodeConfig().new_tokens(5) == 128


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = save_model(tmp_path)

    def values(*options: object) -> dict[str, Any]:
        line = ["generate", "--model", saved, "--prompt", "ab", "--json", *options]
        assert cli.main([str(word) for word in line]) == 0
        return json.loads(capsys.readouterr().out)

    free = values("--max-new-tokens", 12)
    assert len(set(free["token_ids"])) > 4
    stop = free["text"][4:6]
    ended = values("--max-new-tokens", 12, "--stop", "never", "--stop", stop)
    assert ended["text"].endswith(stop) and ended["text"] == free["text"][: free["text"].index(stop) + 2]
    assert values("--max-length", 9)["token_ids"] == free["token_ids"][:7]
    first, other = free["token_ids"][6], free["token_ids"][3]
    ids = values("--max-new-tokens", 12, "--eos-token-id", first, "--eos-token-id", other)["token_ids"]
    assert ids[-1] in (first, other) and first not in ids[:-1] and other not in ids[:-1]
    ignoring = values("--max-new-tokens", 12, "--eos-token-id", first, "--ignore-eos")
    assert ignoring["token_ids"] == free["token_ids"]
    assert cli.main(["generate", "--model", str(saved), "--prompt", "ab", "--stop", ""]) == 2
    assert "no empty text" in capsys.readouterr().err
