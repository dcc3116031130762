"""A checkpoint's `custom_generate` folder, from plain transformers: `base.generate(custom_generate=DIRECTORY)`."""

from __future__ import annotations

import copy
import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from foretell import checkpoint
from foretell.decoding import repository
from foretell.errors import ForetellError
from foretell.gated_lora import GatedLoRA

from .models import random_prompt, tiny_lm
from .saved import save_model
from .test_streaming import Recorder

PROMPT = random_prompt(9)


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies the folder's code into a cache: not into the user's."""
    import sys

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_model(tmp_path / "saved")


@pytest.fixture
def lm(saved: Path) -> PreTrainedModel:
    """The base as anybody would load it."""
    return AutoModelForCausalLM.from_pretrained(saved.parent / "base")


def generate(lm: PreTrainedModel, adapter: Path | None = None, **settings: Any) -> Any:
    if adapter is not None:
        settings |= {"custom_generate": str(adapter), "trust_remote_code": True}
    inputs = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT), "do_sample": False}
    return lm.generate(**inputs | {"max_new_tokens": 20} | settings)


def test_the_same_ids_from_a_directory_that_may_move(saved: Path, lm: PreTrainedModel, tmp_path: Path) -> None:
    expected = generate(lm).tolist()
    assert generate(lm, saved).tolist() == generate(lm, saved, strategy="linear", masks=2).tolist() == expected
    moved = shutil.move(saved, tmp_path / "else where")
    assert generate(lm, Path(moved), repetition_penalty=1.2).tolist() == generate(lm, repetition_penalty=1.2).tolist()
    with pytest.raises(ForetellError, match="masks must be at most 4"):  # it is ours that runs
        generate(lm, Path(moved), masks=5)


def test_each_directory_brings_its_own_adapter_and_is_loaded_once(
    saved: Path, lm: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other" / saved.name  # the same name and the same code: transformers keeps one module for both
    shutil.copytree(saved, other)
    weights = checkpoint.read_safetensors(other / checkpoint.WEIGHTS_FILE)
    checkpoint.write_safetensors({name: w * 0 for name, w in weights.items()}, other / checkpoint.WEIGHTS_FILE)
    loads = []
    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda *args, **kwargs: loads.append(args[1]) or load(*args, **kwargs))
    for adapter in (saved, other, saved, other):
        generate(lm, adapter)
    assert loads == [saved, other]
    models = [repository.attached(lm, str(adapter), {}) for adapter in (saved, other)]
    assert [bool(model.mask_vectors.any()) for model in models] == [True, False]


def test_the_base_stays_what_it_was(saved: Path, lm: PreTrainedModel) -> None:
    lm.train()
    lm.model.layers[0].eval()
    lm.lm_head.requires_grad_(False)
    modes = [module.training for module in lm.modules()]
    trainable = [parameter.requires_grad for parameter in lm.parameters()]
    names, logits, ids = list(lm.state_dict()), lm(PROMPT).logits, generate(lm)
    generate(lm, saved)
    assert [module.training for module in lm.modules()] == modes
    assert [parameter.requires_grad for parameter in lm.parameters()] == trainable
    assert list(lm.state_dict()) == names
    assert torch.equal(lm(PROMPT).logits, logits) and torch.equal(generate(lm), ids)


def test_the_adapter_goes_with_its_base_and_not_with_a_copy(saved: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(saved.parent / "base")  # a fixture would be held by pytest
    expected = generate(lm, saved).tolist()
    twin = copy.deepcopy(lm)
    gone = weakref.ref(lm)
    assert generate(twin, saved).tolist() == expected
    del lm
    gc.collect()
    assert gone() is None


def test_the_adapter_follows_a_base_that_changes_its_precision(saved: Path, lm: PreTrainedModel) -> None:
    generate(lm, saved)
    assert generate(lm.double(), saved).tolist() == generate(lm).tolist()


def test_streamer_stop_strings_and_output(saved: Path, lm: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved.parent / "base")
    text = tokenizer.decode(generate(lm)[0, PROMPT.shape[1] :])
    asked = {
        "stop_strings": [text[7:9]],
        "tokenizer": tokenizer,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    theirs, ours = Recorder(), Recorder()
    expected = generate(lm, streamer=theirs, **asked)
    got = generate(lm, saved, streamer=ours, **asked)
    assert got.sequences.tolist() == expected.sequences.tolist() and got.sequences.shape[1] < PROMPT.shape[1] + 20
    torch.testing.assert_close(torch.cat(got.logits), torch.cat(expected.logits), atol=1e-4, rtol=0)
    assert ours.calls == theirs.calls


def test_stop_strings_of_a_configuration(saved: Path, lm: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved.parent / "base")
    strings = [tokenizer.decode(generate(lm)[0, PROMPT.shape[1] :])[7:9]]
    expected = generate(lm, tokenizer=tokenizer, stop_strings=strings)
    assert expected.shape[1] < PROMPT.shape[1] + 20
    given = GenerationConfig(stop_strings=strings)
    assert torch.equal(generate(lm, saved, tokenizer=tokenizer, generation_config=given), expected)
    assert given.stop_strings == strings
    lm.generation_config.stop_strings = strings
    assert torch.equal(generate(lm, saved, tokenizer=tokenizer), expected)
    assert torch.equal(generate(lm, saved), expected)  # the base's own tokenizer lies beside it
    assert lm.generation_config.stop_strings == strings
    with pytest.raises(ForetellError):
        generate(lm, saved, masks=99)
    assert lm.generation_config.stop_strings == strings


def test_the_stream_ends_whatever_fails(saved: Path, lm: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(error: type[BaseException], **settings: Any) -> None:
        streamer = Recorder()
        with pytest.raises(error):
            generate(lm, saved, streamer=streamer, **settings)
        assert streamer.calls == ["end"]

    ended(ForetellError, masks=99)  # ours refuses it
    ended(ValueError, no_such_argument=1)  # transformers refuses it before ours is called
    with monkeypatch.context() as patch:
        patch.setattr(GatedLoRA, "attach", interrupted)  # when the first step puts its hooks on the base
        streamer = Recorder()
        with pytest.raises(KeyboardInterrupt):
            generate(lm, saved, streamer=streamer, strategy="linear")
        assert streamer.calls == [PROMPT.tolist(), "end"]
    (saved / checkpoint.WEIGHTS_FILE).write_bytes(b"\x00" * 40)
    lm.__dict__.pop(repository.ATTRIBUTE)
    ended(ForetellError)  # the adapter can't be loaded


def interrupted(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_a_base_and_its_adapter_in_one_directory(saved: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(saved.parent / "base", both)
    shutil.copytree(saved, both, dirs_exist_ok=True)
    lm = AutoModelForCausalLM.from_pretrained(both, trust_remote_code=True)
    assert generate(lm).tolist() == type(lm).generate(
        lm, PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=20, do_sample=False
    ).tolist()  # fmt: skip
    with pytest.raises(ForetellError, match="masks must be at most 4"):
        generate(lm, masks=5)


def test_what_does_not_fit_is_refused_and_leaves_no_trace(saved: Path, lm: PreTrainedModel) -> None:
    def refused(lm: PreTrainedModel, message: str) -> None:
        with pytest.raises(ForetellError, match=message) as caught:
            generate(lm, saved)
        assert "\n" not in str(caught.value)
        assert not any(module._forward_hooks for module in lm.modules())

    refused(tiny_lm(seed=3), "does not fit this model: their weights differ")
    (saved / checkpoint.WEIGHTS_FILE).write_bytes(b"\x00" * 40)
    refused(lm, "is damaged")
    path = saved / checkpoint.CONFIG_FILE
    path.write_text(path.read_text().replace('"gated"', '"standard"'))
    refused(lm, "not gated")


def test_the_folder_and_the_card(saved: Path) -> None:
    assert (saved / "custom_generate" / "requirements.txt").read_text().split() == ["foretell"]
    assert "custom_generate=" in (saved / checkpoint.CARD_FILE).read_text()
