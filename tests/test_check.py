"""Comparing with generate() in any precision: differences are found, weighed, and do not hide what follows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import foretell
from foretell import cli
from foretell.base import Base
from foretell.config import MTPConfig
from foretell.decoding.generate import MTPForCausalLM
from foretell.decoding.generation import Generation
from foretell.errors import ForetellError
from foretell.evaluation.check import NEAR_TIE_UNITS, check, last_place, next_logits

from .fitted import fitted
from .models import random_prompt, reference, tiny_lm, tiny_model
from .saved import character_tokenizer, save_model

PROMPTS: list[Any] = [random_prompt(length, seed=length)[0].tolist() for length in (5, 12, 2)]
EVERY = 4


class Wrong(MTPForCausalLM):
    """Every fourth token of every output is its neighbour: 6 for 7, 7 for 6."""

    def generate_batch(self, *args: Any, **settings: Any) -> list[Generation]:
        outs = super().generate_batch(*args, **settings)
        return [
            replace(out, token_ids=[token ^ (place % EVERY == EVERY - 1) for place, token in enumerate(out.token_ids)])
            for out in outs
        ]


def wrong_model(dtype: torch.dtype, likeness: float) -> Wrong:
    """Neighbours' logits differ by a factor of `likeness`; token 96, which has no neighbour, is never chosen."""
    lm = tiny_lm()
    head = lm.lm_head.weight.data
    head[1:96:2] = head[0:96:2] * likeness
    head[96] = 0
    model = Wrong(Base(lm.to(dtype)), MTPConfig(masks=3, rank=4), character_tokenizer())
    model.for_inference()
    return model


@pytest.mark.parametrize("batch_size", [1, 3])
def test_fp32_is_identical(batch_size: int) -> None:
    model = tiny_model()
    model.base.lm.generation_config.eos_token_id = reference(model.base.lm, torch.tensor([PROMPTS[1]]), 24)[11]
    expected = [reference(model.base.lm, torch.tensor([prompt]), 24) for prompt in PROMPTS]
    assert len({len(tokens) for tokens in expected}) > 1  # they do not end together
    report = check(model, PROMPTS, max_new_tokens=24, strategy="quadratic", batch_size=batch_size)
    assert report.identical and report.passed and report.share == 0
    assert report.tokens == sum(map(len, expected))
    assert report.sentence() == f"identical: all {report.tokens} tokens of 3 prompts"
    assert json.loads(json.dumps(report.to_dict()))["verdict"] == "identical"


def test_acceptance_stands_beside_it() -> None:
    model, known = fitted("llama")
    assert check(model, [known[0].tolist()], max_new_tokens=40, strategy="quadratic").acceptance_rate > 3


@pytest.mark.parametrize("batch_size", [1, 2])
def test_every_difference_is_found_and_weighed(batch_size: int) -> None:
    """The comparison goes on behind a difference; one prompt's differences do not disturb another's."""
    model = wrong_model(torch.float32, 0.9)
    report = check(model, PROMPTS, max_new_tokens=18, strategy="linear", batch_size=batch_size)
    expected = [reference(model.base.lm, torch.tensor([prompt]), 18) for prompt in PROMPTS]
    if batch_size == 1:  # behind a difference the output starts anew, so the fourth token is wrong again
        places = [(prompt, place) for prompt in range(3) for place in range(EVERY - 1, 18, EVERY)]
        assert [(d.prompt, d.position) for d in report.divergences] == places
    assert {d.prompt for d in report.divergences} == {0, 1, 2} and report.first(1) in report.divergences
    for d in report.divergences:
        assert d.expected == expected[d.prompt][d.position] and d.found == d.expected ^ 1
        text = torch.tensor([PROMPTS[d.prompt] + expected[d.prompt][: d.position]])
        logits = next_logits(model.base, text)
        assert d.logit_gap == pytest.approx(float(logits[d.expected] - logits[d.found]), abs=1e-5)
        assert d.logit_gap > 0 and not d.near_tie and d.logit_gap_float32 is None
    assert not report.passed and report.share == len(report.divergences) / 54
    assert "0 of 3 outputs identical" in report.sentence() and ", 0 of them near-ties" in report.sentence()
    assert report.to_dict()["verdict"] == "different"


def test_the_same_difference_is_a_near_tie_where_the_precision_is_no_finer() -> None:
    """Logits that differ by a hundredth of a per cent: much in fp32, nothing in bf16."""
    likeness = 1 - 1e-4
    assert not check(wrong_model(torch.float32, likeness), PROMPTS[:1], max_new_tokens=8).passed
    report = check(wrong_model(torch.bfloat16, likeness), PROMPTS[:1], max_new_tokens=8)
    assert not report.identical and report.passed and report.to_dict()["verdict"] == "near-ties only"
    for d in report.divergences:
        assert d.near_tie and abs(d.logit_gap) <= NEAR_TIE_UNITS * d.unit
        assert d.logit_gap_float32 is not None and abs(d.logit_gap_float32) < 0.01
    without = check(wrong_model(torch.bfloat16, likeness), PROMPTS[:1], max_new_tokens=8, upcast=False)
    assert all(d.logit_gap_float32 is None for d in without.divergences)
    assert without.tokens == report.tokens == 8


def test_a_text_that_ends_elsewhere_is_no_tie() -> None:
    class Short(MTPForCausalLM):
        def generate_batch(self, *args: Any, **settings: Any) -> list[Generation]:
            return [replace(out, token_ids=out.token_ids[:-1]) for out in super().generate_batch(*args, **settings)]

    model = Short(Base(tiny_lm()), MTPConfig(masks=2, rank=2)).for_inference()
    assert isinstance(model, Short)
    report = check(model, PROMPTS[:1], max_new_tokens=6)
    assert not report.passed and [d.found for d in report.divergences] == [None]


def test_bf16_of_a_random_model_differs_in_near_ties_at_most() -> None:
    model = MTPForCausalLM(Base(tiny_lm().to(torch.bfloat16)), MTPConfig(masks=4, rank=4))
    model.for_inference()
    report = check(model, PROMPTS, max_new_tokens=40, strategy="quadratic", batch_size=2)
    assert report.environment["dtype"] == "bfloat16" and report.tokens == 120
    assert report.passed, report.divergences


def test_the_last_place() -> None:
    assert last_place(1.0, torch.bfloat16) == 2**-7 == last_place(1.99, torch.bfloat16)
    assert last_place(20.0, torch.bfloat16) == 2**-3
    assert last_place(1.0, torch.float32) == 2**-23
    assert last_place(0.0, torch.float16) > 0


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"strategy": "cubic"}, "strategy must be one of"),
        ({"masks": 9}, "at most 4"),
        ({"max_new_tokens": 1000}, "prompt 1: the prompt is too long"),
        ({"prompts": []}, "holds no prompts"),
    ],
)
def test_bad_settings(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ForetellError, match=fault):
        check(tiny_model(), **{"prompts": PROMPTS, **settings})


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save_model(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a b\nsome words\n")
    arguments = ["check", "--prompts", str(prompts), "--max-new-tokens", "8", "--strategy", "linear", "--masks", "2"]
    assert cli.main([*arguments, "--model", str(saved), "--dtype", "float32", "--batch-size", "2"]) == 0
    assert capsys.readouterr().out == "float32: identical: all 16 tokens of 2 prompts\n"

    monkeypatch.setattr(foretell, "load", lambda *args, **kwargs: wrong_model(torch.float32, 0.9))
    assert cli.main([*arguments, "--json"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert values["verdict"] == "different" and values["different_tokens"] == 4
    assert values["settings"] == {
        "max_new_tokens": 8, "strategy": "linear", "masks": 2, "batch_size": 1
    }  # fmt: skip
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out
    assert "gap in float32" in out and "4 of 16 tokens of 2 prompts differ (25 %), 0 of them near-ties" in out
    assert cli.main([*arguments, "--batch-size", "0"]) == 2
    assert "batch_size must be at least 1" in capsys.readouterr().err
    assert cli.main(["check", "--prompts", str(tmp_path / "none.txt")]) == 2
