"""The comparison of decoding methods: its rows, what they say, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from foretell.decoding import loop
from foretell.errors import ForetellError
from foretell.evaluation.bench import bench
from foretell.evaluation.methods import ADAPTIVE, ASSISTED, HUGGINGFACE, PROMPT_LOOKUP, Method, default_masks
from foretell.evaluation.report import Point, Report, in_words

from .compared import FIXED, prompts, small
from .models import random_prompt, reference, tiny_model


def test_rows_agree_with_each_other_and_with_generate() -> None:
    calls: list[tuple[int, int, str]] = []
    report = bench(
        tiny_model(masks=3),
        {"one": prompts(5, 9), "two": prompts(1)},
        strategies=FIXED,
        masks=(1, 3),
        prompt_lookup=(2,),
        max_new_tokens=24,
        rounds=2,
        on_progress=lambda *call: calls.append(call),
    )
    one, two = report.cells
    assert [str(row.method) for row in one.rows] == [
        "huggingface generate", "prompt lookup of 2 tokens", "plain decoding", "linear with 1 mask",
        "linear with 3 masks", "quadratic with 1 mask", "quadratic with 3 masks",
    ]  # fmt: skip
    assert [call[0] for call in calls] == list(range(1, len(calls) + 1))
    assert calls[-1][:2] == (calls[0][1],) * 2 == (7 * (1 + 2 * 2) + 7 * (1 + 2),) * 2
    for cell, size in ((one, 2), (two, 1)):
        assert cell.prompts == size
        for row in cell.rows:
            counts = row.counts
            assert row.identical and row.difference is None and row.point == cell.point
            assert counts.tokens == 24 * size
            assert sum(counts.acceptance_histogram) == counts.steps
            assert sum(h * (i + 1) for i, h in enumerate(counts.acceptance_histogram)) == counts.tokens
            assert counts.acceptance_rate == counts.tokens / counts.steps == row.speedup_in_steps
            assert counts.acceptance_rate_with_prefill == counts.acceptance_rate  # first steps read short prompts
            assert row.seconds.minimum <= row.seconds.median <= row.seconds.maximum
            assert row.tokens_per_second.maximum == pytest.approx(counts.tokens / row.seconds.minimum)
            assert row.ms_per_step is not None and row.decode_tokens_per_second is not None
            assert 0 < row.ms_to_first_token.median < 1000 * row.seconds.maximum
            assert len(counts.draft_acceptance) >= row.method.masks
        huggingface, _, plain = cell.rows[:3]
        assert plain.speedup.median == huggingface.speedup_over_huggingface.median == 1.0  # type: ignore[union-attr]
        assert cell.best().speedup.median == max(row.speedup.median for row in cell.rows[3:])
        assert "output identical" in cell.sentence()
    values = json.loads(json.dumps(report.to_dict()))
    assert values["threads"] == torch.get_num_threads() and values["dtype"] == "float32"
    row = values["cells"][0]["rows"][3]
    assert [row[key] for key in ("set", "method", "masks", "lookup", "batch", "temperature", "context")] == [
        "one", "linear", 1, 0, 1, 0.0, None
    ]  # fmt: skip
    assert Report.from_dict(values) == report


def test_a_text_of_one_step_has_no_decoding_to_time() -> None:
    row = small(max_new_tokens=1).cells[0].rows[-1]
    assert row.ms_per_step is None and row.decode_tokens_per_second is None and row.ms_to_first_token.median > 0


@pytest.mark.parametrize("hf_too", [True, False])
def test_wrong_output_is_found(hf_too: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept_all(drafts: torch.Tensor, choices: torch.Tensor) -> list[list[int]]:
        return [[drafts.shape[-1], *own] for own in choices.tolist()]

    model = tiny_model(masks=3)
    monkeypatch.setattr(loop, "decide", accept_all)
    report = bench(model, {"set": prompts(5)}, strategies=["linear"], masks=[3], max_new_tokens=24, rounds=1, hf=hf_too)
    (cell,) = report.cells
    *baselines, wrong = cell.rows
    assert all(row.identical for row in baselines) and len(baselines) == 1 + 2 * hf_too
    assert not wrong.identical and wrong.difference is not None
    expected = reference(model.base.lm, random_prompt(5, seed=5), 24)
    assert wrong.difference.expected == expected[wrong.difference.position] != wrong.difference.found
    assert wrong.difference.logit_gap > 0
    assert "output differs from prompt 1" in cell.sentence()
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_drawn_texts_are_compared_with_plain_decoding() -> None:
    (greedy, drawn) = small(temperature=(0, 0.9), seed=3).cells[:2]
    assert (greedy.point, drawn.point) == (Point("one"), Point("one", 1, 0.9))
    huggingface, plain, quadratic = drawn.rows
    assert plain.identical and quadratic.identical and huggingface.identical is None
    assert huggingface.speedup.median > 0 and "with the same seed" in drawn.sentence()


def test_drawn_texts_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_seed(self: Any, settings: dict[str, Any]) -> Any:
        seed = 1 if settings.get("strategy") == "quadratic" else 0
        return original(self, settings | {"seed": seed})

    original = type(tiny_model()).decode_config
    monkeypatch.setattr(type(tiny_model()), "decode_config", other_seed)
    assert [row.identical for row in small(temperature=(1,)).cells[0].rows] == [None, True, False]


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"masks": [0]}, "masks must be at least 1"),
        ({"masks": [5]}, "masks must be at most 4"),
        ({"masks": []}, "at least one strategy"),
        ({"strategies": ["cubic"]}, "strategy must be one of"),
        ({"strategies": ["autoregressive"]}, "at least one strategy"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 1000}, "set, prompt 1: the prompt is too long"),
        ({"prompt_lookup": [0]}, "prompt_lookup must be at least 1"),
        ({"batch": [0]}, "batch must be at least 1"),
        ({"batch": []}, "batch is empty"),
        ({"temperature": [-1.0]}, "temperature must be at least 0"),
        ({"temperature": [float("nan")]}, "temperature must be at least 0"),
        ({"context": [0]}, "context must be at least 1"),
        ({"context": []}, "context is empty"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"resume": True}, "give output too"),
        ({"draft_model": "absent/absent/absent"}, "there is no base at"),
        ({"draft_model": "absent", "hf": False}, "leave it out, or allow hf"),
    ],
)
def test_bad_settings(settings: dict[str, Any], fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(loop, "prefill", None)  # nothing may run
    with pytest.raises(ForetellError, match=fault):
        bench(model, {"set": prompts(5)}, **settings)


def test_empty_sets() -> None:
    with pytest.raises(ForetellError, match="at least one set"):
        bench(tiny_model(), {})
    with pytest.raises(ForetellError, match="mine holds no prompts"):
        bench(tiny_model(), {"mine": []})


def test_default_masks() -> None:
    assert default_masks(tiny_model(masks=8)) == (1, 2, 4, 8)
    assert default_masks(tiny_model(masks=3)) == (1, 2, 3)


def test_method_names() -> None:
    assert str(Method(HUGGINGFACE)) == HUGGINGFACE and str(Method("quadratic", 1)) == "quadratic with 1 mask"
    assert str(Method(ADAPTIVE, 4)) == "adaptive, up to 4 masks" and str(Method(ASSISTED)) == "assisted"
    assert str(Method(PROMPT_LOOKUP, lookup=1)) == "prompt lookup of 1 token"


def test_ratios_in_words() -> None:
    words = [in_words(r) for r in (1.62, 0.5, 1.0, 1.05)]
    assert words == ["1.6x faster than", "2.0x slower than", "as fast as", "1.05x faster than"]
